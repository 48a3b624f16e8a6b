"""Routes: pairs of ranks and the regions they send, when every rank gets exactly what it lacks."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache

from shardwright.ir.layout import Layout

Interval = tuple[int, int]
Region = tuple[Interval, ...]
Route = tuple[int, int, Region]
Part = tuple[int, ...]


def extent(region: Region) -> tuple[int, ...]:
    """Returns the shape of a region.

    >>> extent(((2, 5), (0, 4)))
    (3, 4)
    """
    return tuple(b - a for a, b in region)


def elements(region: Region) -> int:
    """Returns the number of elements of a region."""
    return math.prod(b - a for a, b in region)


def common_prefix(a: Sequence[object], b: Sequence[object]) -> int:
    """Counts the leading entries that two sequences share.

    >>> common_prefix(("dp", "sp", "tp"), ("dp", "tp"))
    1
    """
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


@lru_cache(maxsize=4096)
def exchange_routes(source: Layout, target: Layout, shape: tuple[int, ...]) -> tuple[Route, ...]:
    """Lists the routes of an exchange in a fixed order. Each is ``(from rank, to rank, region of the global tensor)``.

    A rank keeps what it has (a route to itself). What it lacks comes from one of the ranks that hold it: of the nearest
    (those that share the most leading coordinates of the mesh), the one that sends least so far. Regions of a target
    rank do not overlap and cover its piece. The two layouts may be over different ranks.
    """
    have, want = source.bounds(shape), target.bounds(shape)
    part = _parts(source)  # ranks with different parts of a pending sum hold different values
    holders: dict[tuple[Part, Region], list[int]] = {}
    for rank, bounds in have.items():
        holders.setdefault((part[rank], bounds), []).append(rank)
    grid = [_Grid(sorted({bounds[dim] for bounds in have.values()})) for dim in range(len(shape))]
    load = dict.fromkeys(have, 0)
    distance = _Distance(source)
    order = {rank: i for i, rank in enumerate(target.mesh.ranks)}
    routes: list[Route] = []
    for rank, bounds in want.items():
        if any(a == b for a, b in bounds):
            continue
        for piece in itertools.product(*(g.overlapping(*b) for g, b in zip(grid, bounds, strict=True))):
            region = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(bounds, piece, strict=True))
            ranks = holders[part.get(rank, ()), piece]
            if rank in have and have[rank] == piece:
                chosen = rank
            elif len(ranks) == 1:
                chosen = ranks[0]
            else:
                at, n = order[rank], len(ranks)
                chosen = min(range(n), key=lambda i: (distance(ranks[i], rank), load[ranks[i]], (i - at) % n))
                chosen = ranks[chosen]
            if chosen != rank:
                load[chosen] += elements(region)
            routes.append((chosen, rank, region))
    return tuple(routes)


def route_groups(routes: tuple[Route, ...]) -> tuple[tuple[int, ...], ...]:
    """Returns the sets of ranks that routes connect, each ascending. Ranks that neither send nor receive are in none.

    >>> route_groups(((0, 1, ()), (1, 2, ()), (3, 3, ()), (5, 4, ())))
    ((0, 1, 2), (4, 5))
    """
    leader: dict[int, int] = {}

    def find(rank: int) -> int:
        while leader.setdefault(rank, rank) != rank:
            rank = leader[rank]
        return rank

    for source, target, _ in routes:
        if source != target:
            a, b = find(source), find(target)
            leader[max(a, b)] = min(a, b)
    groups: dict[int, list[int]] = {}
    for rank in sorted(leader):
        groups.setdefault(find(rank), []).append(rank)
    return tuple(tuple(group) for group in groups.values())


def _parts(layout: Layout) -> dict[int, Part]:
    """Returns the part of the pending reductions that each rank holds; the same for all if none is pending."""
    if not layout.partial:
        return dict.fromkeys(layout.mesh.ranks, ())
    return {r: tuple(layout.mesh.coordinates(r)[a] for a in layout.partial_axes) for r in layout.mesh.ranks}


class _Grid:
    """Finds the pieces along one dim that overlap a given interval."""

    def __init__(self, intervals: list[Interval]):
        self.intervals = [i for i in intervals if i[0] < i[1]]
        self.starts = [a for a, _ in self.intervals]
        self.stops = [b for _, b in self.intervals]

    def overlapping(self, start: int, stop: int) -> list[Interval]:
        return self.intervals[bisect_right(self.stops, start) : bisect_left(self.starts, stop)]


class _Distance:
    """Measures how far apart two ranks of one mesh are: the number of axes from the first in which they differ.

    The outer axes of a device matrix span the slower links.
    """

    def __init__(self, layout: Layout):
        mesh = layout.mesh
        self.at = {rank: tuple(mesh.coordinates(rank).values()) for rank in mesh.ranks}

    def __call__(self, a: int, b: int) -> int:
        here, there = self.at.get(a), self.at.get(b)
        if here is None or there is None:
            return 0
        return len(here) - common_prefix(here, there)
