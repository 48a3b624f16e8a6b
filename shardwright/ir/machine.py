"""Machine: speed of devices and links, and memory of devices; read from TOML files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shardwright.ir.mesh import Mesh

# A dtype without a rate takes that of the first of these that has one, else float32's.
_FALLBACK = {"bfloat16": ("float16",), "float16": ("bfloat16",), "float8": ("float8", "bfloat16", "float16")}


_LAUNCHES = ("operator_launch", "convolution_launch", "collective_launch", "optimizer_launch", "step_launch")


@dataclass(frozen=True)
class Level:
    """Links among up to ``size`` ranks; 0: any number.

    Args:
        name: what it is called, such as ``node``.
        latency: seconds per message.
        bandwidth: bytes per second that a rank sends, and as many that it receives, when all ranks do.
    """

    name: str
    size: int
    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Machine:
    """A cluster's devices, all alike, and their links.

    Args:
        flops: peak operations per second, by dtype name.
        efficiency: share of the peak that is reached, by operator family; ``default`` for the others. One dtype of a family
            may have its own entry, such as ``conv_bfloat16``.
        memory: bytes per device; 0: not limited.
        memory_bandwidth: bytes per second that a device reads and writes in its memory.
        operator_launch, collective_launch: seconds it takes to start one.
        levels: links, the innermost first; ranks that are neighbours are on the innermost.
        overlap: share of gradient reductions that hides behind computing; ``gather_overlap``: of parameter gathers.
        rates: bytes per second of operator families that memory bandwidth alone does not explain.
        device: the kind of device as PyTorch names it, ``cpu``, ``cuda`` or ``npu``.
        optimizer_launch: seconds per updated parameter besides its bytes; ``step_launch``: seconds per step.
            The presets of accelerators have none: their optimizers update all parameters together.
        convolution_launch: extra seconds per convolution whose filters are larger than 1.
        channel_block: channels that convolutions compute together (:mod:`shardwright.cost.convolution`); 1: each by itself.
    """

    name: str
    description: str
    flops: Mapping[str, float]
    efficiency: Mapping[str, float]
    memory: float
    memory_bandwidth: float
    operator_launch: float
    collective_launch: float
    levels: tuple[Level, ...]
    overlap: float = 0.0
    rates: Mapping[str, float] = field(default_factory=dict)
    device: str = "cuda"
    optimizer_launch: float = 0.0
    step_launch: float = 0.0
    gather_overlap: float = 0.0
    convolution_launch: float = 0.0
    channel_block: float = 1.0

    def exposed(self, gather: Any, reduction: Any) -> Any:
        """Returns the seconds of parameter gathers and gradient reductions that computing does not hide."""
        return gather * (1 - self.gather_overlap) + reduction * (1 - self.overlap)

    def peak(self, dtype: str) -> float:
        """Returns the operations per second of a dtype, by its name. One that is not listed counts as its nearest."""
        kind = dtype.partition("_")[0]  # float8_e4m3fn
        for name in (dtype, *_FALLBACK.get(kind, ()), "float32"):
            if name in self.flops:
                return self.flops[name]
        return max(self.flops.values())

    def rate(self, family: str, dtype: str) -> float:
        """Returns the operations per second that an operator family reaches."""
        share = self.efficiency.get(f"{family}_{dtype}", self.efficiency.get(family, self.efficiency.get("default", 1.0)))
        return self.peak(dtype) * share

    def bandwidth_of(self, family: str) -> float:
        """Returns the bytes per second that an operator family reads and writes."""
        return self.rates.get(family, self.memory_bandwidth)

    def level(self, ranks: int, total: int = 0) -> Level:
        """Returns the links among groups of ``ranks`` neighbours, of ``total`` ranks.

        No group may cross a border between nodes.

        >>> from shardwright.cost.machine_files import load_machine
        >>> load_machine("h100").level(6, 24).name, load_machine("h100").level(6, 6).name
        ('network', 'node')
        """

        def holds(level: Level) -> bool:
            return not level.size or level.size % ranks == 0 or max(ranks, total) <= level.size

        return next(filter(holds, self.levels), self.levels[-1])

    def axis_speeds(self, mesh: Mesh) -> list[tuple[float, float]]:
        """Returns latency and bandwidth along every axis: those of the outermost links that its groups reach across.

        >>> from shardwright.cost.machine_files import load_machine
        >>> load_machine("h100").axis_speeds(Mesh(("dp", "tp"), (4, 8)))[1][1] > 1e11
        True
        """
        speeds, span = [], 1
        for size in reversed(mesh.sizes):
            span *= size
            level = self.level(span, mesh.size)
            speeds.append((level.latency, level.bandwidth))
        return speeds[::-1]

    def to_toml(self) -> str:
        """Returns the machine as the text of a file."""
        lines = [f"{key} = {_text(getattr(self, key))}" for key in ("name", "description", "device")]
        for key in ("memory", "memory_bandwidth", *_LAUNCHES, "channel_block", "overlap", "gather_overlap"):
            lines.append(f"{key} = {getattr(self, key)!r}")
        for section in ("flops", "efficiency", "rates"):
            lines += ["", f"[{section}]", *(f"{name} = {float(value)!r}" for name, value in getattr(self, section).items())]
        for level in self.levels:
            lines += ["", "[[levels]]", f"name = {_text(level.name)}", f"size = {level.size}"]
            lines += [f"latency = {level.latency!r}", f"bandwidth = {level.bandwidth!r}"]
        return "\n".join(lines) + "\n"


def _text(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
