"""Steps of a redistribution on a list of tensors: the collectives of the simulated world.

A value is a list of tensors, one per rank group; ranks in one group hold the same tensor. Which tensors a step combines, and
which ranks end up with the same, follows from the layouts alone, so it is computed once: :func:`prepare` turns steps
into a list of computations on rank groups. Sums run in the order of the group, first to last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from shardwright.ir.rank_groups import RankGroups
from shardwright.ir.step import Step
from shardwright.redistribute.routes import exchange_routes
from shardwright.world.execute.summation import reduce as _reduced

Values = Sequence[Tensor]
Bounds = tuple[tuple[int, int], ...]
Cuts = tuple[tuple[int, int, int], ...]  # (dim, start, length) of each narrowing
Compute = Callable[[Values], Tensor]


class Prepared:
    """Steps as computations on rank groups.

    Args:
        stages: for every step, the computation of each rank group that it makes.
        lanes: for every rank, its rank group after the last step; -1 where it holds nothing.
    """

    def __init__(self, stages: list[list[Compute]], lanes: RankGroups):
        self.stages, self.rank_groups = stages, lanes

    def __call__(self, values: Values) -> Values:
        for stage in self.stages:
            values = [compute(values) for compute in stage]
        return values


@lru_cache(maxsize=16384)
def prepare(steps: tuple[Step, ...], shape: tuple[int, ...], lanes: RankGroups) -> Prepared:
    """Prepares ``steps`` for values of which rank ``r`` holds rank group ``lanes[r]``, or nothing (-1)."""
    stages = []
    for step in steps:
        keys = _KEYS[step.kind](step, shape, lanes)
        found: dict[Any, int] = {}
        lanes = tuple(-1 if key is None else found.setdefault(key, len(found)) for key in keys)
        stages.append([_COMPUTE[step.kind](step, key) for key in found])
    return Prepared(stages, lanes)


def run_steps(values: Sequence[Any], steps: tuple[Step, ...], shape: tuple[int, ...]) -> list[Any]:
    """Runs every step on ``values[r]``, the value of rank ``r``; ``None`` for ranks outside the mesh."""
    prepared = prepare(steps, shape, tuple(-1 if v is None else r for r, v in enumerate(values)))
    results = prepared(values)
    return [None if lane < 0 else results[lane] for lane in prepared.rank_groups]


# -- keys: for every rank, the sources of its result; equal keys are computed once -----------------------------------------


def _by_rank(step: Step, lanes: RankGroups, of: Callable[[int, list[int]], Any]) -> list[Any]:
    """Returns the key of every rank of a group; ``None`` for those outside the mesh."""
    keys: list[Any] = [None] * len(lanes)
    for group in step.groups:
        for rank in group:
            keys[rank] = of(rank, group)
    return keys


def _group_keys(step: Step, shape: tuple[int, ...], lanes: RankGroups) -> list[Any]:
    return _by_rank(step, lanes, lambda rank, group: tuple(lanes[r] for r in group))


def _slice_keys(step: Step, shape: tuple[int, ...], lanes: RankGroups) -> list[Any]:
    have, want = step.source.bounds(shape), step.target.bounds(shape)
    return [(lanes[rank], _cuts(have[rank], want[rank])) if rank in want else None for rank in range(len(lanes))]


def _all_gather_keys(step: Step, shape: tuple[int, ...], lanes: RankGroups) -> list[Any]:
    have, want = step.source.bounds(shape), step.target.bounds(shape)

    def key(rank: int, group: list[int]) -> Any:
        if len(step.dims) == 1:
            return tuple(lanes[r] for r in group)
        parts = tuple((lanes[r], (), _cuts(want[rank], have[r])) for r in group if _extent(have[r]).count(0) == 0)
        return _extent(want[rank]), parts, lanes[rank]

    return _by_rank(step, lanes, key)


def _reduce_scatter_keys(step: Step, shape: tuple[int, ...], lanes: RankGroups) -> list[Any]:
    have, want = step.source.bounds(shape), step.target.bounds(shape)
    return _by_rank(step, lanes, lambda rank, group: (tuple(lanes[r] for r in group), _cuts(have[rank], want[rank])))


def _all_to_all_keys(step: Step, shape: tuple[int, ...], lanes: RankGroups) -> list[Any]:
    have, want = step.source.bounds(shape), step.target.bounds(shape)
    dim = step.dims[1]

    def key(rank: int, group: list[int]) -> Any:
        (start, stop), base = want[rank][dim], have[rank][dim][0]
        return tuple((lanes[r], start - base, stop - start) for r in group)

    return _by_rank(step, lanes, key)


def _exchange_keys(step: Step, shape: tuple[int, ...], lanes: RankGroups) -> list[Any]:
    have, want = step.source.bounds(shape), step.target.bounds(shape)
    parts: dict[int, list[Any]] = {rank: [] for rank in want}
    for source, target, region in exchange_routes(step.source, step.target, shape):
        parts[target].append((lanes[source], _cuts(have[source], region), _cuts(want[target], region)))
    any_lane = next(lane for lane in lanes if lane >= 0)
    return [(_extent(want[rank]), tuple(parts[rank]), any_lane) if rank in want else None for rank in range(len(lanes))]


def _extent(bounds: Bounds) -> tuple[int, ...]:
    return tuple(b - a for a, b in bounds)


def _cuts(have: Bounds, want: Bounds) -> Cuts:
    """Computes how to narrow the piece ``have`` of a global tensor to its region ``want``."""
    return tuple(
        (dim, min(c - a, b - a), d - c) for dim, ((a, b), (c, d)) in enumerate(zip(have, want, strict=True)) if (a, b) != (c, d)
    )


# -- computations of one rank group ---------------------------------------------------------------------------------------


def _cut(value: Tensor, cuts: Cuts) -> Tensor:
    for dim, start, length in cuts:
        value = value.narrow(dim, start, length)
    return value


def _all_reduce(op: str, key: Any, values: Values) -> Tensor:
    return _reduced([values[i] for i in key], op)


def _all_gather(dims: tuple[int, ...], key: Any, values: Values) -> Tensor:
    if len(dims) > 1:
        return _exchange(key, values)
    return torch.cat([values[i] for i in key], dims[0])


def _slice(key: Any, values: Values) -> Tensor:
    return _cut(values[key[0]], key[1])


def _reduce_scatter(op: str, key: Any, values: Values) -> Tensor:
    group, cuts = key
    return _reduced([_cut(values[i], cuts) for i in group], op)


def _all_to_all(dims: tuple[int, ...], key: Any, values: Values) -> Tensor:
    source, target = dims
    return torch.cat([values[i].narrow(target, min(a, values[i].shape[target]), n) for i, a, n in key], source)


def _exchange(key: Any, values: Values) -> Tensor:
    shape, parts, like = key
    out = values[like].new_empty(shape)
    for source, cuts, place in parts:
        _cut(out, place).copy_(_cut(values[source], cuts))
    return out


_KEYS: dict[str, Callable[[Step, tuple[int, ...], RankGroups], list[Any]]] = {
    "all_reduce": _group_keys,
    "all_gather": _all_gather_keys,
    "slice": _slice_keys,
    "reduce_scatter": _reduce_scatter_keys,
    "all_to_all": _all_to_all_keys,
    "permute": _exchange_keys,
    "exchange": _exchange_keys,
}

_COMPUTE: dict[str, Callable[[Step, Any], Compute]] = {
    "all_reduce": lambda step, key: partial(_all_reduce, step.op, key),
    "all_gather": lambda step, key: partial(_all_gather, step.dims, key),
    "slice": lambda step, key: partial(_slice, key),
    "reduce_scatter": lambda step, key: partial(_reduce_scatter, step.op, key),
    "all_to_all": lambda step, key: partial(_all_to_all, step.dims, key),
    "permute": lambda step, key: partial(_exchange, key),
    "exchange": lambda step, key: partial(_exchange, key),
}
