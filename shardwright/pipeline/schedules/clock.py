"""When each action of a schedule runs, given the seconds that the stages take."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from shardwright.errors import PipelineError
from shardwright.pipeline.schedules.actions import BACKWARD, FORWARD, INPUT, REDUCE_GRAD, UNSHARD, WEIGHT, Action
from shardwright.pipeline.schedules.check import held_most
from shardwright.pipeline.schedules.execution import Durations, execute
from shardwright.pipeline.schedules.schedule import Schedule


@dataclass(frozen=True)
class StageTimes:
    """Seconds that each stage takes for a micro-batch.

    Args:
        forward: of F.
        backward: of I, the gradients of inputs.
        weight: of W, the gradients of weights. B takes as long as I and W.
        transfer: from each stage to the next and back, S-1 numbers, or one for all. Counts between ranks only, and keeps
            neither of them from working.
        micro_factors: what the seconds of each micro-batch are multiplied by, such as 0.5 for a last one half as large.
        memory: what each stage holds of a micro-batch from its F to its B or W, in any unit; 1 if not given.
        unshard: of UNSHARD, the gathers of each stage's parameters, once per step; none if not given.
        reduce: of REDUCE_GRAD, the sums of their gradients over ranks.

    >>> StageTimes([1, 2], [1, 2], [1, 2], transfer=0.5).transfer
    (0.5,)
    """

    forward: Sequence[float]
    backward: Sequence[float]
    weight: Sequence[float]
    transfer: Sequence[float] | float = 0.0
    micro_factors: Sequence[float] = ()
    memory: Sequence[float] = field(default=())
    unshard: Sequence[float] = ()
    reduce: Sequence[float] = ()

    def __post_init__(self) -> None:
        count = len(self.forward)
        transfer = self.transfer
        spread = (transfer,) * (count - 1) if isinstance(transfer, (int, float)) else tuple(transfer)
        wanted = dict.fromkeys(("backward", "weight", "memory", "unshard", "reduce"), count) | {"transfer": count - 1}
        values = {
            "forward": tuple(self.forward), "backward": tuple(self.backward), "weight": tuple(self.weight),
            "transfer": spread, "micro_factors": tuple(self.micro_factors), "memory": tuple(self.memory) or (1.0,) * count,
            "unshard": tuple(self.unshard) or (0.0,) * count, "reduce": tuple(self.reduce) or (0.0,) * count,
        }  # fmt: skip
        for name, value in values.items():
            if name in wanted and len(value) != wanted[name]:
                raise PipelineError(f"{name} has {len(value)} numbers for {count} stages; give {wanted[name]}")
            if any(not number >= 0 for number in value):
                raise PipelineError(f"{name} is {value}; give numbers that are not negative")
            object.__setattr__(self, name, value)

    @property
    def stage_count(self) -> int:
        """The number of stages."""
        return len(self.forward)

    def factor(self, micro: int) -> float:
        """Returns what a micro-batch's seconds are multiplied by."""
        return self.micro_factors[micro] if self.micro_factors else 1.0

    def delays(self, row_of_stage: Sequence[int]) -> tuple[float, ...]:
        """Returns the seconds from each stage to the next, none where both are on the same rank."""
        pairs = itertools.pairwise(row_of_stage)
        spread: Sequence[float] = self.transfer  # type: ignore[assignment]
        return tuple(seconds if a != b else 0.0 for seconds, (a, b) in zip(spread, pairs))

    def durations(self, row_of_stage: Sequence[int]) -> Durations:
        """Returns the seconds of every kind of action."""
        whole = [i + w for i, w in zip(self.backward, self.weight)]
        by_kind = {FORWARD: self.forward, BACKWARD: whole, INPUT: self.backward, WEIGHT: self.weight}
        by_kind |= {UNSHARD: self.unshard, REDUCE_GRAD: self.reduce}
        return Durations(by_kind, self.delays(row_of_stage), self.micro_factors)


class Event(NamedTuple):
    """An action with the seconds at which it starts and ends."""

    rank: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The times of everything in a schedule.

    ``bubbles`` is the share of the whole time that each rank idles, ``bubble`` that of all ranks. ``stalls`` is the share of
    the time between a rank's own first and last action; published rates of bubbles are the largest of these. ``peak_memory`` is
    the most that each rank holds at once, in the unit of :attr:`StageTimes.memory`.
    """

    schedule: Schedule
    events: tuple[Event, ...]
    seconds: float
    bubbles: tuple[float, ...]
    stalls: tuple[float, ...]
    peak_memory: tuple[float, ...]

    @property
    def bubble(self) -> float:
        """The share of the whole time that ranks idle."""
        return sum(self.bubbles) / len(self.bubbles)


def run_clock(schedule: Schedule, times: StageTimes) -> Timeline:
    """Runs a schedule with the given seconds, each action as early as its row and what it waits for allow.

    Raises:
        PipelineError: the times are of another number of stages or micro-batches, or the schedule deadlocks.
    """
    if times.stage_count != schedule.stage_count:
        raise PipelineError(
            f"times of {times.stage_count} stages for schedule {schedule.name!r} of {schedule.stage_count}; give as many"
        )
    if times.micro_factors and len(times.micro_factors) != schedule.micro_count:
        raise PipelineError(
            f"micro_factors has {len(times.micro_factors)} numbers for {schedule.micro_count} micro-batches; give as many"
        )
    run = execute(schedule.rows, schedule.stage_count, times.durations(schedule.row_of_stage))
    if run.blocked:
        raise PipelineError(f"schedule {schedule.name!r} never ends; check_schedule says why")
    events = tuple(
        Event(rank, action, start, end)
        for rank, row in enumerate(schedule.rows)
        for action, start, end in zip(row, run.starts[rank], run.ends[rank])
    )
    seconds = max((event.end for event in events), default=0.0)
    busy = [sum(e - s for s, e in zip(*pair)) for pair in zip(run.starts, run.ends)]
    spans = [ends[-1] - starts[0] if ends else 0.0 for starts, ends in zip(run.starts, run.ends)]
    return Timeline(
        schedule,
        events,
        seconds,
        tuple(1 - b / seconds if seconds else 0.0 for b in busy),
        tuple(1 - b / span if span else 0.0 for b, span in zip(busy, spans)),
        tuple(held_most(schedule, times.memory)),
    )
