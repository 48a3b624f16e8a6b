"""Searches for a schedule of least time for stages that take different times, within a limit on activations."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from shardwright.errors import PipelineError
from shardwright.pipeline.schedules.actions import BACKWARD, INPUT, WEIGHT, Action
from shardwright.pipeline.schedules.bound import lower_bound, relax
from shardwright.pipeline.schedules.check import peak_in_flight
from shardwright.pipeline.schedules.clock import StageTimes
from shardwright.pipeline.schedules.execution import execute
from shardwright.pipeline.schedules.list_scheduler import ListScheduler, Policy
from shardwright.pipeline.schedules.named import make_schedule, schedule_names
from shardwright.pipeline.schedules.repair import repair
from shardwright.pipeline.schedules.schedule import Schedule

EFFORT = 30_000  # actions scheduled in trying changed policies, a quarter of a second; three times as many in moving actions
TRIED = 400_000  # actions scheduled under the policies that are tried first; only large pipelines have more
NEAR = 1.02  # rows that are slower than this as they are scheduled are not run through the clock
CLOSE = 1e-9  # of the time: what is no nearer to the bound is not looked for, and what differs less is the same


@dataclass
class _Best:
    """The best schedule so far, by its time, then by the number of its actions."""

    times: StageTimes
    micro_count: int
    row_of_stage: tuple[int, ...]
    rows: Sequence[Sequence[Action]] = ()
    seconds: float = float("inf")
    policy: Policy | None = None

    def clock(self, rows: Sequence[Sequence[Action]]) -> float:
        ends = execute(rows, self.times.stage_count, self.times.durations(self.row_of_stage)).ends
        return max((row[-1] for row in ends if row), default=0.0)

    def offer(self, rows: Sequence[Sequence[Action]], policy: Policy | None = None) -> bool:
        """Takes rows if they are better."""
        seconds = self.clock(rows)
        faster = seconds < self.seconds * (1 - CLOSE)
        if faster or (seconds <= self.seconds * (1 + CLOSE) and _size(rows) < _size(self.rows)):
            self.rows, self.seconds, self.policy = rows, min(seconds, self.seconds), policy or self.policy
            return True
        return False


def search_schedule(
    times: StageTimes,
    micro_count: int,
    row_of_stage: Sequence[int],
    most_in_flight: int | Sequence[int] | None = None,
) -> Schedule:
    """Finds a schedule of little time: no slower than any published one that fits, and mostly at the lower bound.

    Published schedules and list schedules under many policies are tried; from the best of them policies are changed at random,
    always the same way, until one reaches the bound or the effort is spent. Backwards that lose nothing by it stay whole.

    Args:
        times: the seconds of the stages.
        micro_count: how many micro-batches.
        row_of_stage: the rank of each stage.
        most_in_flight: the most activations that each rank may hold, one number for all or one for each; see
            :func:`peak_in_flight`.

    Raises:
        PipelineError: the ranks are not those of the stages, or a limit is smaller than the number of a rank's stages.
    """
    limits = _limits(times, micro_count, row_of_stage, most_in_flight)
    best = _Best(times, micro_count, tuple(row_of_stage))
    for schedule in _published(micro_count, row_of_stage):
        if all(peak <= limit for peak, limit in zip(peak_in_flight(schedule), limits)):
            best.offer(schedule.rows)
    bound = lower_bound(times, micro_count, row_of_stage, limits) * (1 + CLOSE)
    scheduler = ListScheduler(times, micro_count, row_of_stage, relax(times, micro_count, row_of_stage))
    spent = 0
    for policy in _policies(times, row_of_stage, limits):
        rows, seconds = scheduler.run(policy)
        spent += _size(rows)
        if seconds < best.seconds * NEAR:
            best.offer(rows, policy)
        if (best.seconds <= bound and not policy.split) or spent > TRIED:
            break
    if best.seconds > bound:
        _change(best, scheduler, limits, bound)
    if best.seconds > bound:
        steps = 3 * EFFORT // sum(map(len, best.rows)) + 1
        best.offer(repair(best.rows, times.durations(row_of_stage), row_of_stage, limits, steps, bound))
    _join(best)
    return Schedule("searched", tuple(tuple(row) for row in best.rows), times.stage_count, micro_count)


def _limits(
    times: StageTimes, micro_count: int, row_of_stage: Sequence[int], most: int | Sequence[int] | None
) -> tuple[int, ...]:
    """Returns the limit of each rank; without one it is all that there is."""
    ranks = max(row_of_stage, default=-1) + 1
    if len(row_of_stage) != times.stage_count or set(row_of_stage) != set(range(ranks)):
        raise PipelineError(
            f"row_of_stage is {tuple(row_of_stage)} for {times.stage_count} stages; give each stage a rank, from 0 without gaps"
        )
    if micro_count < 1:
        raise PipelineError(f"micro_count is {micro_count}; give at least one")
    stages = [list(row_of_stage).count(rank) for rank in range(ranks)]
    if most is None:
        return tuple(micro_count * count for count in stages)
    limits = (most,) * ranks if isinstance(most, int) else tuple(most)
    if len(limits) != ranks:
        raise PipelineError(f"most_in_flight has {len(limits)} numbers for {ranks} ranks; give one for each, or one for all")
    for rank, (limit, count) in enumerate(zip(limits, stages)):
        if limit < count:
            raise PipelineError(
                f"most_in_flight is {limit} on rank {rank}, which has {count} stages: a micro-batch is held on each of them; "
                f"allow at least {count}"
            )
    return limits


def _published(micro_count: int, row_of_stage: Sequence[int]) -> Iterator[Schedule]:
    """Makes the published schedules that have these stages on these ranks."""
    ranks = max(row_of_stage) + 1
    for name in schedule_names():
        try:
            schedule = make_schedule(name, ranks, micro_count, len(row_of_stage) // ranks)
        except PipelineError:  # too few micro-batches for it, or another number of stages
            continue
        if schedule.row_of_stage == tuple(row_of_stage):
            yield schedule


def _policies(times: StageTimes, row_of_stage: Sequence[int], limits: tuple[int, ...]) -> Iterator[Policy]:
    """Makes the policies that are tried first, the more promising before the others."""
    count = len(row_of_stage)
    lead = [0] * len(limits)  # activations that 1F1B holds
    for stage, rank in enumerate(row_of_stage):
        lead[rank] += count - stage
    shares = (None, 1.5, 1.0, 2.0)
    for share, patience, first, split in itertools.product(shares, (0.0, 0.5, 1.0), ("IFW", "", "FIW", "IWF"), (True, False)):
        if not split and patience:
            continue
        wanted = limits if share is None else tuple(int(share * held) for held in lead)
        least = [list(row_of_stage).count(rank) for rank in range(len(limits))]
        in_flight = tuple(max(low, min(limit, want)) for low, limit, want in zip(least, limits, wanted))
        yield Policy(first, split, in_flight, patience)


def _change(best: _Best, scheduler: ListScheduler, limits: tuple[int, ...], bound: float) -> None:
    """Changes the best policy at random and keeps what is better."""
    draw = random.Random(0)
    count = len(scheduler.row_of_stage)
    policy = best.policy or Policy("", True, limits)
    seconds = best.seconds if best.policy else float("inf")
    turns = EFFORT // (3 * count * scheduler.micro_count) + 1
    for turn in range(turns):
        changed = _changed(policy, draw, scheduler, limits, strength=1.0 if turn % 4 == 0 else 0.2)
        rows, now = scheduler.run(changed)
        if now <= seconds * (1 + CLOSE):
            policy, seconds = changed, now
            best.offer(rows, changed)
        if best.seconds <= bound:
            return


def _changed(policy: Policy, draw: random.Random, scheduler: ListScheduler, limits: tuple[int, ...], strength: float) -> Policy:
    """Changes the weights of some stages, and sometimes a limit or the patience."""
    count = len(scheduler.row_of_stage)
    weights = list(policy.weights or ((1.0, 1.0),) * count)
    for stage in range(count):
        if draw.random() < 0.4:
            f, i = weights[stage]
            weights[stage] = (f * 2 ** draw.gauss(0, strength), i * 2 ** draw.gauss(0, strength))
    in_flight = list(policy.in_flight)
    rank = draw.randrange(len(limits))
    if draw.random() < 0.5:
        least = len(scheduler.stages[rank])
        in_flight[rank] = max(least, min(limits[rank], in_flight[rank] + draw.choice((-2, -1, 1, 2))))
    patience = draw.choice((0.0, 0.3, 0.6, 1.0)) if draw.random() < 0.2 else policy.patience
    first = draw.choice(("", "IFW", "FIW")) if draw.random() < 0.15 else policy.first
    return replace(policy, first=first, split=True, in_flight=tuple(in_flight), patience=patience, weights=tuple(weights))


def _join(best: _Best) -> None:
    """Makes one B of I and W where that takes no longer: of all of them, or else of the halves, and so on."""
    turns = EFFORT // _size(best.rows) + len(best.rows) // 4 + 2
    groups = [[action for row in best.rows for action in row if action.kind == INPUT]]
    while groups and turns:
        group = groups.pop()
        if group and not best.offer([_joined(row, group) for row in best.rows]):
            half = len(group) // 2
            groups += [group[half:], group[:half]] if half else []
        turns -= 1


def _joined(row: Sequence[Action], inputs: Sequence[Action]) -> list[Action]:
    """Replaces some I by B, and drops their W."""
    chosen = set(inputs)
    joined = [action._replace(kind=BACKWARD) if action in chosen else action for action in row]
    return [action for action in joined if action.kind != WEIGHT or action._replace(kind=INPUT) not in chosen]


def _size(rows: Sequence[Sequence[Action]]) -> int:
    return sum(map(len, rows)) if rows else 1 << 60
