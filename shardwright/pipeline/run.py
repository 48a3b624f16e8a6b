"""Runs the stages of a pipeline: what both worlds share, and simulated ranks, where one process runs every row."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shardwright.agreement.job_watch import in_backward, within_pipeline
from shardwright.base.derivatives import first_derivative_only
from shardwright.errors import PipelineError
from shardwright.ir.graph import Graph
from shardwright.ir.layout import Layout
from shardwright.pipeline.crossing import Held, cross
from shardwright.pipeline.cut import Stage
from shardwright.pipeline.micro import Cut, pieces_of_micro_batches
from shardwright.pipeline.parts import Parts
from shardwright.pipeline.schedules.actions import Action
from shardwright.pipeline.schedules.schedule import Schedule
from shardwright.pipeline.stage_run import Pieces, StageRun, StepState
from shardwright.redistribute.steps import steps_between
from shardwright.world.simulated.steps import run_steps


@dataclass
class Step:
    """One step of training or inference under way.

    Attributes:
        sent: pieces of values, by value and micro-batch.
        given: gradients that reading stages sent back, by value and micro-batch, each with the stage.
        returned: pieces of results of each micro-batch, by position of the output.
        done: the actions that have run.
    """

    sent: dict[tuple[str, int], Pieces] = field(default_factory=dict)
    given: dict[tuple[str, int], list[tuple[int, Pieces]]] = field(default_factory=dict)
    returned: dict[int, list[Pieces]] = field(default_factory=dict)
    done: set[Action] = field(default_factory=set)


@dataclass(frozen=True)
class StagePlace:
    """A stage, its program in parts, and its first rank."""

    stage: Stage
    parts: Parts
    first_rank: int


class PipelineRun(ABC):
    """Stages and the schedule that they follow.

    Args:
        graph: the whole graph.
        places: the stages.
        runs: by number, the stages that this process runs, bound.
        cut: where micro-batches cut the values.
        schedule: in which order each row runs its actions.
        loss: the position of the output that gradients come from; ``None``: they come from the outputs, in the backward.
    """

    def __init__(
        self, graph: Graph, places: Sequence[StagePlace], runs: Mapping[int, StageRun], cut: Cut, schedule: Schedule,
        loss: int | None,
    ):  # fmt: skip
        self.graph, self.places, self.runs, self.cut = graph, places, runs, cut
        self.schedule, self.loss = schedule, loss
        self.readers: dict[str, list[int]] = {}
        for place in places:
            for name in place.stage.received:
                self.readers.setdefault(name, []).append(place.stage.index)
        self.maker = {name: source for place in places for name, source in place.stage.received.items()}
        self.home = {position: place.stage.index for place in places for position in place.stage.returned}
        self.names = {position: output for position, output in enumerate(graph.outputs) if isinstance(output, str)}
        self.forwards, self.backwards, self.actions = forward_only(schedule), backward_only(schedule), computing(schedule)
        self.seed = 1.0  # the gradient of the loss that the latest backward pass came with
        self.seeds: dict[int, Tensor] = {}  # by position, the gradients of results

    # -- running ----------------------------------------------------------------------------------------------------

    def __call__(self, values: Mapping[int, Sequence[Any]]) -> tuple[list[Any], dict[int, list[Tensor]]]:
        """Runs a step.

        Args:
            values: for each stage of this process the values of its program's inputs, without those that stages send.

        Returns:
            The outputs, and each stage's updates.
        """
        held = self.begin(values)
        flat = [tensor for stage in held for pieces in stage for tensor in pieces]
        if torch.is_grad_enabled() and self.graph.needs_grad.intersection(self.names.values()):
            anchor = torch.zeros((), requires_grad=True)  # a process whose stages have no parameters takes part too
            outputs = list(_Pipeline.apply(self, held, anchor, *flat))
        else:
            self.hold(held, flat)
            outputs = self.outputs(self.run(self.forwards, False))
            self.rest()
        found = iter(outputs)
        results = [next(found) if isinstance(o, str) else o.value for o in self.graph.outputs]
        return results, {index: run.updates for index, run in self.runs.items()}

    def begin(self, values: Mapping[int, Sequence[Any]]) -> list[list[Pieces]]:
        """Runs what each stage does once per step."""
        return [run.begin(values[index]) for index, run in self.runs.items()]

    def hold(self, held: Sequence[Sequence[Pieces]], flat: Sequence[Tensor]) -> list[Tensor]:
        """Gives every stage its held values as leaves of their own; returns these."""
        leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in flat]
        rest = iter(leaves)
        for run, own in zip(self.runs.values(), held, strict=True):
            run.hold([[next(rest) for _ in pieces] for pieces in own])
        return leaves

    def rest(self) -> None:
        """Lets stages forget the step, so that nothing of it outlives what autograd keeps."""
        for run in self.runs.values():
            run.state = StepState([], {})

    @abstractmethod
    def run(self, rows: Sequence[Sequence[Action]], grad: bool, step: Step | None = None) -> Step:
        """Runs actions.

        Args:
            rows: those of every row.
            grad: whether a backward will follow a forward.
            step: what has run before.
        """

    @abstractmethod
    def outputs(self, step: Step) -> list[Any]:
        """Returns the results of a step, in the order of the graph's outputs, without constants."""

    # -- values -----------------------------------------------------------------------------------------------------

    def held_of(self, stage: int, name: str, micro: int) -> Held:
        """Returns how the ranks of a stage hold a value of a micro-batch."""
        place = self.places[stage]
        program = place.parts.each[micro]
        outputs = (*place.stage.sent, *place.stage.returned.values())
        local = dict(zip(outputs, program.outputs, strict=True)).get(name, name)
        return Held(program.layouts[local], program.rank_groups[local], place.first_rank)

    def shape_of(self, name: str, micro: int) -> tuple[int, ...]:
        """Returns the shape of a value of a micro-batch, over all ranks of its stage."""
        shape = list(self.graph.metas[name].shape)
        dim = self.cut.dim(name)
        if dim is not None:
            shape[dim] = self.sizes_of(name)[micro]
        return tuple(shape)

    def sizes_of(self, name: str) -> tuple[int, ...]:
        """Returns the sizes into which micro-batches cut a value."""
        dim = self.cut.dim(name)
        assert dim is not None
        return pieces_of_micro_batches(self.cut.layouts[name], dim, self.graph.metas[name].shape[dim])

    def seed_of(self, name: str, micro: int, seed: Tensor) -> Tensor:
        """Returns the part of a result's gradient that belongs to a micro-batch."""
        dim = self.cut.dim(name)
        if dim is not None:
            sizes = self.sizes_of(name)
            return seed.narrow(dim, sum(sizes[:micro]), sizes[micro])
        return seed if self.cut.is_sum(name) or not micro else torch.zeros_like(seed)

    def joined(self, name: str, each: Sequence[Tensor]) -> Tensor:
        """Joins what micro-batches give of a result."""
        dim = self.cut.dim(name)
        if dim is not None:
            return torch.cat(list(each), dim)
        total = each[0].clone()
        for other in each[1:] if self.cut.is_sum(name) else ():
            total += other
        return total


class SimulatedPipelineRun(PipelineRun):
    """All rows in one process, each action as soon as it can run."""

    def run(self, rows: Sequence[Sequence[Action]], grad: bool, step: Step | None = None) -> Step:
        """Runs actions.

        Args:
            rows, grad, step: see :meth:`PipelineRun.run`.

        Raises:
            PipelineError: the rows wait for each other.
        """
        step = step or Step()
        waiting = [list(row) for row in rows]
        while any(waiting):
            ready = [row for row in waiting if row and self._is_ready(row[0], step)]
            if not ready:
                stuck = ", ".join(str(row[0]) for row in waiting if row)
                raise PipelineError(f"the schedule {self.schedule.name} never ends: {stuck} wait")
            for row in ready:
                while row and self._is_ready(row[0], step):
                    action = row.pop(0)
                    self._act(action, step, grad)
                    step.done.add(action)
        return step

    def _is_ready(self, action: Action, step: Step) -> bool:
        stage, micro = action.stage, action.micro
        assert micro is not None
        if action.kind == "F":
            return all((name, micro) in step.sent for name in self.places[stage].stage.received)
        if action.kind == "W":
            return Action(stage, "I", micro) in step.done
        sent = self.places[stage].stage.sent
        are_there = all(len(step.given.get((name, micro), ())) == self._gradients_of(name) for name in sent)
        return are_there and Action(stage, "F", micro) in step.done

    def _gradients_of(self, name: str) -> int:
        return len(self.readers[name]) if name in self.graph.needs_grad else 0

    def _act(self, action: Action, step: Step, grad: bool) -> None:
        run, micro, index = self.runs[action.stage], action.micro, action.stage
        assert micro is not None
        if action.kind == "F":
            received = {
                name: self._cross(name, micro, self.maker[name], index, step.sent[name, micro]) for name in run.received
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
                step.given.setdefault((name, micro), []).append((index, pieces))

    def _gradients(self, run: StageRun, micro: int, step: Step) -> dict[str, Pieces]:
        """Returns the gradients of a stage's outputs: those that readers sent back, and of the loss or of the results."""
        found: dict[str, Pieces] = {}
        index = run.stage.index
        for name in run.stage.sent:
            for reader, pieces in sorted(step.given.pop((name, micro), ()), key=lambda each: each[0]):
                add_pieces(found, name, self._cross(name, micro, reader, index, pieces, gradient=True))
        for position, name in run.stage.returned.items():
            seed = self.seeds.get(position)
            if seed is not None and name in self.graph.needs_grad:
                add_pieces(found, name, self._seed_pieces(index, name, micro, seed))
        return found

    def _cross(self, name: str, micro: int, source: int, target: int, pieces: Pieces, gradient: bool = False) -> Pieces:
        before, after = self.held_of(source, name, micro), self.held_of(target, name, micro)
        return cross(pieces, before, after, self.shape_of(name, micro), gradient)

    def _seed_pieces(self, stage: int, name: str, micro: int, seed: Tensor) -> Pieces:
        held, seed = self.held_of(stage, name, micro), self.seed_of(name, micro, seed)
        slices = held.layout.slices(tuple(seed.shape))
        found: dict[int, Tensor] = {}
        for rank, group in enumerate(held.groups):
            found.setdefault(group, seed[slices[rank]])
        return [found[group] for group in range(len(found))]

    def outputs(self, step: Step) -> list[Any]:
        """Joins the results of all micro-batches to global tensors."""
        found = []
        for position, name in self.names.items():
            each = []
            for micro, pieces in enumerate(step.returned[position]):
                held, shape = self.held_of(self.home[position], name, micro), self.shape_of(name, micro)
                steps = steps_between(held.layout, Layout.replicated(held.layout.mesh, held.layout.ndim), shape)
                each.append(run_steps([pieces[group] for group in held.groups], steps, shape)[0])
            found.append(self.joined(name, each))
        return found


def add_pieces(found: dict[str, Pieces], name: str, pieces: Pieces) -> None:
    """Adds the pieces of one more gradient of a value."""
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
    def forward(ctx: Any, run: PipelineRun, held: list[list[Pieces]], anchor: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
        ctx.run, ctx.held, ctx.leaves = run, held, run.hold(held, flat)
        ctx.set_materialize_grads(False)
        names = [o for o in run.graph.outputs if isinstance(o, str)]
        ctx.positions = [p for p, o in enumerate(run.graph.outputs) if isinstance(o, str)]
        ctx.step = None
        if run.loss is None:
            with within_pipeline():
                ctx.step = run.run(run.forwards, True)
            outputs = run.outputs(ctx.step)
        else:
            meta = run.graph.metas[run.names[run.loss]]
            device = flat[0].device if flat else None
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
            return None, None, None, *[None] * len(leaves)
        if step is None and set(seeds) == {run.loss}:
            seed = float(gradients[ctx.at])  # type: ignore[arg-type]
            if seed and math.isfinite(seed):
                run.seed = seed  # the next step begins with it, so that a loss scale reaches the first of its gradients
            scale = seed / ctx.seed
            return None, None, None, *_taken(leaves, scale)
        with within_pipeline():
            if step is None:  # of other results too, so that both passes run once more
                leaves = run.hold(ctx.held, leaves)
                step = run.run(run.forwards, True)
            else:
                for stage, state in zip(run.runs.values(), states, strict=True):
                    stage.state = state
            run.seeds = seeds
            run.run(run.backwards, True, step)
        run.rest()
        return None, None, None, *_taken(leaves)


def _taken(leaves: Sequence[Tensor], scale: float = 1.0) -> list[Tensor | None]:
    """Takes the gradients away from leaves: autograd copies what somebody else has too."""
    found = [leaf.grad if leaf.grad is None or scale == 1.0 else leaf.grad.mul_(scale) for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return found
