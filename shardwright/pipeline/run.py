"""Runs the stages of a pipeline on simulated ranks: every row in one process, each action as soon as it can run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shardwright.base.derivatives import first_derivative_only
from shardwright.errors import ShardwrightError
from shardwright.ir.graph import Graph
from shardwright.ir.layout import Layout
from shardwright.pipeline.crossing import Held, cross
from shardwright.pipeline.micro import MICRO, Cut
from shardwright.pipeline.schedules.actions import Action
from shardwright.pipeline.schedules.schedule import Schedule
from shardwright.pipeline.stage_run import Pieces, StageRun
from shardwright.redistribute.steps import steps_between
from shardwright.world.simulated.steps import run_steps


@dataclass
class _Step:
    """Values and gradients of one step of training or inference."""

    sent: dict[tuple[str, int], Pieces] = field(default_factory=dict)  # by value and micro-batch
    given: dict[tuple[str, int], list[tuple[int, Pieces]]] = field(default_factory=dict)  # gradients, by reading stage
    returned: dict[int, list[Pieces]] = field(default_factory=dict)  # by position of the output
    done: set[Action] = field(default_factory=set)


class PipelineRun:
    """Stages bound on simulated ranks, and the schedule that they follow.

    Args:
        graph: the whole graph.
        stages: the stages.
        first_ranks: of every stage, the number of its first rank.
        cut: where micro-batches cut the values.
        schedule: in which order each row runs its actions.
        loss: the position of the output that gradients come from; ``None``: they come from the outputs, in the backward.
    """

    def __init__(
        self, graph: Graph, stages: Sequence[StageRun], first_ranks: Sequence[int], cut: Cut, schedule: Schedule,
        loss: int | None,
    ):  # fmt: skip
        self.graph, self.stages, self.first_ranks, self.cut = graph, stages, first_ranks, cut
        self.schedule, self.loss = schedule, loss
        self.readers: dict[str, list[int]] = {}
        for run in stages:
            for name in run.received:
                self.readers.setdefault(name, []).append(run.stage.index)
        self.maker = {name: source for run in stages for name, source in run.stage.received.items()}
        self.home = {position: run.stage.index for run in stages for position in run.stage.returned}
        self.seed = 1.0  # the gradient of the loss that the latest backward pass came with

    # -- running ----------------------------------------------------------------------------------------------------

    def __call__(self, values: Sequence[Sequence[Any]]) -> tuple[list[Any], list[list[Tensor]]]:
        """Runs a step.

        Args:
            values: for each stage the values of its program's inputs, without those that other stages send.

        Returns:
            The outputs, global tensors, and each stage's updates.
        """
        held = [run.begin(own) for run, own in zip(self.stages, values, strict=True)]
        flat = [tensor for stage in held for pieces in stage for tensor in pieces]
        if torch.is_grad_enabled() and any(t.requires_grad for t in flat):
            outputs = list(_Pipeline.apply(self, held, *flat))
        else:
            self._hold(held, flat)
            step = self._run(forward_only(self.schedule), False)
            outputs = self._outputs(step)
        return self._with_constants(outputs), [run.updates for run in self.stages]

    def _with_constants(self, outputs: Sequence[Any]) -> list[Any]:
        found = iter(outputs)
        return [next(found) if isinstance(o, str) else o.value for o in self.graph.outputs]

    def _hold(self, held: Sequence[Sequence[Pieces]], flat: Sequence[Tensor]) -> list[Tensor]:
        """Gives every stage its held values as leaves of their own; returns these."""
        leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in flat]
        rest = iter(leaves)
        for run, own in zip(self.stages, held, strict=True):
            run.hold([[next(rest) for _ in pieces] for pieces in own])
        return leaves

    def _run(self, rows: Sequence[Sequence[Action]], grad: bool, step: _Step | None = None) -> _Step:
        """Runs the actions of all rows, each as soon as what it needs is there."""
        step = step or _Step()
        waiting = [list(row) for row in rows]
        while any(waiting):
            moved = False
            for row in waiting:
                while row and self._is_ready(row[0], step):
                    action = row.pop(0)
                    self._act(action, step, grad)
                    step.done.add(action)
                    moved = True
            if not moved:
                raise ShardwrightError(
                    f"the schedule {self.schedule.name} never ends: {', '.join(str(r[0]) for r in waiting if r)} wait"
                )
        return step

    def _is_ready(self, action: Action, step: _Step) -> bool:
        stage, micro = action.stage, action.micro
        assert micro is not None
        if action.kind == "F":
            return all((name, micro) in step.sent for name in self.stages[stage].received)
        if action.kind in ("B", "I"):
            sent = self.stages[stage].stage.sent
            return (
                all(len(step.given.get((n, micro), ())) == self._gradients_of(n) for n in sent)
                and Action(stage, "F", micro) in step.done
            )
        return Action(stage, "I", micro) in step.done

    def _gradients_of(self, name: str) -> int:
        return len(self.readers[name]) if name in self.graph.needs_grad else 0

    def _act(self, action: Action, step: _Step, grad: bool) -> None:
        run, micro = self.stages[action.stage], action.micro
        assert micro is not None
        if action.kind == "F":
            received = {
                name: self._cross(name, micro, self.maker[name], action.stage, step.sent[name, micro]) for name in run.received
            }
            found = run.forward(micro, received, grad)
            step.sent.update(((name, micro), [p.detach() for p in found[name]]) for name in run.stage.sent)
            for position, name in run.stage.returned.items():
                step.returned.setdefault(position, []).append([p.detach() for p in found[name]])
        elif action.kind == "W":
            run.backward_weight(micro)
        else:
            gradients = self._gradients(run, micro, step)
            back = run.backward(micro, gradients) if action.kind == "B" else run.backward_input(micro, gradients)
            for name, pieces in back.items():
                step.given.setdefault((name, micro), []).append((action.stage, pieces))

    def _gradients(self, run: StageRun, micro: int, step: _Step) -> dict[str, Pieces]:
        """Returns the gradients of a stage's outputs: those that readers sent back, and of the loss or of the results."""
        found: dict[str, Pieces] = {}
        index = run.stage.index
        for name in run.stage.sent:
            for reader, pieces in step.given.pop((name, micro), ()):
                _add(found, name, self._cross(name, micro, reader, index, pieces, gradient=True))
        for position, name in run.stage.returned.items():
            if name in self.graph.needs_grad and (seed := self.seeds.get(position)) is not None:
                _add(found, name, self._seed_pieces(run, name, micro, seed))
        return found

    # -- values -----------------------------------------------------------------------------------------------------

    def held_of(self, stage: int, name: str, micro: int) -> Held:
        """Returns how the ranks of a stage hold a value of a micro-batch."""
        run = self.stages[stage]
        program = run.parts.each[micro]
        local = dict(run.outputs).get(name, name)
        return Held(program.layouts[local], program.rank_groups[local], self.first_ranks[stage])

    def shape_of(self, name: str, micro: int) -> tuple[int, ...]:
        """Returns the shape of a value of a micro-batch, over all ranks of its stage."""
        shape = list(self.graph.metas[name].shape)
        dim = self.cut.dim(name)
        if dim is not None:
            shape[dim] = self.pieces_of(name)[micro]
        return tuple(shape)

    def pieces_of(self, name: str) -> tuple[int, ...]:
        """Returns the sizes into which micro-batches cut a value."""
        layout, dim, shape = self.cut.layouts[name], self.cut.dim(name), self.graph.metas[name].shape
        assert dim is not None
        pieces = layout.pieces(dim, shape[dim])
        each = len(pieces) // layout.mesh.axis_size(MICRO)
        return tuple(sum(pieces[at : at + each]) for at in range(0, len(pieces), each))

    def _cross(self, name: str, micro: int, source: int, target: int, pieces: Pieces, gradient: bool = False) -> Pieces:
        before, after = self.held_of(source, name, micro), self.held_of(target, name, micro)
        return cross(pieces, before, after, self.shape_of(name, micro), gradient)

    def _seed_pieces(self, run: StageRun, name: str, micro: int, seed: Tensor) -> Pieces:
        """Returns the pieces of a result's gradient that belong to a micro-batch."""
        held = self.held_of(run.stage.index, name, micro)
        dim = self.cut.dim(name)
        if dim is not None:
            pieces = self.pieces_of(name)
            seed = seed.narrow(dim, sum(pieces[:micro]), pieces[micro])
        elif not self.cut.is_sum(name) and micro:
            seed = torch.zeros_like(seed)
        slices = held.layout.slices(tuple(seed.shape))
        found: dict[int, Tensor] = {}
        for rank, group in enumerate(held.groups):
            found.setdefault(group, seed[slices[rank]])
        return [found[group] for group in range(len(found))]

    seeds: Mapping[int, Tensor] = {}

    def _outputs(self, step: _Step) -> list[Tensor]:
        """Joins the results of all micro-batches to global tensors."""
        found = []
        for position, name in enumerate(self.graph.outputs):
            if not isinstance(name, str):
                continue
            stage = self.home[position]
            each = []
            for micro, pieces in enumerate(step.returned[position]):
                held, shape = self.held_of(stage, name, micro), self.shape_of(name, micro)
                steps = steps_between(held.layout, Layout.replicated(held.layout.mesh, held.layout.ndim), shape)
                each.append(run_steps([pieces[group] for group in held.groups], steps, shape)[0])
            dim = self.cut.dim(name)
            if dim is not None:
                found.append(torch.cat(each, dim))
            elif self.cut.is_sum(name):
                total = each[0].clone()
                for other in each[1:]:
                    total += other
                found.append(total)
            else:
                found.append(each[0].clone())
        return found


def _add(found: dict[str, Pieces], name: str, pieces: Pieces) -> None:
    found[name] = [a + b for a, b in zip(found[name], pieces, strict=True)] if name in found else pieces


def forward_only(schedule: Schedule) -> list[list[Action]]:
    """Returns the forward actions of every row."""
    return [[action for action in row if action.kind == "F"] for row in schedule.rows]


def backward_only(schedule: Schedule) -> list[list[Action]]:
    """Returns the backward actions of every row."""
    return [[action for action in row if action.kind in ("B", "I", "W")] for row in schedule.rows]


def computing(schedule: Schedule) -> list[list[Action]]:
    """Returns the actions of every row that compute."""
    return [[action for action in row if action.kind in ("F", "B", "I", "W")] for row in schedule.rows]


class _Pipeline(torch.autograd.Function):
    """Autograd function from the held values of all stages to the results.

    With a loss, the forward runs the whole schedule, and the backward hands on what it gave; else the forward runs all
    forwards, and the backward all backwards.
    """

    @staticmethod
    def forward(ctx: Any, run: PipelineRun, held: list[list[Pieces]], *flat: Tensor) -> tuple[Tensor, ...]:
        ctx.run, ctx.held, ctx.leaves = run, held, run._hold(held, flat)
        ctx.set_materialize_grads(False)
        names = [o for o in run.graph.outputs if isinstance(o, str)]
        ctx.positions = [p for p, o in enumerate(run.graph.outputs) if isinstance(o, str)]
        ctx.step = None
        if run.loss is None:
            ctx.step = run._run(forward_only(run.schedule), True)
            outputs = run._outputs(ctx.step)
        else:
            meta = run.graph.metas[run.graph.outputs[run.loss]]
            device = next((t.device for t in flat), None)
            run.seeds = {run.loss: torch.full((), run.seed, dtype=meta.dtype, device=device)}
            outputs = run._outputs(run._run(computing(run.schedule), True))
            ctx.at, ctx.seed = ctx.positions.index(run.loss), run.seed
        ctx.states = [stage.state for stage in run.stages]
        ctx.mark_non_differentiable(*[o for o, name in zip(outputs, names, strict=True) if name not in run.graph.needs_grad])
        return tuple(outputs)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        run = ctx.run
        if ctx.leaves is None:
            raise RuntimeError("the gradients of this step of a pipeline were handed on already; call the network again")
        leaves, ctx.leaves = ctx.leaves, None
        seeds = {p: g for p, g in zip(ctx.positions, gradients, strict=True) if g is not None}
        if not seeds:
            return None, None, *[None] * len(leaves)
        if ctx.step is None and set(seeds) == {run.loss}:
            seed = float(gradients[ctx.at])  # type: ignore[arg-type]
            if seed and math.isfinite(seed):
                run.seed = seed
            scale = seed / ctx.seed
            return (None, None, *[None if x.grad is None else x.grad.mul_(scale) if scale != 1 else x.grad for x in leaves])
        if ctx.step is None:  # of other results too, so that both passes run once more
            leaves = run._hold(ctx.held, leaves)
            ctx.step = run._run(forward_only(run.schedule), True)
            ctx.states = [stage.state for stage in run.stages]
        for stage, state in zip(run.stages, ctx.states, strict=True):
            stage.state = state
        run.seeds = seeds
        run._run(backward_only(run.schedule), True, ctx.step)
        return None, None, *[leaf.grad for leaf in leaves]
