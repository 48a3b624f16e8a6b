"""Predicts the memory of the ranks of a pipeline over a step, without running the step.

Every row is simulated on shapes in the order of its schedule, each action on the programs that it runs, as
:mod:`shardwright.plan.memory` simulates a step of other plans: with what is kept between a forward and its backward, received
ahead, still on its way, and added up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch

from shardwright.cost import algorithms as calibration
from shardwright.ir.graph import Graph
from shardwright.ir.largest_piece import local_shape
from shardwright.ir.plan import Plan
from shardwright.ir.program import LocalProgram
from shardwright.pipeline.cut import Stage, gives_gradients, loss_of
from shardwright.pipeline.flight import places_of
from shardwright.pipeline.micro_memory import (
    HeldValue,
    HeldValues,
    MicroCalls,
    MicroState,
    RunningMicro,
    add_put_off,
    of_first_rank,
)
from shardwright.pipeline.parts import Parts
from shardwright.pipeline.schedules.actions import BACKWARD, FORWARD, INPUT, REDUCE_GRAD, RESHARD, UNSHARD, WEIGHT, Action
from shardwright.pipeline.stage_run import draws_once
from shardwright.plan.memory import MemoryTimeline
from shardwright.plan.memory.local_tensor import LocalTensor, contiguous_strides
from shardwright.plan.memory.moves import MovePlayer
from shardwright.plan.memory.training_step import ForwardPlayer
from shardwright.plan.memory.usage import Storage, Usage


class StageOfRow(Protocol):
    """Interface of a stage with its programs."""

    @property
    def stage(self) -> Stage: ...
    @property
    def whole(self) -> Plan: ...
    @property
    def parts(self) -> Parts: ...


def row_memory(
    planned: Sequence[StageOfRow], rows: Sequence[Sequence[Action]], row: int, graph: Graph, optimizer: float = 0.0
) -> MemoryTimeline:
    """Predicts the memory of the first rank of a row over a step, from the second on.

    Args:
        planned: every stage.
        rows: the actions of all rows.
        row: which one.
        graph: of the whole network.
        optimizer: bytes of the optimizer's state per byte of parameters.
    """
    return _Row(planned, rows, row, graph, optimizer).run()


def kept_of_micro(own: StageOfRow, graph: Graph) -> float:
    """Predicts the bytes that a stage's first rank holds of the first micro-batch from its forward to its backward.

    Of slices it is their mean, as later ones hold the keys and values of more positions.

    Args:
        own: the stage.
        graph: of the whole network.
    """
    slices = own.parts.slices
    row = _Row([own], [[Action(own.stage.index, FORWARD, unit) for unit in range(slices)]], 0, graph, 0.0)
    row.begin()
    row.play(Action(own.stage.index, UNSHARD))
    before = row.usage.total
    for action in row.row:
        row.play(action)
    return (row.usage.total - before) / slices


class _Row:
    """Simulates the actions of one row."""

    def __init__(
        self, planned: Sequence[StageOfRow], rows: Sequence[Sequence[Action]], row: int, graph: Graph, optimizer: float
    ):
        self.planned = {own.stage.index: own for own in planned}
        self.row, self.graph, self.optimizer = rows[row], graph, optimizer
        self.places = places_of(rows)
        self.own = sorted({action.stage for action in self.row})
        self.usage = Usage()
        machine = planned[0].whole.machine
        self.device = "cpu" if machine is None else machine.device
        self.choose = calibration.load().choose if self.device == "cpu" else None
        self.held: dict[int, HeldValues] = {}
        self.once: dict[int, MicroState] = {}
        self.freed: set[int] = set()
        self.parameters: dict[str, Storage] = {}
        self.running: dict[tuple[int, int], RunningMicro] = {}
        self.coming: dict[tuple[Action, str], Storage] = {}
        self.leaving: list[tuple[tuple[int, int], Storage]] = []  # with the place of the action that reads it
        self.readers: dict[str, list[int]] = {}
        for own in planned:
            for name in own.stage.received:
                self.readers.setdefault(name, []).append(own.stage.index)
        self.guessed: dict[str, None] = {}
        loss = loss_of(graph)
        self.has_loss = loss is not None
        # values whose gradients travel back
        self.reached = graph.needs_grad if loss is None else gives_gradients(graph, str(graph.outputs[loss]))

    def run(self) -> MemoryTimeline:
        self.begin()
        for at, action in enumerate(self.row):
            for coming in self.row[at : at + 2]:
                self._ask(coming)
            self.play(action)
        for _, storage in self.leaving:
            self.usage.drop(storage)
        self.usage.phase = "optimizer"
        self.usage.point("step", 0.0)
        pieces = sorted(((name, s.size) for name, s in self.parameters.items()), key=lambda piece: (-piece[1], piece[0]))
        return MemoryTimeline(tuple(self.usage.points), (), tuple(pieces), tuple(self.guessed))

    def begin(self) -> None:
        """Adds what exists when the step begins."""
        given: dict[str, Storage] = {}
        for i in self.graph.inputs:
            if i.kind == "input":
                given[i.value] = self.usage.hold(Storage(float(_bytes(i.meta.shape, i.meta.dtype)), "activations", i.value))
        for index in self.own:
            self._begin_stage(self.planned[index], given)
        self.usage.hold(Storage(self.optimizer * sum(s.size for s in self.parameters.values()), "optimizer", ""))
        if any(draws_once(self.planned[index].parts) for index in self.own):
            for index in self.own:
                self._unshard(index)

    def _begin_stage(self, own: StageOfRow, given: dict[str, Storage]) -> None:
        program = own.parts.once
        self.held[own.stage.index] = leaves = HeldValues()
        self.once[own.stage.index] = state = MicroState(self.usage, leaves)
        trained = {i.value for i in own.stage.graph.inputs if i.kind == "parameter" and i.requires_grad}
        for placed in program.inputs:
            kind = next(i.kind for i in own.stage.graph.inputs if i.value == placed.name)
            tensor = _tensor_of(placed, placed.name in trained)
            storage = given.get(placed.name)
            if storage is None:
                storage = Storage(
                    float(tensor.bytes), "parameters" if kind in ("parameter", "buffer") else "activations", placed.name
                )
                given[placed.name] = self.usage.hold(storage)
            if placed.name in trained:
                self.parameters[placed.name] = storage
            state.define(placed.name, storage, tensor)

    def _unshard(self, stage: int) -> None:
        """Plays what runs once, such as gathers of parameters."""
        own, state, leaves = self.planned[stage], self.once[stage], self.held[stage]
        if leaves:
            return
        self._forward(of_first_rank(own.parts.once), state, own.parts.held)
        for name in own.parts.held:
            value = state.values[name]
            leaves[name] = HeldValue(self.usage.hold(value.storage), value.tensor)
        for name in list(state.values):
            state.forget(name)

    def _forward(self, program: LocalProgram, state: MicroState, keeps: Iterable[str]) -> None:
        """Plays a program; values that are kept stay in the state."""
        calls, kept = MicroCalls(state, self.device, program.kept), set(keeps)
        player = ForwardPlayer(calls, MovePlayer(state, program, self.choose, True))
        for instruction, dying in zip(program.instructions, program.last_uses()):
            player.dying = [name for name in dying if name not in kept]
            player.visit(instruction)
            for name in player.dying:
                state.forget(name)
        self.guessed |= state.guessed

    def _reshard(self, stage: int) -> None:
        """Frees what runs once has made; the sums of its gradients stay."""
        if stage not in self.freed and not any(own == stage for own, _ in self.running):
            self.freed.add(stage)
            for leaf in self.held[stage].values():
                self.usage.drop(leaf.storage)

    def _reduce_gradients(self, stage: int) -> None:
        """Hands the gradients of what was made once on to the parameters."""
        self._reshard(stage)
        state, leaves = self.once[stage], self.held[stage]
        made = {name: leaf for name, leaf in leaves.items() if name not in self.parameters and leaf.gradient is not None}
        for name, leaf in made.items():
            del leaves[name]
            assert leaf.gradient is not None
            state.add_gradient(name, leaf.gradient, leaf.tensor.shape, contiguous_strides(leaf.tensor.shape), name)
            self.usage.drop(leaf.gradient)
        for play in reversed(state.tape):
            play()

    # -- actions ----------------------------------------------------------------------------------------------------

    def _ask(self, action: Action) -> None:
        """Makes what an action receives."""
        stage = self.planned[action.stage].stage
        if action.kind == FORWARD:
            names = [name for name in stage.received if (action, name) not in self.coming]
        elif action.kind == WEIGHT:
            return
        else:
            names = [n for n in stage.sent if n in self.reached and (action, n) not in self.coming]
        for name in names:
            piece = Storage(float(self._piece(action, name).bytes), "activations", name)
            self.coming[action, name] = self.usage.hold(piece)

    def _piece(self, action: Action, name: str) -> LocalTensor:
        """Returns a received or sent value of a micro-batch, as this row has it."""
        own = self.planned[action.stage]
        program = own.parts.each[action.micro or 0]
        outputs = dict(zip((*own.stage.sent, *own.stage.returned.values()), program.outputs))  # what is kept follows
        placed = next((i for i in program.inputs if i.name == name), None)
        if placed is not None:
            return _tensor_of(placed, name in self.graph.needs_grad)
        running = self.running.get((action.stage, action.micro or 0))
        if running is not None:
            return running.state.all_values[str(outputs[name])].tensor
        meta = self.graph.metas[name]
        shape = local_shape(program.layouts[str(outputs[name])], meta.shape)
        micro, slices = len(own.parts.each) // own.parts.slices, own.parts.slices
        shape = (-(-shape[0] // micro), *shape[1:]) if shape else shape  # asked for before its forward
        shape = (-(-math.prod(shape) // slices),) if slices > 1 else shape
        return LocalTensor(shape, contiguous_strides(shape), meta.dtype or torch.float32, True)

    def play(self, action: Action) -> None:
        """Plays an action."""
        if action.kind == UNSHARD:
            return self._unshard(action.stage)
        if action.kind == RESHARD:
            return self._reshard(action.stage)
        if action.kind == REDUCE_GRAD:
            return self._reduce_gradients(action.stage)
        self.usage.phase = "forward" if action.kind == FORWARD else "backward"
        if action.kind == FORWARD:
            self._ask(action)
            self._play_forward(action)
        elif action.kind in (BACKWARD, INPUT):
            self._play_backward(action)
        elif action.kind == WEIGHT:
            self._play_weight(action)

    def _arrived(self, action: Action, sources: Iterable[int]) -> None:
        """Frees what has arrived: what stages send tells that their rows have read all that they read before.

        Args:
            action: the action that receives.
            sources: the stages that it receives from.
        """
        for source in sources:
            row, reached = self.places.get((source, action.micro or 0, action.kind != FORWARD), (-1, 0))
            there = [each for each in self.leaving if each[0][0] == row and each[0][1] <= reached]
            self.leaving = [each for each in self.leaving if each not in there]
            for _, storage in there:
                self.usage.drop(storage)

    def _play_forward(self, action: Action) -> None:
        own, micro = self.planned[action.stage], action.micro or 0
        self._arrived(action, own.stage.received.values())
        held = self.held[action.stage]
        state = MicroState(self.usage, held)
        for name, leaf in held.items():
            state.define(name, leaf.storage, leaf.tensor)
        self._forward(of_first_rank(own.parts.cuts[micro]), state, (*held, *own.parts.cut))
        holds = []
        for name in own.stage.received:
            storage = self.coming.pop((action, name))
            holds.append(storage)
            state.define(name, storage, self._piece(action, name))
        program = of_first_rank(own.parts.each[micro])
        earlier = self._earlier(action, program)
        for name, (before, of) in earlier.items():
            kept = before.kept[of]
            holds.append(self.usage.hold(kept.storage))
            state.define(name, kept.storage, kept.tensor)
        outputs = {o for o in program.outputs if isinstance(o, str)}
        self._forward(program, state, outputs)
        holds += [self.usage.hold(state.values[name].storage) for name in outputs]
        running = self.running[action.stage, micro] = RunningMicro(state, holds)
        for name in own.parts.kept:
            running.kept[name] = HeldValue(state.values[name].storage, state.values[name].tensor)
        for name in list(state.values):
            state.forget(name)

    def _earlier(self, action: Action, program: LocalProgram) -> dict[str, tuple[RunningMicro, str]]:
        """Returns what a program reads of earlier slices: by its name here, who keeps it, and its name there."""
        parts, unit = self.planned[action.stage].parts, action.micro or 0
        own, first = parts.earlier(unit), unit - unit % parts.slices
        names = [i.name for i in program.inputs[len(program.inputs) - len(own) :]]
        return {name: (self.running[action.stage, first + at], of) for name, (of, at) in zip(names, own, strict=True)}

    def _play_backward(self, action: Action) -> None:
        own, running = self.planned[action.stage], self.running[action.stage, action.micro or 0]
        state = running.state
        given = self._seed(own, action, state)
        if action.kind == INPUT and not any(name in self.reached for name in own.stage.received):
            running.waits = True
            running.holds += given
            return
        state.puts_off = action.kind == INPUT
        if state.puts_off:
            running.holds += [self.usage.hold(storage) for storage in state.saved]
        self._play_tape(state)
        for storage in given:
            self.usage.drop(storage)
        for name, maker in own.stage.received.items():
            gradient = state.gradients.pop(name, None)
            if gradient is not None and name not in self.reached:
                self.usage.drop(gradient.storage)
            elif gradient is not None:
                place = self.places.get((maker, action.micro or 0, True), (-1, 0))
                self.leaving.append((place, gradient.storage))
        for name, (before, of) in self._earlier(action, own.parts.each[action.micro or 0]).items():
            gradient = state.gradients.pop(name, None)
            if gradient is not None and before.kept[of].gradient is None:
                before.kept[of].gradient = gradient.storage
            elif gradient is not None:  # added to what later slices have given
                self.usage.drop(gradient.storage)
        for gradient in state.gradients.values():
            self.usage.drop(gradient.storage)
        state.gradients.clear()
        if not state.puts_off:
            self._drop(action)

    def _seed(self, own: StageOfRow, action: Action, state: MicroState) -> list[Storage]:
        """Gives outputs their gradients: of sent ones as they come, of scalars as they are made; returns them, held."""
        given = []
        for name in own.stage.sent:
            self._arrived(action, self.readers.get(name, ()))
        program = own.parts.each[action.micro or 0]
        for name, local in zip((*own.stage.sent, *own.stage.returned.values()), program.outputs):
            tensor = state.all_values[str(local)].tensor
            if not tensor.needs_grad or (self.has_loss and name not in own.stage.sent and name != self.graph.outputs[0]):
                continue
            if name in own.stage.sent and name not in self.reached:
                continue
            storage = self.coming.pop((action, name), None)
            if storage is None:
                storage = self.usage.hold(Storage(float(tensor.bytes), "transient", name))
            state.add_gradient(str(local), storage, tensor.shape, contiguous_strides(tensor.shape), "")
            given.append(storage)
        for name, kept in self.running[action.stage, action.micro or 0].kept.items():
            if kept.gradient is not None:
                state.add_gradient(name, kept.gradient, kept.tensor.shape, contiguous_strides(kept.tensor.shape), "")
                given.append(kept.gradient)
        return given

    def _play_tape(self, state: MicroState) -> None:
        for play in reversed(state.tape):
            play()
        state.tape.clear()

    def _play_weight(self, action: Action) -> None:
        running = self.running[action.stage, action.micro or 0]
        state = running.state
        if running.waits:
            state.collects = True
            self._play_tape(state)
            for name, storage in reversed(state.collected):
                add_put_off(self.usage, name, state.held[name], storage)
        for name in state.later:
            leaf = state.held[name]
            made = self.usage.hold(Storage(float(leaf.tensor.bytes), "transient", name))
            self.usage.point(name, 0.0)
            add_put_off(self.usage, name, leaf, made)
        for storage in state.arrived:
            self.usage.drop(storage)
        self._drop(action)

    def _drop(self, action: Action) -> None:
        """Ends a micro-batch."""
        for storage in self.running.pop((action.stage, action.micro or 0)).holds:
            self.usage.drop(storage)


def _tensor_of(placed: Any, needs_grad: bool) -> LocalTensor:
    shape = placed.meta.shape
    if len(shape) == placed.layout.ndim:
        shape = local_shape(placed.layout, shape)
    return LocalTensor(tuple(shape), contiguous_strides(shape), placed.meta.dtype or torch.float32, needs_grad)


def _bytes(shape: Sequence[int], dtype: Any) -> int:
    return LocalTensor(tuple(shape), contiguous_strides(shape), dtype, False).bytes
