"""Computes where received pieces go in the tensor that they make up."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from shardwright.errors import WorldError
from shardwright.ir.step import Step
from shardwright.world.distributed.groups import Groups
from shardwright.world.distributed.links import Link
from shardwright.world.distributed.transfer import cutter

Local = Callable[[Tensor], Tensor]
Shape = tuple[int, ...]
Bounds = tuple[tuple[int, int], ...]


class _Place:
    """A step as one rank sees it: who takes part, and what each of them holds before and after."""

    def __init__(self, step: Step, shape: Shape, rank: int, groups: Groups):
        self.step, self.shape, self.rank, self.groups = step, shape, rank, groups
        self.have, self.want = step.source.bounds(shape), step.target.bounds(shape)
        moves = step.kind in ("exchange", "permute")  # between sets of ranks that need not be the same
        if (rank not in self.have and rank not in self.want) or not (moves or (rank in self.have and rank in self.want)):
            raise WorldError(f"rank {rank} takes no part in {step}: its mesh has ranks {sorted(self.have)}")
        self.members: list[int] = next(g for g in step.groups if rank in g)
        self.sorted_members = sorted(self.members)
        # position in torch's order of the first, second, ... member in the step's order
        self.order = [self.sorted_members.index(m) for m in self.members]
        self.is_sorted = self.members == self.sorted_members

    @property
    def link(self) -> Link:
        return self.groups.link(self.members)

    @property
    def local(self) -> Shape:
        """Shape of this rank's tensor before the step; ``result`` after it."""
        return _extent(self.have[self.rank])

    @property
    def result(self) -> Shape:
        return _extent(self.want[self.rank])


def _extent(bounds: Bounds) -> Shape:
    return tuple(b - a for a, b in bounds)


def _same(x: Tensor) -> Tensor:
    return x


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _is_outermost(dims: tuple[int, ...], result: Shape) -> bool:
    """Tells whether pieces along ``dims``, one after the other in memory, are the result."""
    return len(dims) == 1 and math.prod(result[: dims[0]]) <= 1


def _unpack_gathered(at: _Place) -> Local:
    shapes = [_extent(at.have[r]) for r in at.sorted_members]
    return _unpack(shapes, at.step.dims[0], at.result, at.order) if len(at.step.dims) == 1 else _place_all(at)


def _pack_for_members(at: _Place, dim: int) -> tuple[Local, list[int]]:
    """Cuts the local tensor along ``dim``, one piece per member: a flat tensor in torch's order, and the sizes."""
    local, (start, stop) = at.local, at.have[at.rank][dim]
    spans = []
    for member in at.sorted_members:
        a, b = at.want[member][dim]
        spans.append((min(a - start, stop - start), b - a))
    rest = math.prod(local[:dim]) * math.prod(local[dim + 1 :])
    sizes = [length * rest for _, length in spans]
    if at.is_sorted and math.prod(local[:dim]) <= 1:
        return lambda x: x.reshape(-1), sizes
    n, length = len(spans), spans[0][1]
    if at.is_sorted and all(s == (i * length, length) for i, s in enumerate(spans)):
        return lambda x: x.unflatten(dim, (n, length)).movedim(dim, 0).reshape(-1), sizes
    return lambda x: torch.cat([x.narrow(dim, a, length).reshape(-1) for a, length in spans]), sizes


def _unpack(shapes: list[Shape], dim: int, result: Shape, order: list[int]) -> Local:
    """Joins flat pieces of these shapes, in torch's order, along ``dim`` in order ``order``."""
    is_sorted = order == list(range(len(order)))
    if is_sorted and _is_outermost((dim,), result):
        return lambda flat: flat.view(result)
    stacked = (len(shapes), *shapes[0])
    if is_sorted and len(set(shapes)) == 1:
        return lambda flat: flat.view(stacked).movedim(0, dim).reshape(result)
    sizes = [math.prod(s) for s in shapes]

    def run(flat: Tensor) -> Tensor:
        parts = flat.split(sizes)
        return torch.cat([parts[i].view(shapes[i]) for i in order], dim)

    return run


def _place_all(at: _Place) -> Local:
    """Joins pieces, flat and in torch's order, along several dims."""
    counts = [at.step.source.mesh.count(at.step.source.bound[d][len(at.step.target.bound[d]) :]) for d in at.step.dims]
    shapes, result = [_extent(at.have[r]) for r in at.sorted_members], at.result
    if at.is_sorted and len(set(shapes)) == 1:
        stacked = (*counts, *shapes[0])
        order: list[int] = []
        for dim in range(len(result)):
            if dim in at.step.dims:
                order.append(at.step.dims.index(dim))
            order.append(len(counts) + dim)
        return lambda flat: flat.view(stacked).permute(order).reshape(result)
    sizes = [math.prod(s) for s in shapes]
    places = [cutter(at.have[r], at.want[at.rank]) if math.prod(s) else None for r, s in zip(at.sorted_members, shapes)]

    def run(flat: Tensor) -> Tensor:
        out = flat.new_empty(result)
        for place, part, shape in zip(places, flat.split(sizes), shapes):
            if place is not None:
                place(out).copy_(part.view(shape))
        return out

    return run
