"""Simulates moves that were started together, which share their collectives and end one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from shardwright.cost.memory import BucketMemory, Choose, bucket_memory
from shardwright.ir.instructions import Move, StartMoves
from shardwright.plan.memory.rank_state import Gradient, RankState
from shardwright.plan.memory.recipes import Recipe
from shardwright.plan.memory.usage import Storage


@dataclass
class _Bucket:
    """Moves under way, and later their gradients."""

    moves: tuple[Move, ...]
    flight: Storage | None = None  # the travelling tensors, until the first result is waited for
    scratch: float = 0.0
    results: dict[str, Storage] = field(default_factory=dict)
    expected: int = 0  # results that may get a gradient
    given: dict[str, Gradient] = field(default_factory=dict)
    returning: list[tuple[Move, float]] = field(default_factory=list)


class BucketPlayer:
    """Simulates buckets on the state of a rank.

    Args:
        state: the rank's state.
        choose: returns the algorithm of gloo's that does a collective; ``None``: the backend's own collectives.
        hub: whether the rank is the one that others send to, where one is.
    """

    def __init__(self, state: RankState, choose: Choose | None, hub: bool):
        self.state, self.usage, self.choose, self.hub = state, state.usage, choose, hub
        self.of: dict[str, _Bucket] = {}

    def _need(self, moves: Sequence[Move], phase: str) -> BucketMemory:
        tensors = [(move.steps(phase), move.redistribution.shape, move.itemsize(phase)) for move in moves]
        return bucket_memory(tensors, self.choose, self.hub)

    def scratch(self, moves: Sequence[Move], trains: bool) -> float:
        """Counts the bytes of scratch that a bucket's collectives need."""
        phases = ("forward", "backward") if trains and moves[0].needs_grad else ("forward",)
        found = [phase for phase in phases if any(move.steps(phase) for move in moves)]
        return max((self._need(moves, phase).scratch for phase in found), default=0.0)

    # -- forward --------------------------------------------------------------------------------------------------

    def start(self, start: StartMoves) -> None:
        """Starts moves together: the gathered tensors are in flight until the first of them is waited for."""
        bucket = _Bucket(start.moves)
        self.of |= dict.fromkeys((move.output for move in start.moves), bucket)
        if any(move.redistribution.forward for move in start.moves):
            need = self._need(start.moves, "forward")
            self._set_off(bucket, need, start.cause)
        self.state.tape.append(lambda: self._end_backward(bucket))

    def end(self, move: Move, needs_grad: bool) -> Storage | None:
        """Returns the new memory of a move's result, held here; ``None`` where it is its source's."""
        bucket = self.of[move.output]
        forward = [m.redistribution.forward for m in bucket.moves]
        if any(forward) and bucket.flight is not None:
            need = self._need(bucket.moves, "forward")
            self.usage.point(move.cause, need.landing - bucket.flight.size)
            bucket.results = {
                m.output: self.usage.hold(Storage(size, "activations", m.source))
                for m, size in zip(bucket.moves, need.results, strict=True)
            }
            self._arrived(bucket)
            if move.recompute:
                sources = [self.state.values[m.source].storage for m in bucket.moves]
                Recipe(
                    self.usage, self.state.makers, move.cause, sources, list(bucket.results.values()),
                    max(need.peak, need.landing), ahead=self.state.ahead, flight=need.flight, landing=need.landing,
                )  # fmt: skip
        if needs_grad:
            bucket.expected += 1
            self.state.tape.append(lambda: self._add_gradient(bucket, move))
        return bucket.results.pop(move.output, None)

    def _set_off(self, bucket: _Bucket, need: BucketMemory, cause: str) -> None:
        self.usage.point(cause, need.peak)
        bucket.flight = self.usage.hold(Storage(need.flight, "transient", cause))
        bucket.scratch = self.usage.take_scratch(need.scratch)

    def _arrived(self, bucket: _Bucket) -> None:
        if bucket.flight is not None:
            self.usage.drop(bucket.flight)
            self.usage.give_scratch(bucket.scratch)
            bucket.flight = None

    # -- backward -------------------------------------------------------------------------------------------------

    def _add_gradient(self, bucket: _Bucket, move: Move) -> None:
        """Takes the gradient of one result; the last one starts them all."""
        bucket.expected -= 1
        gradient = self.state.gradients.pop(move.output, None)
        if gradient is not None:
            bucket.given[move.output] = gradient
        if not bucket.expected and len(bucket.given) == len(bucket.moves):
            self._start_backward(bucket)

    def _start_backward(self, bucket: _Bucket) -> None:
        moves = [move for move in bucket.moves if move.output in bucket.given]
        need = self._need(moves, "backward")
        self._set_off(bucket, need, moves[0].cause)
        for gradient in bucket.given.values():
            self.usage.drop(gradient.storage)
        bucket.given = {}
        bucket.returning = list(zip(moves, need.results, strict=True))

    def _end_backward(self, bucket: _Bucket) -> None:
        if bucket.given:
            self._start_backward(bucket)
        made = [(move, self.usage.hold(Storage(size, "transient", move.source))) for move, size in bucket.returning]
        self._arrived(bucket)
        bucket.returning = []
        for move, storage in made:
            self.state.give_source(move, storage)
