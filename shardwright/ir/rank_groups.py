"""Rank groups: ranks that hold the same tensor.

A partition of the ranks, written as one number per rank, by first appearance; a group of ranks is called a lane for short.
It is the type of a local value: what varies along an axis is in different lanes there. The partitioner checks it (a value
may not vary where its layout says that ranks replicate), which is the proof that no reduction was forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh

RankGroups = tuple[int, ...]


def number(keys: Sequence[Any]) -> RankGroups:
    """Numbers equal keys equally, by first appearance.

    >>> number(["b", "a", "b"])
    (0, 1, 0)
    """
    known: dict[Any, int] = {}
    return tuple(known.setdefault(key, len(known)) for key in keys)


@lru_cache(maxsize=4096)
def of_axes(mesh: Mesh, axes: frozenset[str]) -> RankGroups:
    """Returns the rank groups, indexed by rank, that share a place on ``axes``."""
    keys: list[Any] = [None] * mesh.size
    for rank in mesh.ranks:
        coords = mesh.coordinates(rank)
        keys[rank] = tuple(coords[a] for a in mesh.axes if a in axes)
    return number(keys)


def of_layout(layout: Layout, also: Sequence[str] = ()) -> RankGroups:
    """Returns the rank groups of a tensor in a layout. Along the axes in ``also`` ranks are in different groups too."""
    return of_axes(layout.mesh, frozenset((*layout.split_axes, *layout.partial_axes, *also)))


@lru_cache(maxsize=65536)
def join(*lanes: RankGroups) -> RankGroups:
    """Returns the rank groups of ranks that share a group in every argument."""
    return lanes[0] if len(set(lanes)) == 1 else number(list(zip(*lanes, strict=True)))


@lru_cache(maxsize=65536)
def varies_only_with(lanes: RankGroups, allowed: RankGroups) -> bool:
    """Tells whether ranks that share a lane in ``allowed`` share one in ``lanes``."""
    seen: dict[int, int] = {}
    return all(seen.setdefault(a, own) == own for own, a in zip(lanes, allowed, strict=True))
