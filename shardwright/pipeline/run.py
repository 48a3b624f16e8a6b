"""Runs the stages of a pipeline: what both worlds share, and simulated ranks, where one process runs every row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from shardwright.errors import PipelineError
from shardwright.ir.graph import Graph
from shardwright.ir.layout import Layout
from shardwright.pipeline.crossing import Held, add_pieces, cross
from shardwright.pipeline.cut import Stage, gives_gradients
from shardwright.pipeline.parts import Parts
from shardwright.pipeline.passes import Passes, inference, one_pass, two_passes
from shardwright.pipeline.schedules.actions import REDUCE_GRAD, RESHARD, UNSHARD, Action
from shardwright.pipeline.schedules.schedule import Schedule
from shardwright.pipeline.stage_run import Pieces, StageRun, StepState, draws_once
from shardwright.pipeline.units import Cut
from shardwright.redistribute.steps import steps_between
from shardwright.world.simulated.steps import run_steps

_NONE: Mapping[str, Tensor] = MappingProxyType({})


@dataclass
class Step:
    """One step of training or inference under way.

    Attributes:
        sent: pieces of values, by value and micro-batch.
        given: gradients that reading stages sent back, by value and micro-batch, each with the stage.
        returned: pieces of results of each micro-batch, by position of the output.
        done: the actions that have run.
        tail_waits: whether the backward of the tail is still to be run.
    """

    sent: dict[tuple[str, int], Pieces] = field(default_factory=dict)
    given: dict[tuple[str, int], list[tuple[int, Pieces]]] = field(default_factory=dict)
    returned: dict[int, list[Pieces]] = field(default_factory=dict)
    done: set[Action] = field(default_factory=set)
    tail_waits: bool = False


@dataclass(frozen=True)
class StagePlace:
    """A stage, its program in parts, its first rank, and whether it is a tail, which runs once."""

    stage: Stage
    parts: Parts
    first_rank: int
    is_tail: bool = False

    @property
    def ranks(self) -> range:
        """The numbers of its ranks in the world."""
        return range(self.first_rank, self.first_rank + self.parts.once.world_size)


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
        self.micro_count = schedule.micro_count
        self.tail = next((place.stage.index for place in places if place.is_tail), None)
        self.draws_late = self.micro_count == 1 and any(node.op.draws for node in graph.nodes)
        self.draws_once = any(draws_once(place.parts) for place in places)
        self.inference, self.actions = inference(schedule), one_pass(schedule)
        self.forwards, self.backwards = two_passes(schedule)
        self.reached = {position: gives_gradients(graph, name) for position, name in self.names.items()}
        # what gets gradients in the latest backward pass; only these travel back, as what gets none is to have none
        self.reached_now: frozenset[str] = frozenset()
        self.seed = 1.0  # the gradient of the loss that the latest backward pass came with
        self.seeds: dict[int, Tensor] = {}  # by position, the gradients of results

    # -- running ----------------------------------------------------------------------------------------------------

    def __call__(
        self,
        values: Mapping[int, Sequence[Any]],
        buffers: Mapping[str, Tensor] = _NONE,
        elsewhere: Mapping[str, Tensor] = _NONE,
        anchor: Tensor | None = None,
    ) -> tuple[list[Any], dict[str, Tensor]]:
        """Runs a step.

        Args:
            values: for each stage of this process the values of its program's inputs, without those that stages send.
            buffers: those that operators write to in place, by value.
            elsewhere: what only stages of other processes read and train, without elements here, by value.
            anchor: gets a gradient of 0 in every backward pass; by default a tensor made here.

        Returns:
            The outputs, and the new values of other buffers that are written to.
        """
        if torch.is_grad_enabled() and self.graph.needs_grad.intersection(self.names.values()):
            if anchor is None:  # a process whose stages have no parameters takes part too
                anchor = torch.zeros((), requires_grad=True)
            flat = [value for index in self.runs for value in values[index] if _is_trained(value)]
            outputs = list(Passes.apply(self, values, elsewhere, anchor, *flat, *elsewhere.values()))
        else:
            self.begin(values)
            outputs = self.outputs(self.run(self.inference, False))
            self.rest()
        found = iter(outputs)
        results = [self.shown(next(found)) if isinstance(o, str) else o.value for o in self.graph.outputs]
        return results, self.updates(buffers)

    def shown(self, result: Tensor) -> Tensor:
        """Returns a result as the caller gets it."""
        return result

    def updates(self, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns what the stages of this process have written to buffers, but for ``buffers``, written to in place."""
        return {
            name: new for run in self.runs.values() for (name, _), new in zip(run.stage.graph.updates, run.updates, strict=True)
        }

    def begin(self, values: Mapping[int, Sequence[Any]]) -> list[Tensor]:
        """Begins a step of every stage; returns the leaves of what is trained, which get gradients."""
        leaves = []
        for index, run in self.runs.items():
            given = [value.detach().requires_grad_() if _is_trained(value) else value for value in values[index]]
            leaves += [value for value in given if _is_trained(value)]
            run.begin(given)
        return leaves

    def draw_once(self, grad: bool) -> None:
        """Runs what draws random numbers once per step: of all stages in their order, as a single device does."""
        if self.draws_once:
            for run in self.runs.values():
                run.unshard(grad)

    def of_parameters(self, action: Action, grad: bool) -> None:
        """Runs an action of a stage's parameters.

        Args:
            action: the action. A schedule may free parameters before the last work of their stage, which then holds them on.
            grad: whether a backward will follow.
        """
        run = self.runs[action.stage]
        if action.kind == UNSHARD:
            run.unshard(grad)
        elif action.kind == RESHARD and not run.state.running and not self.draws_once:  # what is drawn stays for the step
            run.reshard()
        elif action.kind == REDUCE_GRAD:
            run.reduce_gradients()

    def rest(self) -> None:
        """Lets stages forget the step, so that nothing of it outlives what autograd keeps."""
        for run in self.runs.values():
            run.state = StepState()

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

    # -- the tail ---------------------------------------------------------------------------------------------------

    def is_before_tail(self, action: Action) -> bool:
        """Tells whether the tail comes directly after an action: the last forward of the last stage."""
        return action.kind == "F" and self.tail == action.stage + 1 and action.micro == self.micro_count - 1

    def tail_forward(self, step: Step, grad: bool, received: Callable[[str, int], Pieces]) -> None:
        """Runs the tail on what all micro-batches have made.

        Args:
            step: the step.
            grad: whether a backward will follow.
            received: returns the pieces of a value of a micro-batch, as the tail receives them.
        """
        assert self.tail is not None
        run = self.runs[self.tail]
        run.unshard(grad)
        whole: dict[str, Pieces] = {}
        for name in run.received:
            each = [received(name, micro) for micro in range(self.micro_count)]
            whole[name] = [self.joined(name, pieces) for pieces in zip(*each, strict=True)]
        found = run.forward(0, whole, grad)
        for position, name in run.stage.returned.items():
            step.returned[position] = [[p.detach() for p in found[name]]]
        step.tail_waits = grad
        if not grad:
            run.reshard()

    def tail_backward(self, step: Step, gradients: Mapping[str, Pieces], give: Callable[[str, int, Pieces], None]) -> None:
        """Runs the backward of the tail, and gives every micro-batch its part.

        Args:
            step: the step.
            gradients: of the results.
            give: takes the gradient of a value of a micro-batch.
        """
        assert self.tail is not None
        step.tail_waits = False
        run = self.runs[self.tail]
        for name, pieces in run.backward(0, gradients).items():
            if name not in self.reached_now:
                continue
            for micro in range(self.micro_count):
                give(name, micro, [self.seed_of(name, micro, piece).contiguous() for piece in pieces])
        run.reduce_gradients()

    # -- values -----------------------------------------------------------------------------------------------------

    def count_of(self, stage: int) -> int:
        """Returns how often a stage runs in a step."""
        return 1 if stage == self.tail else self.micro_count

    def held_of(self, stage: int, name: str, micro: int) -> Held:
        """Returns how the ranks of a stage hold a value of a micro-batch."""
        place = self.places[stage]
        program = place.parts.each[0 if place.is_tail else micro]
        outputs = (*place.stage.sent, *place.stage.returned.values())
        local = dict(zip(outputs, program.outputs)).get(name, name)
        return Held(program.layouts[local], program.rank_groups[local], place.first_rank)

    def shape_of(self, name: str, micro: int) -> tuple[int, ...]:
        """Returns the shape of a value of a micro-batch, over all ranks of its stage."""
        return self.cut.shape_of(name, self.graph.metas[name].shape, micro)

    def seed_of(self, name: str, micro: int, seed: Tensor) -> Tensor:
        """Returns the part of a result's gradient that belongs to a micro-batch."""
        return self.cut.piece_of(name, seed, micro)

    def joined(self, name: str, each: Sequence[Tensor]) -> Tensor:
        """Joins what micro-batches give of a result."""
        return self.cut.joined(name, each)


class SimulatedPipelineRun(PipelineRun):
    """All rows in one process, each action as soon as it can run."""

    def run(self, rows: Sequence[Sequence[Action]], grad: bool, step: Step | None = None) -> Step:
        """Runs actions.

        Args:
            rows, grad, step: see :meth:`PipelineRun.run`.

        Raises:
            PipelineError: the rows wait for each other.
        """
        if step is None:
            step = Step()
            self.draw_once(grad)
        waiting = [list(row) for row in rows]
        goes_back = any(action.goes_back for row in rows for action in row)
        if step.tail_waits and goes_back:
            self._tail_backward(step)
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
                    if self.is_before_tail(action):
                        self.tail_forward(step, grad, partial(self._for_tail, step))
                        if grad and goes_back:
                            self._tail_backward(step)
        return step

    def _is_ready(self, action: Action, step: Step) -> bool:
        stage, micro = action.stage, action.micro
        if not action.is_compute:
            return True
        assert micro is not None
        if action.kind == "F":
            needed = [(name, micro) for name in self.places[stage].stage.received]
            if self.is_before_tail(action):
                others = [name for name, source in self.places[stage + 1].stage.received.items() if source != stage]
                needed += [(name, m) for name in others for m in range(self.micro_count)]
            return all(each in step.sent for each in needed)
        if action.kind == "W":
            return Action(stage, "I", micro) in step.done
        sent = self.places[stage].stage.sent
        are_there = all(len(step.given.get((name, micro), ())) == self._gradients_of(name) for name in sent)
        return are_there and Action(stage, "F", micro) in step.done

    def _gradients_of(self, name: str) -> int:
        return len(self.readers[name]) if name in self.reached_now else 0

    def _act(self, action: Action, step: Step, grad: bool) -> None:
        run, micro, index = self.runs[action.stage], action.micro, action.stage
        if not action.is_compute:
            return self.of_parameters(action, grad)
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
                if name in self.reached_now:
                    step.given.setdefault((name, micro), []).append((index, pieces))

    def _for_tail(self, step: Step, name: str, micro: int) -> Pieces:
        assert self.tail is not None
        return self._cross(name, micro, self.maker[name], self.tail, step.sent[name, micro])

    def _tail_backward(self, step: Step) -> None:
        assert self.tail is not None
        index = self.tail

        def give(name: str, micro: int, pieces: Pieces) -> None:
            step.given.setdefault((name, micro), []).append((index, pieces))

        self.tail_backward(step, self._gradients(self.runs[index], 0, step), give)

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


def _is_trained(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
