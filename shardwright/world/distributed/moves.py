"""Moves on one rank: redistributions as differentiable functions of local tensors.

A move runs at once; those that are started early are in :mod:`.starts`. Small moves of one kind share their collectives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shardwright.agreement.job_watch import in_backward
from shardwright.errors import WorldError
from shardwright.ir.instructions import Move
from shardwright.ir.redistribution import Redistribution
from shardwright.world.distributed.groups import Groups
from shardwright.world.distributed.shared_steps import prepare_shared
from shardwright.world.distributed.steps import CastRunner, Runner, prepare_steps
from shardwright.world.execute import log as record


class DistributedMove:
    """One move of the program on this rank, prepared.

    Args:
        inplace: whether the forward may overwrite its argument.
        compact: whether its result must not be a view into the argument, which it would keep alive.
        inplace_backward: whether the backward may overwrite the result's gradient.
    """

    def __init__(self, move: Move, rank: int, groups: Groups, inplace: bool, compact: bool, inplace_backward: bool = False):
        plan = move.redistribution
        self.record = [record.Moved(plan, move.cause, move.edge, move.copy, move.wire)]
        self.needs_grad = move.needs_grad
        self.inplace = inplace and bool(plan.forward)
        self.run_forward: Runner = prepare_steps(plan.forward, plan.shape, rank, groups, inplace, compact)
        self.run_backward: Runner = prepare_steps(plan.backward, plan.shape, rank, groups, inplace_backward, compact=True)
        if move.wire is not None:
            self.run_forward = CastRunner(self.run_forward, move.wire.forward, move.wire.result)
            self.run_backward = CastRunner(self.run_backward, move.wire.backward, move.dtype)

    def forward(self, value: Tensor) -> Tensor:
        if record._active:
            record.emit(self.record, value.dtype, "forward")
        return self.run_forward(value)

    def backward(self, gradient: Tensor) -> Tensor:
        if record._active:
            record.emit(self.record, gradient.dtype, "backward")
        return self.run_backward(gradient)

    def again(self, value: Tensor) -> tuple[Tensor]:
        """Runs the forward a second time, for the backward pass."""
        if record._active:
            record.emit(self.record, value.dtype, "recompute")
        return (self.run_forward(value),)

    def __call__(self, value: Tensor) -> Tensor:
        if value.requires_grad and torch.is_grad_enabled():
            return _MoveFunction.apply(self, value)  # type: ignore[no-any-return]
        return self.forward(value)

    def without_gradient(self, value: Tensor) -> Tensor:
        return self.forward(value.detach() if value.requires_grad else value)


class _MoveFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, move: DistributedMove | PieceMove | Reversed, value: Tensor) -> Tensor:
        ctx.move = move
        ctx.set_materialize_grads(False)
        result = move.forward(value)
        assert result is not None
        # autograd forbids to return an argument, and what was changed in place must not count as one
        return result.view_as(result) if result is value else result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Any, Tensor | None]:
        if gradient is None:  # the result plays no part, on any rank
            return None, None
        if type(ctx.move) is DistributedMove:  # others may be between some ranks only
            in_backward()
        if torch.is_grad_enabled():
            return None, _MoveFunction.apply(Reversed(ctx.move), gradient)
        return None, ctx.move.backward(gradient)


class Reversed:
    """A move the other way: the backward of a move, whose own backward is the move again.

    A move is linear, so the derivative of its backward carries what comes in as the move itself carries values. What is handed
    in may be saved by others, and moves may overwrite it, so they are given a copy.
    """

    def __init__(self, move: DistributedMove | PieceMove | Reversed):
        self.move = move

    def forward(self, gradient: Tensor) -> Tensor:
        return self.move.backward(gradient.clone())

    def backward(self, value: Tensor) -> Tensor:
        result = self.move.forward(value.clone())
        assert result is not None
        return result


# -- moves that share their collectives --------------------------------------------------------------------------------


class DistributedFusedMoves:
    """Moves of one kind over the same axes, on this rank: one collective for all, forward and backward.

    The backward waits for the gradients of all results; those without gradients are left out.
    """

    def __init__(self, moves: Sequence[Move], rank: int, groups: Groups):
        self.plans = [move.redistribution for move in moves]
        self.record = [record.Moved(move.redistribution, move.cause, move.edge, move.copy, move.wire) for move in moves]
        self.needs_grad, self.wire, self.dtype = moves[0].needs_grad, moves[0].wire, moves[0].dtype
        self.rank, self.groups = rank, groups
        self.prepared: dict[tuple[str, tuple[int, ...]], Callable[[list[Tensor]], list[Tensor]]] = {}

    def __call__(self, *values: Tensor) -> list[Tensor] | tuple[Tensor, ...]:
        if self.needs_grad and torch.is_grad_enabled() and any(v.requires_grad for v in values):
            return _TogetherFunction.apply(self, *values)  # type: ignore[no-any-return]
        return self.run("forward", list(range(len(values))), [v.detach() for v in values])

    def again(self, *values: Tensor) -> list[Tensor]:
        """Runs the forward a second time, for the backward pass."""
        return self.run("recompute", list(range(len(values))), list(values))

    def run(self, phase: str, members: Sequence[int], values: list[Tensor]) -> list[Tensor]:
        """Runs the steps of one phase on the tensors of some of the moves."""
        if record._active:
            record.emit([self.record[i] for i in members], values[0].dtype, phase)
        key = (phase, tuple(members))
        if key not in self.prepared:
            self.prepared[key] = self._prepare(phase, members)
        return self.prepared[key](values)

    def _prepare(self, phase: str, members: Sequence[int]) -> Callable[[list[Tensor]], list[Tensor]]:
        plans = [self.plans[i] for i in members]
        steps = [plan.backward if phase == "backward" else plan.forward for plan in plans]
        run = prepare_shared(steps, [plan.shape for plan in plans], self.rank, self.groups)
        if self.wire is None:
            return run
        before, after = self.wire.of(phase, self.dtype)
        return lambda values: [v.to(after) for v in run([v.to(before) for v in values])]


class _TogetherFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, together: DistributedFusedMoves, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.together = together
        ctx.set_materialize_grads(False)
        results = together.run("forward", list(range(len(values))), list(values))
        return tuple(r.view_as(r) if any(r is v for v in values) else r for r in results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        known = [i for i, g in enumerate(gradients) if g is not None]
        results: list[Tensor | None] = [None] * len(gradients)
        if known:
            in_backward()
            given = [g for g in gradients if g is not None]
            if torch.is_grad_enabled():
                found = run_reversed(ctx.together.run, known, given)
            else:
                found = ctx.together.run("backward", known, given)
            for i, result in zip(known, found, strict=True):
                results[i] = result
        return (None, *results)


Run = Callable[[str, Sequence[int], list[Tensor]], Sequence[Tensor]]  # of a phase, members and their tensors


def run_reversed(run: Run, members: Sequence[int], gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """Runs the backward of moves that share their collectives, differentiably."""
    return _ReversedFunction.apply(run, "backward", members, *gradients)  # type: ignore[no-any-return]


class _ReversedFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Run, phase: str, members: Sequence[int], *values: Tensor) -> tuple[Tensor, ...]:
        ctx.run, ctx.phase, ctx.members = run, phase, members
        return tuple(run(phase, members, [value.clone() for value in values]))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        in_backward()
        other = "forward" if ctx.phase == "backward" else "backward"
        return None, None, None, *_ReversedFunction.apply(ctx.run, other, ctx.members, *gradients)


# -- redistribute -------------------------------------------------------------------------------------------------------


class PieceMove:
    """Redistribution of one tensor on this rank, prepared."""

    def __init__(self, plan: Redistribution, rank: int, groups: Groups, cause: str = "redistribute"):
        self.plan = plan
        self.record = [record.Moved(plan, cause, cause)]
        bounds = plan.source.bounds(plan.shape).get(rank)
        self.given = None if bounds is None else torch.Size(b - a for a, b in bounds)
        self.wants = rank in plan.target.mesh.ranks
        self.run_forward: Runner = prepare_steps(plan.forward, plan.shape, rank, groups)
        same_ranks = set(plan.source.mesh.ranks) == set(plan.target.mesh.ranks)
        self.run_backward = prepare_steps(plan.backward, plan.shape, rank, groups) if same_ranks else None

    def __call__(self, value: Tensor | None, dtype: torch.dtype | None, device: torch.device) -> Tensor | None:
        if value is None:
            value = torch.empty(0, dtype=dtype, device=device)
        if value.requires_grad and torch.is_grad_enabled():
            if self.run_backward is None:
                raise WorldError(
                    f"redistribute from ranks {sorted(self.plan.source.mesh.ranks)} to ranks "
                    f"{sorted(self.plan.target.mesh.ranks)} has no backward: hand in value.detach() and move the gradient "
                    "back from target to source by a call of its own"
                )
            return _MoveFunction.apply(self, value)  # type: ignore[no-any-return]
        return self.forward(value)

    def forward(self, value: Tensor) -> Tensor | None:
        if record._active:
            record.emit(self.record, value.dtype, "forward")
        result = self.run_forward(value)
        return result if self.wants else None

    def backward(self, gradient: Tensor) -> Tensor:
        if record._active:
            record.emit(self.record, gradient.dtype, "backward")
        assert self.run_backward is not None
        return self.run_backward(gradient)
