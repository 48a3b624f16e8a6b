"""One step of a redistribution: a collective over some axes of a mesh, or a local slice.

A step carries the layouts before and after it, from which an executor computes every rank's bounds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from shardwright.ir.layout import Layout

# Kinds that move pieces between ranks without combining them. Each rank receives what it lacks and nothing else.
TRANSFERS = frozenset({"all_to_all", "permute", "exchange"})


@dataclass(frozen=True)
class Step:
    """One step of a redistribution.

    Args:
        kind: ``slice`` (local), ``all_gather``, ``all_to_all``, ``permute`` (every rank sends its piece to one rank),
            ``exchange`` (every rank gets what it lacks), ``reduce_scatter`` or ``all_reduce``.
        axes: mesh axes the step communicates over, most significant first; empty for ``exchange`` and ``permute``.
        source: layout before the step.
        target: layout after it; over other ranks than ``source`` only for ``slice``, ``exchange`` and ``permute``.
        dims: the dims it changes: one or more for gather, slice and reduce-scatter, ``(from, to)`` for all-to-all.
        op: ``sum``, ``max`` or ``min``, for the two kinds that reduce.
    """

    kind: str
    axes: tuple[str, ...]
    source: Layout
    target: Layout
    dims: tuple[int, ...] = ()
    op: str = "sum"

    @property
    def communicates(self) -> bool:
        """True if ranks send each other anything."""
        return self.kind != "slice"

    @property
    def groups(self) -> list[list[int]]:
        """The groups of ranks that communicate, each in the order of ``axes``."""
        if self.kind in ("exchange", "permute"):
            return [sorted({*self.source.mesh.ranks, *self.target.mesh.ranks})]
        return self.source.mesh.groups(self.axes)

    def __str__(self) -> str:
        if self.kind in ("exchange", "permute") or self.source.mesh != self.target.mesh:
            return f"{self.kind}({self.source.short()} -> {self.target.short()})"
        if self.kind == "all_to_all":
            return f"all_to_all({','.join(self.axes)}, dim {self.dims[0]}->{self.dims[1]})"
        dims = f", {'dim' if len(self.dims) == 1 else 'dims'} {','.join(map(str, self.dims))}" if self.dims else ""
        return f"{self.kind}({','.join(self.axes)}{dims})"


def any_communicates(steps: Iterable[Step]) -> bool:
    """Tells whether ranks send each other anything in some of these steps."""
    return any(step.communicates for step in steps)
