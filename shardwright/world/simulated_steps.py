"""The steps of a redistribution on a list of tensors, one a rank: the collectives of the simulated world.

Ranks that hold the same tensor object are computed once. Sums run in the order of the group, first to last.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shardwright.redistribute.steps import Step, exchange_routes

Values = list[Tensor]
Bounds = dict[int, tuple[tuple[int, int], ...]]


def run_steps(values: Values, steps: tuple[Step, ...], shape: tuple[int, ...]) -> Values:
    """The values after every step; ``values[r]`` is what rank ``r`` holds."""
    for step in steps:
        values = _EXECUTORS[step.kind](values, step, shape)
    return values


def _reduce(parts: list[Tensor], op: str) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    if op == "sum":
        total = parts[0] + parts[1]
        for part in parts[2:]:
            total += part
        return total
    combine = torch.maximum if op == "max" else torch.minimum
    total = combine(parts[0], parts[1])
    for part in parts[2:]:
        total = combine(total, part)
    return total


def _all_reduce(values: Values, step: Step, shape: tuple[int, ...]) -> Values:
    return _once_a_group(values, step, lambda parts: _reduce(parts, step.op))


def _all_gather(values: Values, step: Step, shape: tuple[int, ...]) -> Values:
    return _once_a_group(values, step, lambda parts: torch.cat(parts, step.dims[0]))


def _once_a_group(values: Values, step: Step, combine: Callable[[list[Tensor]], Tensor]) -> Values:
    result = list(values)
    known: dict[tuple[int, ...], Tensor] = {}
    for group in step.source.mesh.groups(step.axes):
        parts = [values[r] for r in group]
        key = tuple(map(id, parts))
        if key not in known:
            known[key] = combine(parts)
        for rank in group:
            result[rank] = known[key]
    return result


def _inner(value: Tensor, have: tuple[tuple[int, int], ...], want: tuple[tuple[int, int], ...]) -> Tensor:
    """The region ``want`` of the global tensor, out of the piece ``have`` that ``value`` is."""
    for dim, ((a, b), (c, d)) in enumerate(zip(have, want, strict=True)):
        if (a, b) != (c, d):
            value = value.narrow(dim, min(c - a, b - a), d - c)
    return value


def _slice(values: Values, step: Step, shape: tuple[int, ...]) -> Values:
    have, want = step.source.bounds(shape), step.target.bounds(shape)
    known: dict[tuple[int, tuple[tuple[int, int], ...]], Tensor] = {}
    result = list(values)
    for rank in step.source.mesh.ranks:
        key = (id(values[rank]), want[rank])
        if key not in known:
            known[key] = _inner(values[rank], have[rank], want[rank])
        result[rank] = known[key]
    return result


def _reduce_scatter(values: Values, step: Step, shape: tuple[int, ...]) -> Values:
    reduced = _all_reduce(values, step, shape)
    return _slice(reduced, step, shape)


def _all_to_all(values: Values, step: Step, shape: tuple[int, ...]) -> Values:
    have, want = step.source.bounds(shape), step.target.bounds(shape)
    source_dim, target_dim = step.dims
    known: dict[tuple[object, ...], Tensor] = {}
    result = list(values)
    for group in step.source.mesh.groups(step.axes):
        ids = tuple(id(values[r]) for r in group)
        for rank in group:
            a, b = want[rank][target_dim]
            start = have[rank][target_dim][0]
            key = (ids, a - start, b - start)
            if key not in known:
                parts = [values[r].narrow(target_dim, min(a - start, values[r].shape[target_dim]), b - a) for r in group]
                known[key] = torch.cat(parts, source_dim)
            result[rank] = known[key]
    return result


def _exchange(values: Values, step: Step, shape: tuple[int, ...]) -> Values:
    have, want = step.source.bounds(shape), step.target.bounds(shape)
    routes: dict[int, list[tuple[int, tuple[tuple[int, int], ...]]]] = {}
    for source, target, region in exchange_routes(step.source, step.target, shape):
        routes.setdefault(target, []).append((source, region))
    known: dict[tuple[object, ...], Tensor] = {}
    result = list(values)
    for rank in step.target.mesh.ranks:
        parts = routes.get(rank, [])
        key = (want[rank], tuple((id(values[source]), region) for source, region in parts))
        if key not in known:
            out = values[rank].new_empty([b - a for a, b in want[rank]])
            for source, region in parts:
                _inner(out, want[rank], region).copy_(_inner(values[source], have[source], region))
            known[key] = out
        result[rank] = known[key]
    return result


_EXECUTORS: dict[str, Callable[[Values, Step, tuple[int, ...]], Values]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "slice": _slice,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "exchange": _exchange,
}
