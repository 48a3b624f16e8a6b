"""Moves pieces of a value between the ranks of two stages, in the simulated world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.ir.rank_groups import RankGroups
from shardwright.redistribute.steps import steps_between
from shardwright.world.simulated.steps import prepare


@dataclass(frozen=True)
class Held:
    """Placement of a value on the ranks of a stage.

    Args:
        layout: over the stage's own ranks, which count from 0.
        groups: the rank group of each of them.
        first_rank: the number of the first of them in the world.
    """

    layout: Layout
    groups: RankGroups
    first_rank: int

    def in_world(self, gradient: bool = False) -> Layout:
        """Returns the layout over the world's ranks; of the gradient, which has no pending sums."""
        layout = shifted(self.layout, self.first_rank)
        return layout.without_partial() if gradient else layout


@lru_cache(maxsize=4096)
def shifted(layout: Layout, by: int) -> Layout:
    """Returns a layout over ranks whose numbers are higher by ``by``."""
    mesh = layout.mesh
    moved = Mesh(mesh.axes, mesh.sizes, tuple(rank + by for rank in mesh.ranks))
    return Layout.of(moved, layout.bound, layout.partial, layout.sizes)


def cross(pieces: Sequence[Tensor], source: Held, target: Held, shape: tuple[int, ...], gradient: bool = False) -> list[Tensor]:
    """Moves a value, or a gradient, from the ranks of a stage to those of another one.

    Args:
        pieces: one per rank group of ``source``.
        source, target: how the two hold it.
        shape: global shape.
        gradient: whether it is a gradient; then no sum is pending.

    Returns:
        One piece per rank group of ``target``.
    """
    before, after = source.in_world(gradient), target.in_world(gradient)
    steps = steps_between(before, after.without_partial(), shape)
    last = max(source.first_rank + len(source.groups), target.first_rank + len(target.groups))
    lanes = [-1] * last
    lanes[source.first_rank : source.first_rank + len(source.groups)] = source.groups
    prepared = prepare(steps, shape, tuple(lanes))
    moved = prepared(pieces)
    groups = prepared.rank_groups[target.first_rank : target.first_rank + len(target.groups)]
    found: dict[int, Tensor] = {}
    for rank, group in enumerate(target.groups):
        found.setdefault(group, moved[groups[rank]])
    return [found[group] for group in range(len(found))]


def add_pieces(found: dict[str, list[Tensor]], name: str, pieces: list[Tensor]) -> None:
    """Adds the pieces of one more gradient of a value."""
    found[name] = [a + b for a, b in zip(found[name], pieces, strict=True)] if name in found else pieces
