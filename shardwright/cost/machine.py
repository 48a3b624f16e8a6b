"""Machine: what devices compute, how fast they talk and how much they hold; read from TOML files."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from shardwright.errors import ShardwrightError
from shardwright.mesh import Mesh
from shardwright.redistribute.links import Links

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found]

PRESETS = Path(__file__).parent / "machines"
VARIABLE = "SHARDWRIGHT_MACHINE"

# Where a dtype has no rate of its own, that of the first of these that has; then float32's.
_FALLBACK = {"bfloat16": ("float16",), "float16": ("bfloat16",), "float8": ("float8", "bfloat16", "float16")}


_LAUNCHES = ("operator_launch", "convolution_launch", "collective_launch", "optimizer_launch", "step_launch")


@dataclass(frozen=True)
class Level:
    """Links among up to ``size`` ranks; 0: any number.

    Args:
        latency: seconds a message.
        bandwidth: bytes a second that a rank sends, and as many that it receives, when all do.
    """

    name: str
    size: int
    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Machine:
    """The devices of a cluster, all alike.

    Args:
        flops: peak operations a second, by dtype name.
        efficiency: share of the peak that is reached, by operator family; ``default`` for the others. A family's in one dtype
            may stand apart, ``conv_bfloat16``.
        memory: bytes a device holds; 0: not limited.
        memory_bandwidth: bytes a second that a device reads and writes in its memory.
        operator_launch, collective_launch: seconds it takes to start one.
        levels: links, the innermost first; ranks that are neighbours are on the innermost.
        overlap: share of gradient reductions that hides behind computing; ``gather_overlap``: of parameter gathers.
        rates: bytes a second of operator families that memory bandwidth alone does not explain.
        device: the kind of device as PyTorch names it, ``cpu``, ``cuda`` or ``npu``.
        optimizer_launch: seconds that updating a parameter takes besides its bytes; ``step_launch``: that a step takes.
            The presets of accelerators have none: their optimizers update all parameters together.
        convolution_launch: seconds that a convolution takes besides, where its filters are more than a point.
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
        """Seconds of a parameter's gather and of its gradient's reduction, numbers or arrays, that do not hide."""
        return gather * (1 - self.gather_overlap) + reduction * (1 - self.overlap)

    def peak(self, dtype: str) -> float:
        """Operations a second of a dtype, by its name; one that is not listed counts as its nearest."""
        kind = dtype.partition("_")[0]  # float8_e4m3fn
        for name in (dtype, *_FALLBACK.get(kind, ()), "float32"):
            if name in self.flops:
                return self.flops[name]
        return max(self.flops.values())

    def rate(self, family: str, dtype: str) -> float:
        """Operations a second that an operator family reaches."""
        share = self.efficiency.get(f"{family}_{dtype}", self.efficiency.get(family, self.efficiency.get("default", 1.0)))
        return self.peak(dtype) * share

    def bandwidth_of(self, family: str) -> float:
        """Bytes a second that an operator family reads and writes."""
        return self.rates.get(family, self.memory_bandwidth)

    def level(self, ranks: int, total: int = 0) -> Level:
        """The links among groups of ``ranks`` neighbours, of ``total`` ranks; a group may not cross a border between nodes.

        >>> load_machine("h100").level(6, 24).name, load_machine("h100").level(6, 6).name
        ('network', 'node')
        """

        def holds(level: Level) -> bool:
            return not level.size or level.size % ranks == 0 or max(ranks, total) <= level.size

        return next(filter(holds, self.levels), self.levels[-1])

    def axis_speeds(self, mesh: Mesh) -> list[tuple[float, float]]:
        """Latency and bandwidth along every axis: of the outermost links that its groups reach across.

        >>> load_machine("h100").axis_speeds(Mesh(("dp", "tp"), (4, 8)))[1][1] > 1e11
        True
        """
        speeds, span = [], 1
        for size in reversed(mesh.sizes):
            span *= size
            level = self.level(span, mesh.size)
            speeds.append((level.latency, level.bandwidth))
        return speeds[::-1]

    def links(self, mesh: Mesh) -> Links:
        """The same for the planner of redistributions."""
        speeds = self.axis_speeds(mesh)
        axes = tuple((axis, latency, bandwidth) for axis, (latency, bandwidth) in zip(mesh.axes, speeds, strict=True))
        slowest = self.levels[-1]
        return Links(self.collective_launch, slowest.latency, slowest.bandwidth, axes)

    def to_toml(self) -> str:
        """The machine as the text of a file."""
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


def machines() -> tuple[str, ...]:
    """The names of the machines that come with the package."""
    return tuple(sorted(path.stem for path in PRESETS.glob("*.toml")))


def calibrated() -> Path:
    """Where this user's measured ``cpu-gloo`` is kept."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "shardwright" / "cpu-gloo.toml"


def load_machine(machine: Machine | str | Path) -> Machine:
    """A machine by the name of a preset, or from a TOML file.

    ``cpu-gloo`` is what ``shardwright calibrate`` measured here, where it did. ``SHARDWRIGHT_MACHINE`` names a file that
    takes its place.

    Raises:
        ShardwrightError: no such machine, or a file that describes none.

    >>> load_machine("h100").levels[0].size
    8
    """
    if isinstance(machine, Machine):
        return machine
    if machine == "cpu-gloo":
        chosen = os.environ.get(VARIABLE)
        if chosen:
            return _read(Path(chosen))
        if calibrated().is_file():
            return _read(calibrated())
    preset = PRESETS / f"{machine}.toml"
    if preset.is_file():
        return _preset(str(machine))
    path = Path(machine)
    if path.suffix == ".toml":
        return _read(path)
    raise ShardwrightError(f"machine {str(machine)!r} is not known: use {', '.join(machines())}, or the path of a .toml file")


@cache
def _preset(name: str) -> Machine:
    return _read(PRESETS / f"{name}.toml")


def _read(path: Path) -> Machine:
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ShardwrightError(f"there is no machine file {path}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ShardwrightError(f"the machine file {path} cannot be read: {error}") from None
    return _checked(values, path)


def _checked(values: dict[str, Any], path: Path) -> Machine:
    def number(table: Mapping[str, Any], key: str, where: str = "", default: float | None = None) -> float:
        value = table.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ShardwrightError(f"{path}: {where}{key} is {value!r}; give a number from 0, in bytes, seconds or a second")
        if value == 0 and (where in ("flops.", "efficiency.", "rates.") or key.endswith("bandwidth")):
            raise ShardwrightError(f"{path}: {where}{key} is 0; give what is reached in a second, or leave the line out")
        return float(value)

    def table(key: str, needed: bool) -> dict[str, float]:
        found = values.get(key, {})
        if not isinstance(found, dict) or (needed and not found):
            raise ShardwrightError(f"{path}: [{key}] is missing; list at least one number in it")
        return {name: number(found, name, f"{key}.") for name in found}

    known = {"name", "description", "device", "flops", "efficiency", "rates", "memory", "memory_bandwidth", *_LAUNCHES,
             "levels", "channel_block", "overlap", "gather_overlap"}  # fmt: skip
    unknown = sorted(set(values) - known)
    if unknown:
        raise ShardwrightError(f"{path}: {unknown[0]} is not a key of a machine; the keys are {', '.join(sorted(known))}")
    levels = values.get("levels")
    if not isinstance(levels, list) or not levels:
        raise ShardwrightError(f"{path}: [[levels]] is missing; describe the links, the innermost first")
    if not all(isinstance(level, dict) for level in levels):
        raise ShardwrightError(f"{path}: levels are not tables; write each as [[levels]], then size, latency and bandwidth")
    made = tuple(
        Level(
            str(level.get("name", f"level {i}")), int(number(level, "size", f"levels[{i}].", 0)),
            number(level, "latency", f"levels[{i}]."), number(level, "bandwidth", f"levels[{i}]."),
        )
        for i, level in enumerate(levels)
    )  # fmt: skip
    sizes = [level.size or math.inf for level in made]
    if sizes != sorted(set(sizes)):
        raise ShardwrightError(
            f"{path}: levels have the sizes {[level.size for level in made]}; list the innermost first, each larger than the "
            "one before, the last with size 0 for any number of ranks"
        )
    return Machine(
        str(values.get("name", path.stem)), str(values.get("description", "")), table("flops", True),
        table("efficiency", False), number(values, "memory", default=0.0), number(values, "memory_bandwidth"),
        number(values, "operator_launch", default=0.0), number(values, "collective_launch", default=0.0), made,
        min(1.0, number(values, "overlap", default=0.0)), table("rates", False), str(values.get("device", "cuda")),
        number(values, "optimizer_launch", default=0.0), number(values, "step_launch", default=0.0),
        min(1.0, number(values, "gather_overlap", default=number(values, "overlap", default=0.0))),
        number(values, "convolution_launch", default=0.0), max(1.0, number(values, "channel_block", default=1.0)),
    )  # fmt: skip
