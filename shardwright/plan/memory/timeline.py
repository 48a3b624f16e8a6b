"""Memory of one rank over a training step, as a list of points that can be printed and compared."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass

from shardwright.base.text import bytes_text

_MOST_PRINTED = 5  # of the tensors that are kept


@dataclass(frozen=True)
class Point:
    """Bytes in use at most while one operator runs.

    Args:
        phase: ``forward``, ``backward`` or ``optimizer``.
        node: name of the operator in the graph.
        total: bytes.
        parts: bytes of each part: parameters, optimizer, gradients, activations, transient.
    """

    phase: str
    node: str
    total: float
    parts: Mapping[str, float]


@dataclass(frozen=True)
class MemoryTimeline:
    """Bytes that a rank uses over a step, from the second on.

    Args:
        points: in the order of execution.
        largest: what is kept for the backward, the largest first: ``(value, module, bytes)``.
        by_parameter: bytes of each parameter's piece, the largest first: ``(name, bytes)``.
        guessed: operators that could not be simulated, and are assumed to keep all they might.
    """

    points: tuple[Point, ...]
    largest: tuple[tuple[str, str, float], ...] = ()
    by_parameter: tuple[tuple[str, float], ...] = ()
    guessed: tuple[str, ...] = ()

    @property
    def highest(self) -> Point:
        """The point at which most is in use."""
        return max(self.points, key=lambda p: p.total)

    @property
    def peak(self) -> float:
        """Bytes at the highest point."""
        return self.highest.total

    @property
    def at(self) -> tuple[str, str]:
        """Phase and operator of the highest point."""
        return self.highest.phase, self.highest.node

    @property
    def parts(self) -> Mapping[str, float]:
        """Bytes by part at the highest point."""
        return self.highest.parts

    def __str__(self) -> str:
        out = io.StringIO()
        phase, node = self.at
        shares = ", ".join(f"{name} {bytes_text(int(size))}" for name, size in self.parts.items() if size)
        out.write(f"{bytes_text(int(self.peak))} a rank, in the {phase} at {node}: {shares}")
        for value, module, size in self.largest[:_MOST_PRINTED]:
            out.write(f"\n  kept: {value} of {module or 'the model'}, {bytes_text(int(size))}")
        return out.getvalue()
