"""Simulates the redistributions of a program, and their backward.

A move that is started early travels until somebody waits for its result; in the backward its gradient starts to travel
where the forward waited, and is waited for where the forward started. Moves may also share a collective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from shardwright.cost.memory import (
    Choose,
    RedistributionMemory,
    local_bytes,
    redistribution_memory,
    shared_collective_memory,
    step_memory,
)
from shardwright.cost.message_sizes import is_kept
from shardwright.ir.instructions import FusedMoves, KeepSliceForBackward, Move, StartMoves, moves_alone
from shardwright.ir.largest_piece import local_shape
from shardwright.ir.program import LocalProgram
from shardwright.partition.free_results import result_is_free, values_read_once, values_with_free_gradients
from shardwright.plan.memory.buckets import BucketPlayer
from shardwright.plan.memory.local_tensor import LocalTensor, contiguous_strides
from shardwright.plan.memory.rank_state import Gradient, RankState
from shardwright.plan.memory.recipes import Recipe
from shardwright.plan.memory.usage import Storage


@dataclass
class _Travelling:
    """A move that was started: its result, and the memory and bytes of scratch that it holds until it is done."""

    result: Storage
    held: list[Storage] = field(default_factory=list)
    scratch: float = 0.0


class MovePlayer:
    """Simulates moves on the state of a rank.

    Args:
        state: the rank's state.
        program: all of it; moves depend on what makes and reads their source.
        choose: returns the algorithm of gloo's that does a collective; ``None``: the backend's own collectives.
        hub: whether the rank is the one that others send to, where one is.
    """

    def __init__(self, state: RankState, program: LocalProgram, choose: Choose | None, hub: bool):
        self.state, self.usage, self.choose, self.hub = state, state.usage, choose, hub
        self.instructions = program.instructions
        self.makers = {output: i for i in program.instructions for output in i.outputs}
        self.read_once = values_read_once(program)
        self.free_gradients = values_with_free_gradients(program)
        self.travelling: dict[str, _Travelling] = {}  # by output
        # gradients under way, by output; where nothing moves nothing travels
        self.returning: dict[str, tuple[Gradient, _Travelling | None]] = {}
        self.buckets = BucketPlayer(state, choose, hub)
        self.ending: _Travelling | None = None  # is done with when the next move starts

    def keep_scratch(self, trains: bool) -> None:
        """Keeps the scratch buffer that is there since the step before.

        Args:
            trains: whether that step had a backward.
        """
        if self.choose is None:
            return
        buckets = [i.starts for i in self.instructions if len(i.starts) > 1]
        together = {move.output for members in buckets for move in members}
        alone = [move for move in moves_alone(self.instructions) if move.output not in together]
        needed = [self.buckets.scratch(members, trains) for members in buckets]
        needed += [self._scratch(move, self.choose, trains) for move in alone]
        largest = max((scratch for scratch in needed if is_kept(scratch)), default=0.0)
        self.usage.give_scratch(self.usage.take_scratch(largest))

    def _scratch(self, move: Move, choose: Choose, trains: bool) -> float:
        """Counts the bytes of scratch that a move by itself needs."""
        shape = move.redistribution.shape
        needs = [
            step_memory(step, shape, move.itemsize(phase), choose, hub=self.hub)
            for phase in (("forward", "backward") if move.needs_grad and trains else ("forward",))
            for step in move.steps(phase)
        ]
        return max((need.scratch for need in needs), default=0.0)

    # -- one move, at once --------------------------------------------------------------------------------------------

    def play(self, move: Move, source_dies: bool) -> None:
        """Makes the result of a move that is not started early.

        Args:
            source_dies: whether nothing reads the source any more.
        """
        maker = self.makers.get(move.source)
        need = self._need(
            move,
            "forward",
            contiguous=self.state.values[move.source].tensor.is_contiguous,
            inplace=move.source in self.read_once and result_is_free(maker),
            compact=maker is not None and source_dies,
        )
        self.usage.point(move.cause, need.peak)
        given = self.state.values[move.source].storage
        self._define(move, Storage(need.result, "activations", move.source) if need.result else None)
        self._make_again(move, given, need.peak, is_over_source=not need.result and move.communicates)
        self._record(move, self._play_backward)

    def keep_piece(self, instruction: KeepSliceForBackward) -> None:
        """Keeps a value as a piece from which it is gathered when needed."""
        cut, gather = instruction.cut, instruction.gather
        value = self.state.values[cut.source].storage
        if value in self.state.makers:
            return
        piece = local_bytes(cut.redistribution.target, cut.redistribution.shape, cut.dtype.itemsize)
        need = self._need(gather, "forward")
        made = Storage(piece, "activations", cut.source)
        Recipe(self.usage, self.state.makers, gather.cause, [made], [value], need.peak)

    def _make_again(
        self, move: Move, given: Storage, peak: float, is_over_source: bool = False, flight: float | None = None
    ) -> None:
        """Makes a move's result the recipe of a second move in the backward pass.

        If it was written over its source, the source's old value is gone.

        Args:
            move: the move.
            given: its source.
            peak: bytes at most while it runs.
            is_over_source: whether the result is in the source's memory.
            flight: of a move that is started early, what travels.
        """
        made = self.state.values[move.output].storage
        if move.recompute and (made is not given or is_over_source):
            ahead = self.state.ahead if move.source in self.state.parameters and flight is not None else None
            travels = flight or 0.0
            Recipe(
                self.usage, self.state.makers, move.cause, [given], [made], peak, ahead=ahead, flight=travels, landing=travels
            )  # fmt: skip
        elif is_over_source:
            self.state.makers.pop(made, None)

    def _play_backward(self, move: Move) -> None:
        gradient = self.state.gradients.pop(move.output, None)
        if gradient is None:
            return
        inplace = move.output in self.free_gradients
        need = self._need(move, "backward", contiguous=gradient.is_contiguous, inplace=inplace)
        self.usage.point(move.cause, need.peak)
        self._return_gradient(move, gradient, need.result)

    def _need(
        self, move: Move, phase: str, contiguous: bool = True, inplace: bool = False, compact: bool = True
    ) -> RedistributionMemory:
        need = redistribution_memory(
            move.steps(phase), move.redistribution.shape, move.itemsize(phase), self.choose, contiguous, inplace, self.hub,
            compact, self.usage.kept_scratch,
        )  # fmt: skip
        return need if move.wire is None else _with_casts(need, move, phase)

    def _define(self, move: Move, made: Storage | None) -> None:
        """Names the result of a move: in this memory, or in that of its source where nothing was made."""
        source = self.state.values[move.source]
        shape = local_shape(move.redistribution.target, move.redistribution.shape)
        stride = source.tensor.stride if made is None else contiguous_strides(shape)
        dtype = source.tensor.dtype if move.wire is None else move.wire.result
        tensor = LocalTensor(shape, stride, dtype, self._needs_grad(move))
        self.state.define(move.output, made or source.storage, tensor)

    def _needs_grad(self, move: Move) -> bool:
        return self.state.values[move.source].tensor.needs_grad and move.needs_grad and move.grad

    def _record(self, move: Move, backward: Callable[[Move], None]) -> None:
        if self._needs_grad(move):
            self.state.tape.append(partial(backward, move))

    def _return_gradient(self, move: Move, gradient: Gradient, size: float) -> None:
        """Gives the source of a move its gradient. It is in ``size`` bytes of new memory, or for 0 in the result's."""
        if size:
            made = self.usage.hold(Storage(size, "transient", move.source))
            self.usage.drop(gradient.storage)
            self.state.give_source(move, made)
        else:
            self.state.give_source(move, gradient.storage, gradient.stride)

    # -- one move, started early --------------------------------------------------------------------------------------

    def start(self, start: StartMoves) -> None:
        """Starts moves."""
        if len(start.moves) > 1:
            self.buckets.start(start)
            return
        (move,) = start.moves
        need = self._need(move, "forward", compact=move.source in self.makers)
        self.usage.point(move.cause, need.peak)
        self.travelling[move.output] = self._set_off(move, need, self.state.values[move.source].storage, "activations")
        self._record(move, self._end_backward)

    def end(self, move: Move) -> None:
        """Waits for the result of a started move."""
        if move.output in self.buckets.of:
            made = self.buckets.end(move, self._needs_grad(move))
            self._define(move, made)
            if made is not None:
                self.usage.drop(made)
            return
        result = self._arrived(self.travelling.pop(move.output))
        given = self.state.values[move.source].storage
        self._define(move, result if result.size else None)
        self.usage.drop(result)
        need = self._need(move, "forward")
        self._make_again(move, given, need.peak, flight=need.result + sum(step.workspace for step in need.steps))
        self._record(move, self._start_backward)

    def _start_backward(self, move: Move) -> None:
        gradient = self.state.gradients.pop(move.output, None)
        if gradient is None:
            return
        inplace = move.output in self.free_gradients
        need = self._need(move, "backward", contiguous=gradient.is_contiguous, inplace=inplace)
        self.usage.point(move.cause, need.peak)
        travelling = None
        if need.result or any(step.scratch for step in need.steps):
            travelling = self._set_off(move, need, gradient.storage, "transient")
        if need.result:
            self.usage.drop(gradient.storage)
        self.returning[move.output] = gradient, travelling

    def _end_backward(self, move: Move) -> None:
        gradient, travelling = self.returning.pop(move.output, (None, None))
        made = self._arrived(travelling) if travelling is not None else None
        if made is not None and made.size:
            self.state.give_source(move, made)
        elif gradient is not None:
            self.state.give_source(move, gradient.storage, gradient.stride)

    def _set_off(self, move: Move, need: RedistributionMemory, given: Storage, part: str) -> _Travelling:
        """Makes what a started move holds until somebody waits for it.

        A thread ends moves that others depend on; it is assumed to be done with one when the next starts.
        """
        self._release(self.ending)
        travelling = _Travelling(self.usage.hold(Storage(need.result, part, move.source)))
        if any(step.result for step in need.steps):
            workspace = Storage(sum(step.workspace for step in need.steps), "transient", move.source)
            kept = [workspace] if need.steps[0].frees else [given, workspace]
            travelling.held = [self.usage.hold(storage) for storage in kept]
        if need.steps:
            travelling.scratch = self.usage.take_scratch(max(step.scratch for step in need.steps))
            if not any(step.holds for step in need.steps):
                self.ending = travelling
        return travelling

    def _arrived(self, travelling: _Travelling) -> Storage:
        """Returns the result of a started move, held here, and frees the rest."""
        self._release(travelling)
        return travelling.result

    def _release(self, travelling: _Travelling | None) -> None:
        """Frees what a started move holds besides its result; a second time does nothing."""
        if travelling is not None:
            for storage in travelling.held:
                self.usage.drop(storage)
            self.usage.give_scratch(travelling.scratch)
            travelling.held, travelling.scratch = [], 0.0

    # -- moves that share a collective --------------------------------------------------------------------------------

    def play_together(self, together: FusedMoves) -> None:
        """Makes the results of moves that share a collective."""
        moves = together.moves
        sizes, peak = _shared(moves, "forward")
        self.usage.point(together.cause, peak)
        given = [self.state.values[move.source].storage for move in moves]
        for move, size in zip(moves, sizes):
            self._define(move, Storage(size, "activations", move.source) if size else None)
        if together.recompute and any(sizes):
            made = [self.state.values[move.output].storage for move in moves]
            Recipe(self.usage, self.state.makers, together.cause, given, made, peak)
        if any(map(self._needs_grad, moves)):
            self.state.tape.append(partial(self._play_together_backward, together))

    def _play_together_backward(self, together: FusedMoves) -> None:
        """Runs the backward; moves whose results have no gradient are left out."""
        moves = [move for move in together.moves if move.output in self.state.gradients]
        sizes, peak = _shared(moves, "backward")
        self.usage.point(together.cause, peak)
        gradients = [self.state.gradients.pop(move.output) for move in moves]
        for move, gradient, size in zip(moves, gradients, sizes):
            self._return_gradient(move, gradient, size)


def _with_casts(need: RedistributionMemory, move: Move, phase: str) -> RedistributionMemory:
    """Adds the copies in other dtypes: the source is cast before it travels, the result after."""
    given, travels, handed_on = move.dtypes(phase)
    ends = move.redistribution.source, move.redistribution.target
    first, last = ends if phase == "forward" else ends[::-1]
    shape = move.redistribution.shape
    before = local_bytes(first, shape, travels.itemsize) if travels != given else 0.0
    arrived = need.result or before
    result = local_bytes(last, shape, handed_on.itemsize) if handed_on != travels else arrived
    after = arrived + result if handed_on != travels else 0.0
    return replace(need, result=result, peak=max(before + need.peak, after))


def _shared(moves: Sequence[Move], phase: str) -> tuple[list[float], float]:
    """Returns the new memory of each result, and bytes at most meanwhile.

    Moves of a kind have one step each, or none has any.
    """
    if not any(move.steps(phase) for move in moves):
        return [0.0] * len(moves), 0.0
    return shared_collective_memory(
        [(step, move.redistribution.shape, move.itemsize(phase)) for move in moves for step in move.steps(phase)]
    )
