"""Turns a user's collective into a redistribution: its steps, and those of its gradient.

Along the other axes of the mesh, ranks may call it with different tensors, even of different sizes: then the steps are those
of a tensor that these axes split too. The planner is not used, as it relies on ranks that hold the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from shardwright.errors import StrategyError
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.ir.redistribution import Redistribution
from shardwright.ir.step import Step

Shape = tuple[int, ...]
Shapes = tuple[Shape, ...]


@dataclass(frozen=True)
class Collective:
    """One collective over one axis, of tensors that have one shape along it.

    Args:
        kind: ``all_reduce``, ``all_gather``, ``reduce_scatter``, ``all_to_all``, ``broadcast`` or ``permute``.
        op: ``sum``, ``max`` or ``min``, of the two that reduce.
        numbers: the dim of ``all_gather`` and ``reduce_scatter``; split and concat dim of ``all_to_all``; the source of
            ``broadcast``; of ``permute`` the sender to each position, -1 where there is none.
    """

    kind: str
    axis: str
    op: str = "sum"
    numbers: tuple[int, ...] = ()

    def result_shape(self, shape: Shape, count: int) -> Shape:
        """Returns the shape of a rank's result.

        Args:
            shape: that of its argument.
            count: the number of ranks along the axis.
        """
        result = list(shape)
        if self.kind == "all_gather":
            result[self.numbers[0]] *= count
        elif self.kind == "reduce_scatter":
            result[self.numbers[0]] //= count
        elif self.kind == "all_to_all":
            split, concat = self.numbers
            result[split] //= count
            result[concat] *= count
        return tuple(result)

    def sent_rows(self, position: int, size: int) -> int:
        """Counts the rows of dim 0 that the rank at a position sends; in a broadcast only the source sends any."""
        return size if self.kind != "broadcast" or position == self.numbers[0] else 0

    def receives(self, position: int) -> bool:
        """Tells whether the rank at a position of the axis gets anything."""
        return self.kind != "permute" or self.numbers[position] >= 0

    def __str__(self) -> str:
        return f"{self.kind}({self.axis})"


def kept(x: Tensor, receives: bool) -> Tensor:
    """Returns the received tensor, or zeros where nothing was received.

    The gradient travels back in either case, since other ranks wait for it.
    """
    result: Tensor = _Kept.apply(x, receives)
    return result


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, receives: bool) -> Tensor:
        ctx.receives = receives
        return x.view_as(x) if receives else torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient if ctx.receives else torch.zeros_like(gradient), None


@lru_cache(maxsize=4096)
def plan(collective: Collective, mesh: Mesh, shapes: Shapes) -> Redistribution:
    """Builds the steps of a collective and its gradient, over two ranks or more.

    Args:
        shapes: of what each rank calls it with, ``shapes[rank]``, the same along the axis.

    >>> mesh = Mesh(("dp", "mp"), (2, 2))
    >>> str(plan(Collective("all_gather", "mp", numbers=(1,)), mesh, ((3, 4),) * 4))
    'all_gather(mp, dim 1) | reduce_scatter(mp, dim 1)'
    >>> str(plan(Collective("all_reduce", "mp"), mesh, ((3, 4), (3, 4), (2, 4), (2, 4))))
    'all_reduce(mp) | all_reduce(mp)'
    """
    axis, count = collective.axis, mesh.axis_size(collective.axis)
    others = _varying(mesh, shapes, axis)
    if collective.kind == "permute":
        return _permutation(collective, mesh, shapes, others)
    given, made = list(shapes), [collective.result_shape(shape, count) for shape in shapes]
    before, after, dims = list(others), list(others), collective.numbers
    if collective.kind == "broadcast":
        at = [mesh.coordinates(rank)[axis] for rank in range(mesh.size)]
        given = [(collective.sent_rows(p, shape[0]), *shape[1:]) for p, shape in zip(at, shapes, strict=True)]
        dims = (0,)
    if collective.kind in ("broadcast", "all_gather"):
        before[dims[0]] += (axis,)
    elif collective.kind == "reduce_scatter":
        after[dims[0]] += (axis,)
    elif collective.kind == "all_to_all":
        before[dims[1]] += (axis,)
        after[dims[0]] += (axis,)
    source, shape = laid_out(mesh, before, given)
    target, whole = laid_out(mesh, after, made)
    assert shape == whole, f"{collective} of {shapes}: {shape} and {whole}"
    return _with_steps(collective, source, target, shape)


def _with_steps(collective: Collective, source: Layout, target: Layout, shape: Shape) -> Redistribution:
    kind, op, axes, dims = collective.kind, collective.op, (collective.axis,), collective.numbers
    partial = (collective.axis,)
    if kind == "all_reduce":
        forward = Step(kind, axes, source.with_partial(partial, op), target, (), op)
        backward = (Step(kind, axes, target.with_partial(partial), source),) if op == "sum" else ()
        return Redistribution(forward.source, target, shape, partial, (forward,), backward)
    if kind == "reduce_scatter":
        forward = Step(kind, axes, source.with_partial(partial, op), target, dims, op)
        backward = (Step("all_gather", axes, target, source, dims),) if op == "sum" else ()
        return Redistribution(forward.source, target, shape, (), (forward,), backward)
    if kind == "all_to_all":
        split, concat = dims
        there = Step(kind, axes, source, target, (concat, split))
        back = Step(kind, axes, target, source, (split, concat))
        return Redistribution(source, target, shape, (), (there,), (back,))
    dims = (0,) if kind == "broadcast" else dims
    there = Step("all_gather", axes, source, target, dims)
    back = Step("reduce_scatter", axes, target.with_partial(partial), source, dims)
    return Redistribution(source, target, shape, partial, (there,), (back,))


def _permutation(collective: Collective, mesh: Mesh, shapes: Shapes, others: list[tuple[str, ...]]) -> Redistribution:
    """Sends every rank's piece to one rank: the same tensor over the same mesh, with its ranks in other places."""
    taken = {axis for axes in others[1:] for axis in axes}
    dims = [tuple(axis for axis, size in zip(mesh.axes, mesh.sizes) if size > 1 and axis not in taken), *others[1:]]
    receiver = receivers(collective.numbers)
    moved = []
    for rank in mesh.ranks:
        group = mesh.group_of(rank, (collective.axis,))
        moved.append(group[receiver[group.index(rank)]])
    source, shape = laid_out(mesh, dims, shapes)
    target = Layout.of(Mesh(mesh.axes, mesh.sizes, tuple(moved)), source.bound, (), source.sizes)
    there, back = Step("permute", (), source, target), Step("permute", (), target, source)
    return Redistribution(source, target, shape, (), (there,), (back,))


def receivers(senders: Sequence[int]) -> list[int]:
    """Returns, for each position, the one it sends to; positions that send to nobody get those that nobody sends to."""
    receiver = {sender: position for position, sender in enumerate(senders) if sender >= 0}
    idle = iter([position for position, sender in enumerate(senders) if sender < 0])
    return [receiver[position] if position in receiver else next(idle) for position in range(len(senders))]


def _varying(mesh: Mesh, shapes: Shapes, axis: str) -> list[tuple[str, ...]]:
    """Returns, for each dim, the axes other than ``axis`` along which its local size differs."""
    found: list[tuple[str, ...]] = []
    for dim in range(len(shapes[0])):
        sizes = {rank: shapes[rank][dim] for rank in mesh.ranks}
        found.append(
            tuple(
                other
                for other in mesh.axes
                if other != axis and any(len({sizes[r] for r in group}) > 1 for group in mesh.groups((other,)))
            )
        )
    flat = [other for axes in found for other in axes]
    twice = sorted({other for other in flat if flat.count(other) > 1})
    if twice:
        raise StrategyError(
            f"a collective over {axis!r} is called with tensors of which two dims change their size along {twice[0]!r}: "
            f"{_listed(shapes)}; let one dim differ between ranks"
        )
    return found


def _listed(shapes: Shapes) -> str:
    return ", ".join(f"{list(shape)} on rank {rank}" for rank, shape in enumerate(shapes[:8]))


def laid_out(mesh: Mesh, dims: Sequence[tuple[str, ...]], shapes: Sequence[Shape]) -> tuple[Layout, Shape]:
    """Returns the layout of ranks' pieces with these shapes, and the shape of the whole."""
    sizes: list[tuple[int, ...] | None] = []
    whole = []
    for dim, axes in enumerate(dims):
        pieces = tuple(
            shapes[_rank_at(mesh, axes, at)][dim] for at in itertools.product(*map(range, map(mesh.axis_size, axes)))
        )
        sizes.append(pieces if axes else None)
        whole.append(sum(pieces))
    layout = Layout.of(mesh, dims, (), sizes)
    return layout.normal(tuple(whole)), tuple(whole)


def _rank_at(mesh: Mesh, axes: Sequence[str], at: Sequence[int]) -> int:
    """Returns the rank with these coordinates, and 0 along the other axes."""
    known = dict(zip(axes, at, strict=True))
    position = 0
    for axis, size in zip(mesh.axes, mesh.sizes, strict=True):
        position = position * size + known.get(axis, 0)
    return mesh.ranks[position]
