"""A lower bound on the seconds of every schedule: what no order of the work can beat.

Each rank is looked at by itself. A piece of its work has a *head*, the least time before it can start, and a *tail*, the least
time that passes after its end. How long the rank needs at least under heads and tails, even if it could interrupt its work, is
found exactly by always doing what has the longest tail (Jackson's rule). Heads and tails are those of flow shops: of k
micro-batches that have passed a stage, k have passed the stage before. Micro-batches are alike, so the k-th to run on a stage
may be called micro-batch k, whatever the order.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from shardwright.errors import PipelineError
from shardwright.pipeline.schedules.clock import StageTimes, Timeline

ROUNDING = 1e-12

Table = list[list[float]]  # by stage and micro-batch


@dataclass(frozen=True)
class Relaxation:
    """Least times before and after each piece of work, by stage and by the order in which micro-batches pass it.

    ``remaining_f[s][j]`` is the least time from the start of an F on stage s, which j others are to follow there, to the end of
    everything; ``remaining_i`` that of I.
    """

    start_f: Table
    start_i: Table
    start_w: Table
    remaining_f: Table
    remaining_i: Table


def relax(times: StageTimes, micro_count: int, row_of_stage: Sequence[int]) -> Relaxation:
    """Computes heads and tails; where micro-batches differ, all count as the smallest."""
    factor = min((times.factor(micro) for micro in range(micro_count)), default=1.0)
    f, i, w = ([factor * seconds for seconds in of] for of in (times.forward, times.backward, times.weight))
    delays = times.delays(row_of_stage)
    count, stages = micro_count, range(times.stage_count)
    last = times.stage_count - 1

    start_f: Table = [[0.0] * count for _ in stages]
    end_f: Table = [[0.0] * count for _ in stages]
    for s in stages:
        for k in range(count):
            start_f[s][k] = max(end_f[s - 1][k] + delays[s - 1] if s else 0.0, end_f[s][k - 1] if k else 0.0)
            end_f[s][k] = start_f[s][k] + f[s]
    start_i: Table = [[0.0] * count for _ in stages]
    end_i: Table = [[0.0] * count for _ in stages]
    remaining_i: Table = [[0.0] * (count + 1) for _ in stages]
    remaining_f: Table = [[0.0] * (count + 1) for _ in stages]
    for s in reversed(stages):
        for k in range(count):
            come = end_i[s + 1][k] + delays[s] if s < last else 0.0
            before = max(end_i[s][k - 1] if k else 0.0, start_f[s][0] + (k + 1) * f[s] + k * i[s])
            start_i[s][k] = max(come, before, end_f[s][k])
            end_i[s][k] = start_i[s][k] + i[s]
    for s in stages:
        for j in range(1, count + 1):
            after = remaining_i[s - 1][j] + delays[s - 1] if s else 0.0
            remaining_i[s][j] = max(i[s] + after, i[s] + remaining_i[s][j - 1], j * (i[s] + w[s]))
    for s in reversed(stages):
        for j in range(1, count + 1):
            after = remaining_f[s + 1][j] + delays[s] if s < last else 0.0
            after = max(after, remaining_i[s][j], remaining_f[s][j - 1])
            remaining_f[s][j] = max(f[s] + after, j * (f[s] + i[s] + w[s]))
    cut = [row[1:] for row in remaining_f], [row[1:] for row in remaining_i]
    return Relaxation(start_f, start_i, end_i, *cut)


def lower_bound(
    times: StageTimes, micro_count: int, row_of_stage: Sequence[int], most_in_flight: int | Sequence[int] | None = None
) -> float:
    """Returns seconds that no schedule of these stages on these ranks can beat, whether or not it splits backwards.

    It is at least the work of each rank with the forwards before its first stage. Under a limit it is also at least the time
    in which each rank can hold every activation as long as it has to.

    Args:
        times: the seconds of the stages.
        micro_count: how many micro-batches.
        row_of_stage: the rank of each stage.
        most_in_flight: the most activations that each rank may hold, one number for all or one for each.

    Raises:
        PipelineError: the ranks are those of another number of stages.

    >>> lower_bound(StageTimes([1, 2], [1, 2], [1, 2]), micro_count=4, row_of_stage=(0, 1))
    25.0
    """
    if len(row_of_stage) != times.stage_count:
        raise PipelineError(f"row_of_stage has {len(row_of_stage)} ranks for {times.stage_count} stages; give one for each")
    relaxed = relax(times, micro_count, row_of_stage)
    factors = [times.factor(micro) for micro in range(micro_count)]
    least = min(factors, default=1.0)
    bound = 0.0
    for at, rank in enumerate(sorted(set(row_of_stage))):
        stages = [s for s, row in enumerate(row_of_stage) if row == rank]
        jobs = []
        for s in stages:
            f, i, w = (least * of[s] for of in (times.forward, times.backward, times.weight))
            for k in range(micro_count):
                j = micro_count - 1 - k
                jobs.append((relaxed.start_f[s][k], f, relaxed.remaining_f[s][j] - f))
                jobs.append((relaxed.start_i[s][k], i, relaxed.remaining_i[s][j] - i))
                jobs.append((relaxed.start_w[s][k], w, 0.0))
        whole = sum(times.forward[s] + times.backward[s] + times.weight[s] for s in stages) * sum(factors)
        head = times.unshard[0] + min(relaxed.start_f[s][0] for s in stages)  # everything waits for the first stage
        whole += sum(times.reduce[s] for s in stages)
        bound = max(bound, times.unshard[0] + _interruptible(jobs), head + whole, sum(times.unshard[s] for s in stages) + whole)
        if most_in_flight is not None:
            limit = most_in_flight if isinstance(most_in_flight, int) else most_in_flight[at]
            bound = max(bound, head + _holding(times, factors, row_of_stage, stages, limit))
    return bound


def gap(timeline: Timeline, bound: float) -> float:
    """Returns by which share a timeline is longer than a bound: 0.01 is one percent."""
    share = timeline.seconds / bound - 1 if bound else 0.0
    return share if abs(share) > ROUNDING else 0.0


def _holding(
    times: StageTimes, factors: Sequence[float], row_of_stage: Sequence[int], stages: Sequence[int], limit: int
) -> float:
    """Returns the least time in which a rank holds each activation from its F to its W, within a limit.

    At first and at last it holds fewer: forwards follow each other, and so do the works that free an activation.
    """
    if len(factors) * len(stages) < limit or limit < 1:
        return 0.0
    delays = times.delays(row_of_stage)
    held = 0.0
    for s in stages:
        there = sum(times.forward[s:]) + sum(times.backward[s:]) + times.weight[s]
        held += sum(factors) * there + len(factors) * 2 * sum(delays[s:])
    apart = min(times.forward[s] for s in stages) + min(times.weight[s] for s in stages)
    return (held + min(factors) * apart * limit * (limit - 1) / 2) / limit


def _interruptible(jobs: list[tuple[float, float, float]]) -> float:
    """Returns the least time of one rank for jobs of (head, seconds, tail), if it could interrupt them."""
    jobs = sorted(jobs)
    waiting: list[list[float]] = []  # (-tail, seconds left)
    now = longest = 0.0
    at = 0
    while waiting or at < len(jobs):
        if not waiting:
            now = max(now, jobs[at][0])
        while at < len(jobs) and jobs[at][0] <= now:
            heapq.heappush(waiting, [-jobs[at][2], jobs[at][1]])
            at += 1
        job = waiting[0]
        end = now + job[1]
        if at < len(jobs) and jobs[at][0] < end:
            job[1] -= jobs[at][0] - now
            now = jobs[at][0]
        else:
            heapq.heappop(waiting)
            now = end
            longest = max(longest, end - job[0])
    return longest
