"""Links: prices a step in seconds, by the axes it runs over.

The model is Hockney's plus a launch: ``launch + messages * latency + bytes / bandwidth``, for the busiest rank.
Gathers and reductions take ``log2 n`` messages (recursive doubling and halving), an exchange takes one per other rank.
Sources: Hockney, "The communication challenge for MPP: Intel Paragon and Meiko CS-2", 1994; Thakur, Rabenseifner and
Gropp, "Optimization of Collective Communication Operations in MPICH", 2005.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from shardwright.ir.layout import Layout
from shardwright.ir.machine import Machine
from shardwright.ir.mesh import Mesh
from shardwright.ir.step import TRANSFERS, Step
from shardwright.redistribute.routes import common_prefix
from shardwright.redistribute.volume import held, lacked, largest, sent_elements

Speed = tuple[float, float]


@dataclass(frozen=True)
class Links:
    """Speeds of the links between ranks.

    Args:
        launch: seconds to start any collective.
        latency: seconds per message, for axes that ``axes`` does not list.
        bandwidth: bytes per second that a rank sends and receives, for axes that ``axes`` does not list.
        axes: ``(axis, latency, bandwidth)`` for each axis with other links; a step over several axes has the worst of each.

    The defaults are those of ranks on one host that exchange data through its memory.

    >>> links = Links(axes=(("node", 10e-6, 25e9), ("gpu", 2e-6, 300e9)))
    >>> links.speed(("node", "gpu"))
    (1e-05, 25000000000.0)
    """

    launch: float = 50e-6
    latency: float = 10e-6
    bandwidth: float = 2e9
    axes: tuple[tuple[str, float, float], ...] = ()

    def speed(self, axes: Iterable[str]) -> Speed:
        """Returns the latency and bandwidth of a step over ``axes``."""
        default = (self.latency, self.bandwidth)
        if not self.axes:
            return default
        known = {axis: (latency, bandwidth) for axis, latency, bandwidth in self.axes}
        speeds = [known.get(axis, default) for axis in axes] or [default]
        return max(latency for latency, _ in speeds), min(bandwidth for _, bandwidth in speeds)

    def seconds(self, step: Step, shape: tuple[int, ...], itemsize: int = 4) -> float:
        """Prices one step, by the fastest algorithm of its collective."""
        if not step.communicates:
            return 0.0
        if step.kind in TRANSFERS:
            return self._transfer(step, shape, itemsize)
        n = step.source.mesh.count(step.axes)
        rounds = (n - 1).bit_length()
        latency, bandwidth = self.speed(step.axes)
        before = largest(step.source, shape) * itemsize / bandwidth
        if step.kind == "all_gather":
            received = (largest(step.target, shape) - int(held(step.source, shape).min())) * itemsize / bandwidth
            return self.launch + rounds * latency + received
        if step.kind == "reduce_scatter":
            return self.launch + rounds * latency + before * (n - 1) / n
        doubling = self.launch + rounds * (latency + before)
        in_two = self.launch + 2 * rounds * latency + 2 * before * (n - 1) / n
        return min(doubling, in_two)

    def _transfer(self, step: Step, shape: tuple[int, ...], itemsize: int) -> float:
        source, target = step.source, step.target
        moving = moving_axes(source, target) if source.mesh == target.mesh else source.mesh.axes
        latency, bandwidth = self.speed(moving)
        busiest = int(lacked(source, target, shape).max(initial=0))
        if source.mesh != target.mesh or any(source.sizes) or any(target.sizes):
            busiest = max(busiest, sent_elements(step, shape))
        messages = 1 if step.kind == "permute" else max(1, source.mesh.count(moving) - 1)
        return self.launch + messages * latency + busiest * itemsize / bandwidth


def moving_axes(source: Layout, target: Layout) -> tuple[str, ...]:
    """Returns the axes of the source along which pieces move: those that the target does not have in the same place."""
    found: list[str] = []
    for now, then in zip(source.bound, target.bound, strict=True):
        found += now[common_prefix(now, then) :]
    return tuple(found)


def machine_links(machine: Machine, mesh: Mesh) -> Links:
    """Returns the links along the axes of ``mesh`` on ``machine``."""
    speeds = machine.axis_speeds(mesh)
    axes = tuple((axis, latency, bandwidth) for axis, (latency, bandwidth) in zip(mesh.axes, speeds, strict=True))
    slowest = machine.levels[-1]
    return Links(machine.collective_launch, slowest.latency, slowest.bandwidth, axes)
