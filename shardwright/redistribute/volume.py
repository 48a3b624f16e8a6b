"""Volume: elements that each rank holds and lacks, and the lower bound of what a redistribution must move.

Boxes are arrays over all ranks, so that a mesh of thousands of ranks costs microseconds.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.ir.step import TRANSFERS, Step
from shardwright.redistribute.routes import elements, exchange_routes, route_groups

Ints = NDArray[np.int64]
Shape = tuple[int, ...]

_ONE = np.ones(1, np.int64)


@lru_cache(maxsize=1024)
def _coordinates(mesh: Mesh) -> Ints:
    """Returns the index along every axis, ``[axis, position]``."""
    grid = np.indices(mesh.sizes or (1,), dtype=np.int64)
    return grid.reshape(len(mesh.sizes), -1) if mesh.sizes else np.zeros((0, 1), np.int64)


@lru_cache(maxsize=16384)
def _intervals(mesh: Mesh, axes: tuple[str, ...], pieces: tuple[int, ...]) -> tuple[Ints, Ints]:
    """Returns start and stop along one dim at every position of the mesh."""
    index = np.zeros(mesh.size, np.int64)
    for axis in axes:
        index = index * mesh.axis_size(axis) + _coordinates(mesh)[mesh.axes.index(axis)]
    stops = np.cumsum(np.array(pieces, np.int64))
    return (stops - pieces)[index], stops[index]


def boxes(layout: Layout, shape: Shape) -> list[tuple[Ints, Ints]]:
    """Returns, for every dim, start and stop at every position of the mesh. Not to be changed."""
    return [_intervals(layout.mesh, axes, layout.pieces(dim, shape[dim])) for dim, axes in enumerate(layout.bound)]


def held(layout: Layout, shape: Shape) -> Ints:
    """Counts the elements at every position of the mesh."""
    result = np.ones(layout.mesh.size, np.int64)
    for starts, stops in boxes(layout, shape):
        result *= stops - starts
    return result


@lru_cache(maxsize=65536)
def largest(layout: Layout, shape: Shape) -> int:
    """Counts the elements of the largest piece."""
    sizes = layout.sizes
    return math.prod(
        -(-size // layout.mesh.count(axes)) if sizes[dim] is None and len(axes) < 2 else max(layout.pieces(dim, size))
        for dim, (size, axes) in enumerate(zip(shape, layout.bound, strict=True))
    )


def lacked(source: Layout, target: Layout, shape: Shape) -> Ints:
    """Counts the elements of each target piece that its rank lacks. They are in the order of target positions."""
    if source.mesh.ranks == target.mesh.ranks:
        wanted = common = _ONE
        for have, want in zip(boxes(source, shape), boxes(target, shape), strict=True):
            size = want[1] - want[0]
            wanted = wanted * size
            both = size if have is want else np.maximum(np.minimum(have[1], want[1]) - np.maximum(have[0], want[0]), 0)
            common = common * both
        missing = wanted - common
        return missing if len(missing) == target.mesh.size else missing.repeat(target.mesh.size)
    return _lacked_elsewhere(source, target, shape)


def _lacked_elsewhere(source: Layout, target: Layout, shape: Shape) -> Ints:
    """Computes :func:`lacked` where the two are over different ranks, or the same in another order."""
    wanted, overlap = held(target, shape), np.ones(target.mesh.size, np.int64)
    position = {rank: i for i, rank in enumerate(source.mesh.ranks)}
    both = [(i, position[rank]) for i, rank in enumerate(target.mesh.ranks) if rank in position]
    here, there = [i for i, _ in both], [i for _, i in both]
    overlap[[i for i, rank in enumerate(target.mesh.ranks) if rank not in position]] = 0
    for (a, b), (c, d) in zip(boxes(source, shape), boxes(target, shape), strict=True):
        overlap[here] *= np.maximum(np.minimum(b[there], d[here]) - np.maximum(a[there], c[here]), 0)
    return np.asarray(wanted - overlap)


def is_local(source: Layout, target: Layout, shape: Shape) -> bool:
    """Tells whether every rank of the target already holds its piece."""
    if set(source.mesh.ranks) != set(target.mesh.ranks):
        return False
    position = {rank: i for i, rank in enumerate(source.mesh.ranks)}
    there = [position[rank] for rank in target.mesh.ranks]
    pairs = zip(boxes(source, shape), boxes(target, shape), strict=True)
    return all(bool((a[there] <= c).all() and (d <= b[there]).all()) for (a, b), (c, d) in pairs)


def is_even(layout: Layout, shape: Shape) -> bool:
    """Tells whether all pieces have one shape."""
    return all(len(set(layout.pieces(dim, size))) == 1 for dim, size in enumerate(shape))


def lower_bound(source: Layout, target: Layout, shape: Shape) -> int:
    """Counts the elements that all ranks together must receive, whatever the steps.

    Without pending reductions: what each rank lacks. With ``k`` parts to combine, an element costs ``k - 1`` receipts to
    combine and one for every rank that wants it but the one that combined it.

    >>> from shardwright import Layout
    >>> rows, columns = Layout((4,), ("x",))("x", "None"), Layout((4,), ("x",))("None", "x")
    >>> lower_bound(rows, columns, (8, 8)), lower_bound(rows, rows.replicated(rows.mesh, 2), (8, 8))
    (48, 192)
    """
    pending = [a for a in source.partial_axes if a not in target.partial_axes]
    if not pending:
        return int(lacked(source, target, shape).sum())
    parts = source.mesh.count(pending)
    kept = source.mesh.count(target.partial_axes)
    whole = math.prod(shape) * kept
    return whole * (parts - 1) + int(held(target, shape).sum()) - (whole if source.mesh == target.mesh else 0)


def received_elements(step: Step, shape: Shape) -> int:
    """Counts the elements that all ranks together receive in one step, by its collective's bandwidth-optimal algorithm."""
    if not step.communicates:
        return 0
    if step.kind in TRANSFERS or step.kind == "all_gather":
        return int(lacked(step.source, step.target, shape).sum())
    n = step.source.mesh.count(step.axes)
    if step.kind == "reduce_scatter":
        return (n - 1) * int(held(step.target, shape).sum())
    return 2 * (n - 1) * int(held(step.source, shape).sum()) // n


def groups_that_communicate(step: Step, shape: Shape) -> list[list[int]]:
    """Returns the groups of ranks that send to each other in one step; for an exchange, those its routes connect."""
    if step.kind in ("exchange", "permute"):
        return [list(group) for group in route_groups(exchange_routes(step.source, step.target, shape))]
    return step.groups


def sent_elements(step: Step, shape: Shape) -> int:
    """Counts the elements that the busiest rank sends in one step. Its collective's algorithm is the bandwidth-optimal one.

    All-reduce ``2 (n-1)/n`` of the local tensor, all-gather and all-to-all and reduce-scatter ``(n-1)/n`` of the
    larger end, an exchange what its busiest rank must receive or send. Source: Thakur, Rabenseifner and Gropp,
    "Optimization of Collective Communication Operations in MPICH", 2005.
    """
    if not step.communicates:
        return 0
    if step.kind in ("exchange", "permute"):
        sent: dict[int, int] = {}
        for source, target, region in exchange_routes(step.source, step.target, shape):
            if source != target:
                sent[source] = sent.get(source, 0) + elements(region)
        return max(sent.values(), default=0)
    n = step.source.mesh.count(step.axes)
    before = largest(step.source, shape)
    if step.kind == "all_reduce":
        return -(-2 * (n - 1) * before // n)
    larger = largest(step.target, shape) if step.kind == "all_gather" else before
    return -(-(n - 1) * larger // n)


def peak_elements(steps: tuple[Step, ...], shape: Shape) -> int:
    """Counts the elements of the largest local tensor between two steps, over all ranks; 0 without steps."""
    return max((largest(layout, shape) for step in steps for layout in (step.source, step.target)), default=0)
