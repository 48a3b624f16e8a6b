"""Gradients of parameters that several rows of a job hold: added up on each of them, so that the copies stay alike."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardwright.base.derivatives import first_derivative_only
from shardwright.ir.layout import Layout
from shardwright.ir.operator import TensorMeta
from shardwright.redistribute.routes import exchange_routes
from shardwright.world.distributed.links import Link
from shardwright.world.distributed.operations import Handle
from shardwright.world.distributed.transfer import Transfer

_LAST_TAG = (1 << 30) - 1


@dataclass(frozen=True)
class Tied:
    """A parameter of which several rows hold copies.

    Args:
        name: of the program's input.
        meta: of the parameter.
        layouts: over the ranks of each row, in order.
    """

    name: str
    meta: TensorMeta
    layouts: tuple[Layout, ...]


class TiedGradients:
    """Adds up the gradients of parameters that several rows hold, on each of them.

    Args:
        tied: the parameters, the same on all ranks.
        rank: this rank.
        link: over all ranks of the job.
        reached: tells, in a backward pass, which inputs get a gradient on any rank.
    """

    def __init__(self, tied: Sequence[Tied], rank: int, link: Link, reached: Callable[[], Collection[str]]):
        self.reached = reached
        self.own = [t for t in tied if any(rank in layout.mesh.ranks for layout in t.layouts)]
        self.ways: list[tuple[list[tuple[int, int, Transfer]], int]] = []
        for at, each in enumerate(tied):
            if each not in self.own:
                continue
            shape = each.meta.shape
            here = next(i for i, layout in enumerate(each.layouts) if rank in layout.mesh.ranks)
            ways: list[tuple[int, int, Transfer]] = []
            for source, before in enumerate(each.layouts):
                # to the rows of this rank's copy and from it: one transfer for each pair of rows
                for target, after in enumerate(each.layouts):
                    if source != target and here in (source, target):
                        routes = exchange_routes(before, after, shape)
                        have, want = before.bounds(shape).get(rank), after.bounds(shape).get(rank)
                        tag = _LAST_TAG - (at * len(each.layouts) + source) * len(each.layouts) - target
                        ways.append((source, target, Transfer(link, routes, have, want, tag)))
            self.ways.append((ways, here))

    def __call__(self, values: list[Any], places: Mapping[str, int]) -> Tensor | None:
        """Makes the gradients of a rank's parameters those of all rows.

        Args:
            values: the local tensors of the program's inputs, which are replaced.
            places: where each input is.

        Returns:
            What has to get a gradient in every backward pass, also where none of the parameters does.
        """
        at = [places[t.name] for t in self.own]
        if not at or not torch.is_grad_enabled() or not any(values[n].requires_grad for n in at):
            return None
        anchor, *found = _Tied.apply(self, torch.zeros((), requires_grad=True), *[values[n] for n in at])
        for n, value in zip(at, found, strict=True):
            values[n] = value
        return anchor

    def added(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Returns the sums over rows, added in the order of rows."""
        under_way: list[tuple[int, int, Handle]] = []
        for index, (gradient, (ways, here)) in enumerate(zip(gradients, self.ways, strict=True)):
            for source, target, transfer in ways:
                given = gradient.contiguous() if source == here else gradient.new_empty(0)
                under_way.append((index, source if target == here else -1, transfer.start(given)))
        parts: list[dict[int, Tensor]] = [{here: g} for g, (_, here) in zip(gradients, self.ways, strict=True)]
        for index, source, handle in under_way:
            found = handle.wait()
            if source >= 0:
                parts[index][source] = found
        return [sum_in_order([part[row] for row in sorted(part)]) for part in parts]


def sum_in_order(parts: Sequence[Tensor]) -> Tensor:
    """Adds tensors, first to last."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tied: TiedGradients, anchor: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.tied, ctx.like = tied, [value.detach() for value in values]
        return tuple(value.view_as(value) for value in (anchor, *values))

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, anchor: Tensor, *gradients: Tensor | None) -> tuple[Any, ...]:
        given = [torch.zeros_like(v) if g is None else g for g, v in zip(gradients, ctx.like, strict=True)]
        reached = ctx.tied.reached()
        sums = zip(ctx.tied.own, ctx.tied.added(given), strict=True)
        return None, None, *(total if tied.name in reached else None for tied, total in sums)
