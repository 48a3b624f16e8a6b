"""Rank groups: ranks that hold the same tensor.

Rank groups are a partition of the ranks, written as one group number per rank, numbered by first appearance. They are the
type of a local value: where it varies along an axis, ranks are in different groups. The partitioner checks that a value does
not vary where its layout says that ranks replicate, which proves that no reduction was forgotten.
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
def join(*groups: RankGroups) -> RankGroups:
    """Returns the rank groups of ranks that share a group in every argument."""
    return groups[0] if len(set(groups)) == 1 else number(list(zip(*groups, strict=True)))


@lru_cache(maxsize=65536)
def varies_only_with(groups: RankGroups, allowed: RankGroups) -> bool:
    """Tells whether ranks that share a group in ``allowed`` share one in ``groups``."""
    seen: dict[int, int] = {}
    return all(seen.setdefault(a, own) == own for own, a in zip(groups, allowed, strict=True))
