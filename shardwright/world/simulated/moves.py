"""Moves over all simulated ranks: redistributions as differentiable functions of lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardwright.ir.instructions import Move
from shardwright.ir.rank_groups import RankGroups
from shardwright.ir.redistribution import Redistribution
from shardwright.world.execute import log as record
from shardwright.world.simulated.steps import prepare


class SimulatedMove:
    """One move of the program, over rank groups.

    Where the program starts it early, only logs learn of that, by :meth:`note_start`.
    """

    def __init__(self, move: Move, source_lanes: RankGroups):
        self.plan, self.needs_grad = move.redistribution, move.needs_grad
        self.wire, self.dtype = move.wire, move.dtype
        self.is_started = self.ends_later = False
        self.recorded: list[record.UnderWay] = []
        self.record = [record.Moved(move.redistribution, move.cause, move.edge, move.copy, move.wire)]
        shape = self.plan.shape
        self.there = prepare(self.plan.forward, shape, source_lanes)
        self.back = prepare(self.plan.backward, shape, move.rank_groups)
        self.takes = [self.there.rank_groups[r] for r in representatives(move.rank_groups)]
        self.gives = [self.back.rank_groups[r] for r in representatives(source_lanes)]

    def __call__(self, lanes: list[Tensor]) -> list[Tensor]:
        if self.needs_grad and torch.is_grad_enabled():
            return apply_move(self, lanes)
        return self.forward(lanes)

    def note_start(self, lanes: Sequence[Tensor]) -> None:
        """Records in the logs that the move starts. In the backward pass, which is reversed, it records the end."""
        self.recorded = record.emit(self.record, lanes[0].dtype, "forward", ends_later=True)
        self.is_started, self.ends_later = True, lanes[0].grad_fn is not None
        if lanes[0].grad_fn is not None:
            lanes[0].grad_fn.register_prehook(lambda gradients: record.ended(self.recorded))

    def forward(self, lanes: Sequence[Tensor]) -> list[Tensor]:
        if record._active:
            if self.is_started:
                record.ended(self.recorded)
                self.is_started = False
            else:
                record.emit(self.record, lanes[0].dtype, "forward")
        return self.move_forward(lanes)

    def recompute(self, *lanes: Tensor) -> list[Tensor]:
        """Runs the forward a second time, for the backward pass."""
        if record._active:
            record.emit(self.record, lanes[0].dtype, "recompute")
        return self.move_forward(lanes)

    def move_forward(self, lanes: Sequence[Tensor]) -> list[Tensor]:
        if self.wire is not None:
            lanes = [v.to(self.wire.forward) for v in lanes]
        values = self.there(lanes)
        if self.wire is not None:
            values = [v.to(self.wire.result) for v in values]
        return [values[i] for i in self.takes]

    def backward(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        if record._active:
            self.recorded = record.emit(self.record, gradients[0].dtype, "backward", self.ends_later)
        return self.move_backward(gradients)

    def move_backward(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        if self.wire is not None:
            gradients = [g.to(self.wire.backward) for g in gradients]
        values = self.back(gradients)
        if self.wire is not None:
            values = [v.to(self.dtype) for v in values]
        return [values[i] for i in self.gives]


class SimulatedFusedMoves:
    """Moves that share their collectives: one node of the autograd graph, whose backward waits for all gradients."""

    def __init__(self, moves: Sequence[Move], lanes: dict[str, RankGroups]):
        self.parts = [SimulatedMove(move, lanes[move.source]) for move in moves]
        self.record = [part.record[0] for part in self.parts]
        self.counts = [max(lanes[move.source]) + 1 for move in moves], [max(move.rank_groups) + 1 for move in moves]

    def __call__(self, *lanes: list[Tensor]) -> list[list[Tensor]]:
        flat = [tensor for each in lanes for tensor in each]
        if self.parts[0].needs_grad and torch.is_grad_enabled():
            return _split(_TogetherFunction.apply(self, *flat), self.counts[1])
        return _split(self.forward(flat), self.counts[1])

    def forward(self, flat: Sequence[Tensor], phase: str = "forward") -> list[Tensor]:
        if record._active:
            record.emit(self.record, flat[0].dtype, phase)
        given = _split(flat, self.counts[0])
        return [v for part, lanes in zip(self.parts, given, strict=True) for v in part.move_forward(lanes)]

    def recompute(self, *flat: Tensor) -> list[Tensor]:
        """Runs the forward a second time, for the backward pass."""
        return self.forward(flat, "recompute")

    def backward(self, flat: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Returns the gradients of the members whose outputs have any."""
        given = _split(flat, self.counts[1])
        used = [any(g is not None for g in gradients) for gradients in given]
        if record._active:
            dtype = next(g.dtype for g in flat if g is not None)
            record.emit([r for r, is_used in zip(self.record, used, strict=True) if is_used], dtype, "backward")
        results: list[Tensor | None] = []
        for part, gradients, is_used, count in zip(self.parts, given, used, self.counts[0], strict=True):
            results += part.move_backward(gradients) if is_used else [None] * count
        return results

    def backward_differentiably(self, flat: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Returns what :meth:`backward` does, as values that can be differentiated: each member by itself."""
        results: list[Tensor | None] = []
        for part, gradients, count in zip(self.parts, _split(flat, self.counts[1]), self.counts[0], strict=True):
            is_used = gradients[0] is not None
            results += apply_move(Reversed(part), gradients) if is_used else [None] * count
        return results


def _split(flat: Sequence[Any], counts: Sequence[int]) -> list[list[Any]]:
    each = iter(flat)
    return [[next(each) for _ in range(count)] for count in counts]


class _TogetherFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, together: SimulatedFusedMoves, *flat: Tensor) -> tuple[Tensor, ...]:
        ctx.together = together
        ctx.set_materialize_grads(False)
        results = tuple(_distinct(together.forward(flat), flat))
        ctx.shapes = [r.shape for r in results]
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        known = next((g for g in gradients if g is not None), None)
        if known is None:
            return (None,) * (1 + sum(ctx.together.counts[0]))
        filled: list[Tensor | None] = []
        for each in _split(list(zip(gradients, ctx.shapes, strict=True)), ctx.together.counts[1]):
            used = any(g is not None for g, _ in each)
            filled += [known.new_zeros(shape) if used and g is None else g for g, shape in each]
        if torch.is_grad_enabled():
            return (None, *ctx.together.backward_differentiably(filled))
        return (None, *ctx.together.backward(filled))


class SimulatedPieces:
    """Redistribution over the pieces of all ranks, one after the other; ranks outside a mesh have none."""

    def __init__(self, plan: Redistribution, size: int):
        self.plan = plan
        self.record = [record.Moved(plan, "redistribute", "redistribute")]
        self.sources = [r for r in range(size) if r in plan.source.mesh.ranks]
        self.targets = [r for r in range(size) if r in plan.target.mesh.ranks]
        self.there = prepare(plan.forward, plan.shape, _positions(self.sources, size))
        self.back = prepare(plan.backward, plan.shape, _positions(self.targets, size))

    def forward(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        record.emit(self.record, pieces[0].dtype, "forward")
        values = self.there(pieces)
        return [values[self.there.rank_groups[r]] for r in self.targets]

    def backward(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        record.emit(self.record, gradients[0].dtype, "backward")
        values = self.back(gradients)
        return [values[self.back.rank_groups[r]] for r in self.sources]


def _positions(ranks: Sequence[int], size: int) -> RankGroups:
    """Returns the position of every rank in ``ranks``, -1 where it is not in it."""
    position = {rank: i for i, rank in enumerate(ranks)}
    return tuple(position.get(rank, -1) for rank in range(size))


class Reversed:
    """A move the other way: the backward of a move, whose own backward is the move again.

    A move is linear, so the derivative of its backward carries what comes in as the move itself carries values.
    """

    def __init__(self, move: SimulatedMove | SimulatedPieces | Reversed):
        self.move = move

    def forward(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        return self.move.backward(gradients)

    def backward(self, lanes: Sequence[Tensor]) -> list[Tensor]:
        return self.move.forward(lanes)


def apply_move(move: SimulatedMove | SimulatedPieces | Reversed, lanes: Sequence[Tensor]) -> list[Tensor]:
    """Runs a move on the tensors of rank groups, differentiably."""
    return list(_MoveFunction.apply(move, *lanes))


class _MoveFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, move: SimulatedMove | SimulatedPieces | Reversed, *lanes: Tensor) -> tuple[Tensor, ...]:
        ctx.move, ctx.count = move, len(lanes)
        ctx.set_materialize_grads(False)
        results = tuple(_distinct(move.forward(lanes), lanes))
        ctx.shapes = [result.shape for result in results]
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        known = next((g for g in gradients if g is not None), None)
        if known is None:  # the result plays no part
            return (None,) * (1 + ctx.count)
        filled = [known.new_zeros(shape) if g is None else g for g, shape in zip(gradients, ctx.shapes, strict=True)]
        if torch.is_grad_enabled():
            return (None, *apply_move(Reversed(ctx.move), filled))
        return (None, *ctx.move.backward(filled))


def representatives(lanes: RankGroups) -> list[int]:
    """Returns one rank of each rank group."""
    first: dict[int, int] = {}
    for rank, own in enumerate(lanes):
        first.setdefault(own, rank)
    return [first[i] for i in range(len(first))]


def _distinct(values: list[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Copies tensors that come twice or are inputs: autograd forbids aliases."""
    seen = {id(t) for t in inputs}
    result = []
    for value in values:
        if id(value) in seen:
            value = value.view_as(value)
        seen.add(id(value))
        result.append(value)
    return result
