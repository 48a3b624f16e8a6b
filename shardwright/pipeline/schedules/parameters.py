"""Says when the ranks of a stage gather its parameters, free them, and add up their gradients."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from itertools import product

from shardwright.pipeline.schedules.actions import BACKWARD, REDUCE_GRAD, RESHARD, UNSHARD, WEIGHT, Action
from shardwright.pipeline.schedules.clock import StageTimes, run_clock
from shardwright.pipeline.schedules.schedule import Schedule


def with_parameters_in_time(
    schedule: Schedule, gathered: Collection[int], reduced: Collection[int], times: StageTimes
) -> Schedule:
    """Adds what stages do with their parameters, where it costs the least time; of equals, the least memory.

    Args:
        schedule, gathered, reduced: see :func:`with_parameters`.
        times: the seconds of the stages.
    """
    if not gathered and not reduced:
        return schedule
    choices = [with_parameters(schedule, gathered, reduced, *when) for when in product((False, True), repeat=2)]
    return min(choices, key=lambda choice: run_clock(choice, times).seconds)  # the first of equals


def with_parameters(
    schedule: Schedule, gathered: Collection[int], reduced: Collection[int], early: bool = False, late: bool = False
) -> Schedule:
    """Adds what stages do with their parameters, where the schedule does not say it.

    A stage gathers them before its first forward, frees them after its last work, and adds up their gradients after that.

    Args:
        schedule: what to add to.
        gathered: the stages that gather and free parameters.
        reduced: those that add up gradients; without a backward nothing is added up.
        early: whether ranks that wait for others at first gather all their parameters meanwhile.
        late: whether ranks add up gradients once they have nothing else to do.

    >>> one = Schedule("one", ((Action(0, "F", 0), Action(0, "B", 0)),), 1, 1)
    >>> print(with_parameters(one, {0}, {0}))
    one: 1 stage on 1 rank, 1 micro-batch
    rank 0  0UNSHARD 0F0 0B0 0RESHARD 0REDUCE_GRAD
    """
    rows = tuple(_row(row, gathered, reduced, early, late) for row in schedule.rows)
    return schedule if rows == schedule.rows else replace(schedule, rows=rows)


def _row(
    row: tuple[Action, ...], gathered: Collection[int], reduced: Collection[int], early: bool, late: bool
) -> tuple[Action, ...]:
    there = {(action.stage, action.kind) for action in row}
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for at, action in enumerate(row):
        if action.is_compute:
            first.setdefault(action.stage, at)
            last[action.stage] = at
    before: dict[int, list[Action]] = {}
    after: dict[int, list[Action]] = {}
    for stage, at in first.items():
        if stage in gathered and (stage, UNSHARD) not in there:
            before.setdefault(0 if early and 0 not in first else at, []).append(Action(stage, UNSHARD))
        if stage in gathered and (stage, RESHARD) not in there:
            after.setdefault(last[stage], []).append(Action(stage, RESHARD))
        goes_back = (stage, BACKWARD) in there or (stage, WEIGHT) in there
        if stage in reduced and goes_back and (stage, REDUCE_GRAD) not in there:
            after.setdefault(len(row) - 1 if late else last[stage], []).append(Action(stage, REDUCE_GRAD))
    found: list[Action] = []
    for at, action in enumerate(row):
        found += [*before.get(at, ()), action, *after.get(at, ())]
    return tuple(found)
