"""Moves of several tensors that travel in one message."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shardwright.ir.step import Step
from shardwright.world.distributed.groups import Groups
from shardwright.world.distributed.operations import Handle, Operation
from shardwright.world.distributed.places import Shape, _pack_for_members, _Place, _unpack_gathered


def prepare_shared(
    steps: Sequence[Sequence[Step]], shapes: Sequence[Shape], rank: int, groups: Groups, views: bool = False
) -> SharedRunner:
    """Prepares the steps of several tensors over the same axes, each kind as one collective.

    Args:
        steps: the steps of each tensor: all-reduces, or all-gathers or reduce-scatters between pieces of one size.
        shapes: global shapes.
        rank: the rank it runs on.
        groups: the process groups.
        views: whether results may share one tensor's memory; they then live no longer than each other.

    Returns:
        A function of the local tensors to the resulting ones, that may be started now and ended later.
    """
    stages = [_shared(list(at), shapes, rank, groups, views) for at in zip(*steps, strict=True)]
    return SharedRunner(stages)


def _shared(steps: Sequence[Step], shapes: Sequence[Shape], rank: int, groups: Groups, views: bool) -> _SharedStage:
    places = [_Place(step, shape, rank, groups) for step, shape in zip(steps, shapes, strict=True)]
    at, link = places[0], places[0].link
    own, n = [math.prod(place.local) for place in places], places[0].link.size
    if at.step.kind == "all_reduce":
        locals_ = [place.local for place in places]
        return _SharedStage(
            lambda values: torch.cat([v.reshape(-1) for v in values]),
            link.prepare_all_reduce(sum(own), at.step.op, at.order, inplace=True),
            lambda flat: _cut_up(flat, locals_, views),
        )
    if at.step.kind == "all_gather":
        finish = [_unpack_gathered(place) for place in places]

        def unpack(flat: Tensor) -> list[Tensor]:
            return [f(part.reshape(-1)) for f, part in zip(finish, flat.view(n, -1).split(own, 1), strict=True)]

        gather = link.prepare_all_gather([sum(own)] * n)
        return _SharedStage(lambda values: torch.cat([v.reshape(-1) for v in values]), gather, unpack)
    packs = [_pack_for_members(place, place.step.dims[0])[0] for place in places]
    results = [place.result for place in places]
    return _SharedStage(
        lambda values: torch.cat([pack(v).view(n, -1) for pack, v in zip(packs, values, strict=True)], 1).view(-1),
        link.prepare_reduce_scatter([sum(map(math.prod, results))] * n, at.step.op, at.order),
        lambda flat: _cut_up(flat, results, views),
    )


def _cut_up(flat: Tensor, shapes: Sequence[Shape], views: bool) -> list[Tensor]:
    """Cuts a flat tensor into tensors of these shapes, copied unless ``views`` are good enough."""
    parts = flat.split([math.prod(s) for s in shapes])
    return [(part if views else part.clone()).view(shape) for part, shape in zip(parts, shapes, strict=True)]


class _SharedStage(NamedTuple):
    """One collective of many tensors, with functions that pack its argument and unpack its result."""

    pack: Callable[[Sequence[Tensor]], Tensor]
    operation: Operation
    unpack: Callable[[Tensor], list[Tensor]]

    def __call__(self, values: Sequence[Tensor]) -> list[Tensor]:
        return self.unpack(self.operation(self.pack(values)))


class SharedRunner:
    """Collectives of many tensors, one after the other."""

    def __init__(self, stages: Sequence[_SharedStage]):
        self.stages = stages

    def __call__(self, values: Sequence[Tensor]) -> list[Tensor]:
        for stage in self.stages:
            values = stage(values)
        return list(values)

    def start(self, values: Sequence[Tensor]) -> SharedUnderWay:
        """Starts the first collective; the others follow when it is waited for."""
        if not self.stages:
            return SharedUnderWay((), None, list(values))
        stage = self.stages[0]
        return SharedUnderWay(self.stages, stage.operation.start(stage.pack(values)), None)


class SharedUnderWay:
    """Started collectives of many tensors; :meth:`wait` ends them."""

    def __init__(self, stages: Sequence[_SharedStage], under_way: Handle | None, results: list[Tensor] | None):
        self.stages, self.under_way, self.results = stages, under_way, results

    def wait(self) -> list[Tensor]:
        if self.results is None:
            assert self.under_way is not None
            self.results = self.stages[0].unpack(self.under_way.wait())
            self.under_way = None
            for stage in self.stages[1:]:
                self.results = stage(self.results)
        return self.results
