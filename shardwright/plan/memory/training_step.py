"""Simulates one step of one rank on shapes: forward, backward, optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from shardwright.cost.memory import Choose
from shardwright.ir.graph import Graph
from shardwright.ir.instructions import Call, FusedMoves, KeepSliceForBackward, Move, StartMoves
from shardwright.ir.largest_piece import local_shape
from shardwright.ir.program import LocalProgram
from shardwright.ir.visitor import InstructionVisitor
from shardwright.plan.memory.calls import CallPlayer
from shardwright.plan.memory.local_tensor import LocalTensor, contiguous_strides
from shardwright.plan.memory.moves import MovePlayer
from shardwright.plan.memory.rank_state import RankState
from shardwright.plan.memory.timeline import MemoryTimeline
from shardwright.plan.memory.usage import Storage

_MOST_LISTED = 20  # of the tensors that are kept for the backward


@dataclass(frozen=True)
class OptimizerMemory:
    """Memory that an optimizer needs.

    Args:
        states: bytes of state per byte of parameter.
        temporary: bytes of temporaries per byte of the largest parameter, while it is updated.
    """

    states: float
    temporary: float = 2.0


class TrainingStep:
    """One step of one rank, from the second on: optimizer states are there, and gradients are not.

    Args:
        graph: the graph that the program was made from.
        program: of the rank with the largest pieces.
        optimizer: ``None``: no training, only the forward.
        device: kind of device, which decides what kernels keep.
        choose: returns the algorithm of gloo's that does a collective; ``None``: the backend's own collectives.
        hub: whether the rank is the one that others send to, where one is.
    """

    def __init__(
        self, graph: Graph, program: LocalProgram, optimizer: OptimizerMemory | None, device: str, choose: Choose | None,
        hub: bool,
    ):  # fmt: skip
        self.graph, self.program, self.optimizer = graph, program, optimizer
        self.returned = [o for o in program.outputs if isinstance(o, str)] + [value for _, value in program.updates]
        self.state = RankState()
        self.usage = self.state.usage
        self.calls = CallPlayer(self.state, device, program.kept)
        self.moves = MovePlayer(self.state, program, choose, hub)

    def run(self) -> MemoryTimeline:
        """Simulates the step; may be called once."""
        self._define_inputs()
        forward = ForwardPlayer(self.calls, self.moves)
        for instruction, dying in zip(self.program.instructions, self.program.last_uses()):
            forward.dying = dying
            forward.visit(instruction)
            for name in dying:
                self.state.forget(name)
        largest = self._largest_saved()
        if self.optimizer is not None:
            self._play_backward()
            self.usage.phase = "optimizer"
            self.usage.point("step", self._temporaries(self.optimizer))
        names = {i.value: str(i.target) for i in self.graph.inputs}
        pieces = [(names[value], size) for value, size in self.state.parameters.items()]
        pieces.sort(key=lambda piece: (-piece[1], piece[0]))
        return MemoryTimeline(tuple(self.usage.points), largest, tuple(pieces), tuple(self.state.guessed))

    def _define_inputs(self) -> None:
        """Adds what exists when the step begins: parameters, buffers, inputs, optimizer states, scratch buffer."""
        trains = self.optimizer is not None
        for given, placed in zip(self.graph.inputs, self.program.inputs):
            meta, layout = given.meta, placed.layout
            shape = local_shape(layout, meta.shape)
            is_whole = layout.is_replicated and len(meta.stride) == len(shape)
            tensor = LocalTensor(
                shape, meta.stride if is_whole else contiguous_strides(shape), meta.dtype, given.requires_grad and trains
            )
            part = "parameters" if given.kind in ("parameter", "buffer") else "activations"
            storage = Storage(float(tensor.bytes), part, given.value)
            self.usage.hold(storage)  # by the caller
            self.state.define(given.value, storage, tensor)
            if given.kind == "parameter" and given.requires_grad:
                self.state.parameters[given.value] = storage.size
        if self.optimizer is not None:
            states = self.optimizer.states * sum(self.state.parameters.values())
            self.usage.hold(Storage(states, "optimizer", ""))
        self.moves.keep_scratch(trains)

    def _play_backward(self) -> None:
        self.usage.phase = "backward"
        for name in self._losses():
            tensor = self.state.values[name].tensor
            gradient = Storage(float(tensor.bytes), "transient", name)
            self.state.add_gradient(name, gradient, tensor.shape, tensor.stride, "")
        for play in reversed(self.state.tape):
            play()
        self.state.tape.clear()
        self.state.finish_gradients()

    def _losses(self) -> list[str]:
        """Returns the values that the backward starts from: scalars that are returned, or all that is."""
        found = [n for n in dict.fromkeys(self.returned) if self.state.values[n].tensor.needs_grad]
        return [n for n in found if not self.state.values[n].tensor.shape] or found

    def _temporaries(self, optimizer: OptimizerMemory) -> float:
        """Counts the bytes of the optimizer's temporaries: for a parameter, and half of those of the one before."""
        sizes = [0.0, *self.state.parameters.values()]
        return max((optimizer.temporary * (now + before / 2) for before, now in pairwise(sizes)), default=0.0)

    def _largest_saved(self) -> tuple[tuple[str, str, float], ...]:
        """Lists the largest values kept for the backward, inputs excluded: value, module, bytes."""
        made_by = {node.name: (node.outputs[0], node.module) for node in self.graph.nodes if node.outputs}
        made_by |= {value: (value, node.module) for node in self.graph.nodes for value in node.outputs}
        handed_in = {i.value for i in self.graph.inputs if i.kind == "input"}
        found = []
        for storage in self.state.saved:
            if storage.users and storage.part == "activations" and storage.label not in handed_in:
                value, module = made_by.get(storage.label, (storage.label, ""))
                found.append((value, module, storage.size))
        return tuple(sorted(found, key=lambda item: (-item[2], item[0]))[:_MOST_LISTED])


class ForwardPlayer(InstructionVisitor[None]):
    """Simulates the instructions of the forward pass.

    Attributes:
        dying: values that nothing reads after the present instruction.
    """

    def __init__(self, calls: CallPlayer, moves: MovePlayer):
        self.calls, self.moves = calls, moves
        self.dying: Sequence[str] = ()

    def call(self, call: Call) -> None:
        self.calls.play(call)

    def move(self, move: Move) -> None:
        if move.started:
            self.moves.end(move)
        else:
            self.moves.play(move, move.source in self.dying)

    def start_moves(self, start: StartMoves) -> None:
        self.moves.start(start)

    def fused_moves(self, fused: FusedMoves) -> None:
        self.moves.play_together(fused)

    def keep_slice(self, keep: KeepSliceForBackward) -> None:
        self.moves.keep_piece(keep)
