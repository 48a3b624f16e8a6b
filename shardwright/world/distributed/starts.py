"""Moves that start early on one rank, and end one by one where they are read.

In the autograd graph those that share their collectives have one start and one end, where the first of them is read: a
node of Python costs some 20 us forward and as much backward. The backward pass is the mirror of it: when the last of their
gradients is there they start on their way, and where the moves were started they are waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shardwright.agreement.job_watch import in_backward
from shardwright.ir.instructions import Move
from shardwright.world.distributed.groups import Groups
from shardwright.world.distributed.moves import run_reversed
from shardwright.world.distributed.shared_steps import SharedUnderWay, prepare_shared
from shardwright.world.distributed.steps import UnderWay, prepare_steps
from shardwright.world.execute import log as record


class StartedMoves:
    """Moves of one kind on this rank, prepared; a single move may be of any kind.

    Args:
        compact: whether results must not be views into the arguments, which they would keep alive.
        inplace: whether the gradient of a single move's result may be overwritten.
    """

    def __init__(self, moves: Sequence[Move], rank: int, groups: Groups, compact: bool, inplace: bool = False):
        self.plans = [move.redistribution for move in moves]
        self.record = [record.Moved(move.redistribution, move.cause, move.edge, move.copy, move.wire) for move in moves]
        self.needs_grad, self.wire, self.dtype = moves[0].needs_grad, moves[0].wire, moves[0].dtype
        self.moves_forward = any(plan.forward for plan in self.plans)
        self.rank, self.groups, self.compact, self.inplace = rank, groups, compact, inplace
        self._starters: dict[tuple[str, tuple[int, ...]], Callable[[list[Tensor]], UnderWay | SharedUnderWay]] = {}
        self.everyone = tuple(range(len(moves)))
        if self.moves_forward:
            self._starter("forward", self.everyone)
        self._starter("backward", self.everyone)

    def __call__(self, *values: Tensor) -> Travelling:
        """Starts the moves; ``end(i)`` of the result returns what each move would return by itself."""
        travelling = Travelling(self, values)
        if self.needs_grad and torch.is_grad_enabled() and any(value.requires_grad for value in values):
            travelling.token = _StartFunction.apply(travelling, *values)
        else:
            travelling.start_forward([value.detach() for value in values])
        return travelling

    def start(self, phase: str, members: tuple[int, ...], values: list[Tensor]) -> UnderWay | SharedUnderWay:
        """Starts the steps of one phase on the tensors of some of the moves."""
        if self.wire is None:
            return self._starter(phase, members)(values)
        before, after = self.wire.of(phase, self.dtype)
        return CastUnderWay(self._starter(phase, members)([value.to(before) for value in values]), after)

    def run(self, phase: str, members: Sequence[int], values: list[Tensor]) -> list[Tensor]:
        """Runs the steps of one phase on the tensors of some of the moves, and waits for them."""
        if record._active:
            record.emit([self.record[i] for i in members], values[0].dtype, phase)
        if phase == "forward" and not self.moves_forward:
            return values if self.wire is None else [value.to(self.wire.result) for value in values]
        found = self.start(phase, tuple(members), values).wait()
        return list(found) if isinstance(found, (list, tuple)) else [found]

    def again(self, *values: Tensor) -> list[Tensor]:
        """Runs the forward a second time, for the backward pass."""
        found = self.start_again(list(values)).wait()
        return found if isinstance(found, list) else [found]

    def start_again(self, values: list[Tensor]) -> UnderWay | SharedUnderWay:
        """Starts the forward a second time; see :meth:`again`."""
        if record._active:
            record.emit(self.record, values[0].dtype, "recompute")
        return self.start("recompute", self.everyone, values)

    def _starter(self, phase: str, members: tuple[int, ...]) -> Callable[[list[Tensor]], UnderWay | SharedUnderWay]:
        key = (phase, members)
        if key not in self._starters:
            plans = [self.plans[i] for i in members]
            steps = [plan.backward if phase == "backward" else plan.forward for plan in plans]
            if len(self.plans) == 1:
                is_backward = phase == "backward"
                run = prepare_steps(
                    steps[0], plans[0].shape, self.rank, self.groups, is_backward and self.inplace,
                    is_backward or self.compact,
                )  # fmt: skip
                self._starters[key] = lambda values: run.start(values[0])
            else:
                shapes, views = [plan.shape for plan in plans], phase == "backward"
                self._starters[key] = prepare_shared(steps, shapes, self.rank, self.groups, views).start
        return self._starters[key]


class CastUnderWay:
    """Steps under way, and the dtype that their result is cast to."""

    def __init__(self, under_way: UnderWay | SharedUnderWay, dtype: torch.dtype):
        self.under_way, self.dtype = under_way, dtype

    def wait(self) -> Any:
        found = self.under_way.wait()
        return [value.to(self.dtype) for value in found] if isinstance(found, list) else found.to(self.dtype)


class Travelling:
    """Moves under way, and later their gradients."""

    def __init__(self, moves: StartedMoves, values: Sequence[Tensor]):
        self.moves = moves
        self.under_way: UnderWay | SharedUnderWay | None = None
        self.values: list[Tensor | None] = []
        self.gradients: UnderWay | SharedUnderWay | None = None
        self.started: tuple[int, ...] = ()
        self.found: Sequence[Tensor] | None = None  # gradients that are there already
        self.token: Tensor | None = None
        self.recorded: list[record.UnderWay] = []

    def _start(self, phase: str, members: tuple[int, ...], values: list[Tensor]) -> UnderWay | SharedUnderWay:
        if record._active:
            self.recorded = record.emit([self.moves.record[i] for i in members], values[0].dtype, phase, ends_later=True)
        return self.moves.start(phase, members, values)

    def _end(self, under_way: UnderWay | SharedUnderWay) -> list[Any]:
        found = under_way.wait()
        record.ended(self.recorded)
        return found if isinstance(found, list) else [found]

    def start_forward(self, values: list[Tensor]) -> None:
        if self.moves.moves_forward:
            self.under_way = self._start("forward", self.moves.everyone, values)
        else:
            wire = self.moves.wire
            self.values = list(values) if wire is None else [value.to(wire.result) for value in values]

    def end(self, index: int) -> Tensor:
        """Returns the result of one of the moves."""
        if self.token is not None:
            token, self.token = self.token, None
            self.values = list(_EndFunction.apply(self, token))
        elif self.under_way is not None:
            self.values = self.end_forward()
        result, self.values[index] = self.values[index], None
        assert result is not None, "a move is ended once"
        return result

    def end_forward(self) -> list[Any]:
        """Returns the results of all moves."""
        if self.under_way is not None:
            self.values, self.under_way = self._end(self.under_way), None
        values, self.values = self.values, []
        return values

    # -- backward -------------------------------------------------------------------------------------------------

    def start_backward(self, gradients: Sequence[Tensor | None]) -> None:
        """Starts the gradients of results; some may have no part in what is differentiated."""
        self.started = tuple(i for i, gradient in enumerate(gradients) if gradient is not None)
        if self.started:
            in_backward()
            self.gradients = self._start("backward", self.started, [g for g in gradients if g is not None])

    def backward_differentiably(self, gradients: Sequence[Tensor | None]) -> None:
        """Runs the backward at once, so that it can be differentiated itself; :meth:`end_backward` hands on what it gave."""
        self.started = tuple(i for i, gradient in enumerate(gradients) if gradient is not None)
        if self.started:
            in_backward()
            given = [gradient for gradient in gradients if gradient is not None]
            self.found = run_reversed(self.moves.run, self.started, given)

    def end_backward(self) -> list[Tensor | None]:
        """Returns the gradients of the arguments, ``None`` for those whose results had none."""
        found: list[Tensor | None] = [None] * len(self.moves.everyone)
        if self.found is not None:
            for index, gradient in zip(self.started, self.found, strict=True):
                found[index] = gradient
            self.found = None
        if self.gradients is not None:
            for index, gradient in zip(self.started, self._end(self.gradients), strict=True):
                found[index] = gradient
            self.gradients = None
        return found


class _StartFunction(torch.autograd.Function):
    """Autograd function to a token that ties the end of moves to their start."""

    @staticmethod
    def forward(ctx: Any, travelling: Travelling, *values: Tensor) -> Tensor:
        ctx.travelling = travelling
        travelling.start_forward([value.detach() for value in values])
        return values[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, token: Tensor) -> tuple[Any, ...]:
        return None, *ctx.travelling.end_backward()


class _EndFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, travelling: Travelling, token: Tensor) -> tuple[Tensor, ...]:
        ctx.travelling = travelling
        ctx.set_materialize_grads(False)
        return tuple([result.view_as(result) for result in travelling.end_forward()])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, Tensor | None]:
        if torch.is_grad_enabled():
            ctx.travelling.backward_differentiably(gradients)
        else:
            ctx.travelling.start_backward(gradients)
        known = next((gradient for gradient in gradients if gradient is not None), None)
        return None, None if known is None else known.new_zeros(())
