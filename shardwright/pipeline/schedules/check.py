"""Proves, before anything runs, that a schedule does all of the work once and never waits for itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from shardwright.errors import PipelineError, counted, numbered
from shardwright.pipeline.schedules.actions import BACKWARD, FORWARD, INPUT, REDUCE_GRAD, UNSHARD, WEIGHT, Action
from shardwright.pipeline.schedules.execution import Durations, Execution, Need, execute, gives
from shardwright.pipeline.schedules.schedule import Schedule

SHOWN = 20  # problems; of a schedule that is wrong altogether there are thousands


def check_schedule(schedule: Schedule, forward_only: bool = False) -> None:
    """Checks that each stage does each micro-batch once, in order, and that no rank waits for itself.

    Slices of a micro-batch go forward in their order, as each reads what the earlier ones keep, and backward in reverse.

    Args:
        schedule: what to check.
        forward_only: whether there is no backward, as in inference.

    Raises:
        PipelineError: something is wrong; ``problems`` has a line for each thing that is.
    """
    problems = [*_places(schedule), *_counts(schedule, forward_only), *_order(schedule), *_order_of_slices(schedule)]
    problems += _order_of_parameters(schedule)
    if not problems:
        run = execute(schedule.rows, schedule.stage_count, Durations())
        problems = [_circle(schedule, run)] if run.blocked else []
    if problems:
        text = f"schedule {schedule.name!r}: {counted(problems, 'nothing was run')}\n{numbered(problems[:SHOWN])}"
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise PipelineError(text + more, tuple(problems))


def peak_in_flight(schedule: Schedule) -> list[int]:
    """Counts the most activations that each rank holds at once.

    An activation is one of a stage and a micro-batch. It is held from its F to its B, or to its W where B is split: W reads it.
    """
    return [int(peak) for peak in held_most(schedule, (1,) * schedule.stage_count)]


def held_most(schedule: Schedule, memory: Sequence[float]) -> list[float]:
    """Returns the most that each rank holds at once, where an activation takes its stage's memory."""
    peaks = []
    for row in schedule.rows:
        held = peak = 0.0
        for stage, kind, _ in row:
            if kind == FORWARD:
                held += memory[stage]
                peak = max(peak, held)
            elif kind in (BACKWARD, WEIGHT):
                held -= memory[stage]
        peaks.append(peak)
    return peaks


def _places(schedule: Schedule) -> list[str]:
    """Lists stages on several ranks, and actions of stages or micro-batches that there are not."""
    problems = []
    ranks: dict[int, set[int]] = {}
    for rank, row in enumerate(schedule.rows):
        for action in row:
            ranks.setdefault(action.stage, set()).add(rank)
            if not 0 <= action.stage < schedule.stage_count:
                problems.append(f"{action} on rank {rank}: there are only stages 0 to {schedule.stage_count - 1}; remove it")
            if action.is_compute and not (action.micro is not None and 0 <= action.micro < schedule.micro_count):
                last = schedule.micro_count - 1
                problems.append(f"{action} on rank {rank}: there are only micro-batches 0 to {last}; remove it")
    for stage, found in sorted(ranks.items()):
        if len(found) > 1:
            problems.append(f"stage {stage} is on ranks {', '.join(map(str, sorted(found)))}; put it on one")
    return problems


def _counts(schedule: Schedule, forward_only: bool) -> list[str]:
    """Lists work that is not done, or done twice."""
    counts = Counter(action for row in schedule.rows for action in row if action.is_compute)
    problems = []
    for stage in range(schedule.stage_count):
        for micro in range(schedule.micro_count):
            f, b, i, w = (counts[Action(stage, kind, micro)] for kind in (FORWARD, BACKWARD, INPUT, WEIGHT))
            if f != 1:
                problems.append(f"{stage}F{micro} stands in it {f} times; it has to stand there once")
            if forward_only:
                if b or i or w:
                    problems.append(f"stage {stage} has a backward of micro-batch {micro}, and there is to be none; remove it")
            elif (b, i, w) not in ((1, 0, 0), (0, 1, 1)):
                texts = ", ".join(f"{n}× {stage}{k}{micro}" for k, n in (("B", b), ("I", i), ("W", w)) if n) or "none of them"
                problems.append(
                    f"the backward of micro-batch {micro} on stage {stage} is {texts}; "
                    f"it has to be {stage}B{micro}, or {stage}I{micro} and {stage}W{micro}"
                )
    return problems


def _order(schedule: Schedule) -> list[str]:
    """Lists actions that stand in their row before what they need of their own stage."""
    problems = []
    before = {BACKWARD: FORWARD, INPUT: FORWARD, WEIGHT: INPUT}
    for rank, row in enumerate(schedule.rows):
        seen: set[Action] = set()
        there = set(row)
        for action in row:
            first = Action(action.stage, before.get(action.kind, ""), action.micro)
            if first in there and first not in seen:
                problems.append(f"{action} stands before {first} on rank {rank}; put it after that")
            seen.add(action)
    return problems


def _order_of_slices(schedule: Schedule) -> list[str]:
    """Lists actions that stand in their row before one of the slice that they need."""
    slices = schedule.slices
    if slices < 1 or schedule.micro_count % slices:
        return [f"{schedule.micro_count} slices in all are not {slices} of each micro-batch; give slices= that divides them"]
    problems = []
    for rank, row in enumerate(schedule.rows):
        seen: set[Action] = set()
        there = set(row)
        for action in row:
            stage, kind, unit = action
            seen.add(action)
            if unit is None or kind not in (FORWARD, BACKWARD, INPUT):
                continue
            is_end = unit % slices == (0 if kind == FORWARD else slices - 1)
            kinds = (FORWARD,) if kind == FORWARD else (BACKWARD, INPUT)
            need = () if is_end else [Action(stage, own, unit - 1 if kind == FORWARD else unit + 1) for own in kinds]
            problems += [
                f"{action} stands before {first} on rank {rank}, which is of a slice that it needs; put it after that"
                for first in need
                if first in there and first not in seen
            ]
    return problems


def _order_of_parameters(schedule: Schedule) -> list[str]:
    """Lists gathers of parameters that come after work of their stage, and sums of their gradients before it."""
    problems = []
    for rank, row in enumerate(schedule.rows):
        for stage in dict.fromkeys(action.stage for action in row):
            own = [action for action in row if action.stage == stage]
            work = [at for at, action in enumerate(own) if action.is_compute]
            gathers = [at for at, action in enumerate(own) if action.kind == UNSHARD]
            sums = [at for at, action in enumerate(own) if action.kind == REDUCE_GRAD]
            if work and gathers and gathers[0] > work[0]:
                problems.append(f"{own[gathers[0]]} stands behind {own[work[0]]} on rank {rank}; put it before that")
            if work and sums and sums[0] < work[-1]:
                problems.append(f"{own[sums[0]]} stands before {own[work[-1]]} on rank {rank}; put it behind that, once")
            if len(sums) > 1:
                problems.append(f"{own[sums[0]]} stands {len(sums)} times on rank {rank}; it has to stand there once")
    return problems


def _circle(schedule: Schedule, run: Execution) -> str:
    """Says which ranks wait for each other, action by action."""
    place = {need: rank for rank, row in enumerate(schedule.rows) for action in row for need in gives(action)}
    rank = next(iter(run.blocked))
    visited: list[int] = []
    while rank not in visited:
        visited.append(rank)
        rank = place[run.blocked[rank]]
    texts = []
    for at in visited[visited.index(rank) :]:
        action, need = schedule.rows[at][len(run.starts[at])], run.blocked[at]
        giver = _giver(schedule, place[need], need)
        front = schedule.rows[place[need]][len(run.starts[place[need]])]
        texts.append(f"rank {at} waits with {action} for {giver}, which stands behind {front} on rank {place[need]}")
    return "deadlock: " + "; ".join(texts) + ": put one of these earlier in its row"


def _giver(schedule: Schedule, rank: int, need: Need) -> Action:
    return next(action for action in schedule.rows[rank] if need in gives(action))
