"""The two passes of a step: what of a schedule runs in the forward, what in the backward, and what autograd gets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shardwright.agreement.job_watch import in_backward, within_pipeline
from shardwright.base.derivatives import first_derivative_only
from shardwright.pipeline.schedules.actions import RESHARD, UNSHARD, Action
from shardwright.pipeline.schedules.parameters import with_parameters
from shardwright.pipeline.schedules.schedule import Schedule

Rows = Sequence[Sequence[Action]]


def inference(schedule: Schedule) -> Rows:
    """Returns the actions of every row where no backward follows."""
    return with_parameters(schedule.forward_only(), range(schedule.stage_count), ()).rows


def two_passes(schedule: Schedule) -> tuple[Rows, Rows]:
    """Returns the actions of every row in the forward pass, and those in the backward pass."""
    forward = [[action for action in row if action.kind != RESHARD] for row in inference(schedule)]
    back = replace(schedule, rows=tuple(tuple(a for a in row if a.goes_back) for row in schedule.rows))
    every = range(schedule.stage_count)
    backward = [[a for a in row if a.kind != UNSHARD] for row in with_parameters(back, every, every).rows]
    return forward, backward


def one_pass(schedule: Schedule) -> Rows:
    """Returns the actions of every row where the loss is known, so that forwards and backwards run in one pass."""
    return with_parameters(schedule, range(schedule.stage_count), range(schedule.stage_count)).rows


class Passes(torch.autograd.Function):
    """Autograd function from what all stages are given to the results.

    What other ranks hold gets an empty gradient where those get one, so that ``.grad`` is ``None`` on all ranks or on none.
    With a loss, the forward runs the whole schedule, and the backward hands on what it gave; else the forward runs all
    forwards, and the backward all backwards.
    """

    @staticmethod
    def forward(
        ctx: Any, run: Any, given: Mapping[int, Sequence[Any]], elsewhere: Mapping[str, Tensor], anchor: Tensor, *values: Tensor
    ) -> tuple[Tensor, ...]:
        flat = values[: len(values) - len(elsewhere)]
        ctx.run, ctx.given, ctx.elsewhere, ctx.leaves = run, given, elsewhere, run.begin(given)
        ctx.set_materialize_grads(False)
        names = [o for o in run.graph.outputs if isinstance(o, str)]
        ctx.positions = [p for p, o in enumerate(run.graph.outputs) if isinstance(o, str)]
        ctx.step = None
        ctx.random = torch.get_rng_state() if run.draws_late or run.draws_once else None
        if run.loss is None:
            with within_pipeline():
                ctx.step = run.run(run.forwards, True)
            outputs = run.outputs(ctx.step)
        else:
            meta = run.graph.metas[run.names[run.loss]]
            device = flat[0].device if flat else None
            run.reached_now = run.reached[run.loss]
            run.seeds = {run.loss: torch.full((), run.seed, dtype=meta.dtype, device=device)}
            with within_pipeline():
                outputs = run.outputs(run.run(run.actions, True))
            ctx.at, ctx.seed = ctx.positions.index(run.loss), run.seed
        ctx.states = [stage.state for stage in run.runs.values()]
        run.rest()
        ctx.mark_non_differentiable(*[o for o, name in zip(outputs, names, strict=True) if name not in run.graph.needs_grad])
        return tuple(outputs)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        run = ctx.run
        if ctx.leaves is None:
            raise RuntimeError("the gradients of this step of a pipeline were handed on already; call the network again")
        leaves, states, step, ctx.leaves, ctx.states, ctx.step = ctx.leaves, ctx.states, ctx.step, None, None, None
        in_backward()  # on every rank, whether its stages communicate or not
        seeds = {p: g for p, g in zip(ctx.positions, gradients, strict=True) if g is not None}
        if not seeds:
            return None, None, None, None, *[None] * (len(leaves) + len(ctx.elsewhere))
        run.reached_now = frozenset().union(*(run.reached[position] for position in seeds))
        empty = [torch.zeros_like(value) if name in run.reached_now else None for name, value in ctx.elsewhere.items()]
        zero = torch.zeros(())  # the anchor's
        if step is None and set(seeds) == {run.loss}:
            seed = float(gradients[ctx.at])  # type: ignore[arg-type]
            if seed and math.isfinite(seed):
                run.seed = seed  # the next step begins with it, so that a loss scale reaches the first of its gradients
            scale = seed / ctx.seed
            return None, None, None, zero, *_taken(leaves, scale), *empty
        with within_pipeline():
            if step is None:  # of other results too, so that both passes run once more
                leaves = run.begin(ctx.given)
                with torch.random.fork_rng([], ctx.random is not None):
                    if ctx.random is not None:
                        torch.set_rng_state(ctx.random)
                    step = run.run(run.forwards, True)
            else:
                for stage, state in zip(run.runs.values(), states, strict=True):
                    stage.state = state
            run.seeds = seeds
            run.run(run.backwards, True, step)
        run.rest()
        return None, None, None, zero, *_taken(leaves), *empty


def _taken(leaves: Sequence[Tensor], scale: float = 1.0) -> list[Tensor | None]:
    """Takes the gradients away from leaves: autograd copies what somebody else has too."""
    found = [leaf.grad if leaf.grad is None or scale == 1.0 else leaf.grad.mul_(scale) for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return found
