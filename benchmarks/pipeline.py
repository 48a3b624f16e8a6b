"""Pipelines. Part 1, schedules: bubbles against closed forms, the search against its bound, and a referee. Part 2, training.

    python benchmarks/pipeline.py [--check] [--part {1,2}] [--ranks 2 4] [--rounds 20] [--only "gpt, 1f1b"]

Nothing of part 1 depends on the machine but the times of the search. Part 2 trains on gloo ranks of this machine, one thread
each, and needs its cores for itself: the step of our pipelines against that of ``torch.distributed.pipelining`` with the same
stages and schedule, and against a plain run of the whole batch, stage after stage; and the memory of each rank against the
plan's.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from itertools import product

import pipeline_training
from schedule_referee import least_seconds

from shardwright.errors import PipelineError
from shardwright.pipeline.schedules.bound import gap, lower_bound
from shardwright.pipeline.schedules.check import check_schedule, peak_in_flight
from shardwright.pipeline.schedules.clock import StageTimes, run_clock
from shardwright.pipeline.schedules.named import make_schedule, schedule_names
from shardwright.pipeline.schedules.schedule import Schedule
from shardwright.pipeline.schedules.search import search_schedule

RANKS, TURNS = (2, 4, 8, 16, 64), (1, 2, 4)  # micro-batches are so many times the least that a schedule needs
SLICES = 4  # of micro-batches, for schedules that have them
CASES, REFEREED = 500, 30


class Targets:
    """What was to be reached, and what was missed."""

    def __init__(self) -> None:
        self.missed: list[str] = []

    def reached(self, what: str, value: float, limit: float, at_least: bool = False) -> None:
        fine = value >= limit if at_least else value <= limit
        print(f"  {'reached' if fine else 'MISSED '}  {what}: {value:.4g}, at {'least' if at_least else 'most'} {limit:g}")
        if not fine:
            self.missed.append(what)


def published(ranks: int, micro: int, row_of_stage: tuple[int, ...]) -> list[Schedule]:
    """The published schedules that have these stages on these ranks."""
    found = []
    for name in schedule_names():
        try:
            schedule = make_schedule(name, ranks, micro, len(row_of_stage) // ranks)
        except PipelineError:
            continue
        if schedule.row_of_stage == row_of_stage:
            found.append(schedule)
    return found


def closed_form(name: str, p: int, m: int, v: int) -> tuple[float, float]:
    """The published rate of bubbles, and the most activations of a rank, where F, I and W take the same time."""
    return {
        "gpipe": ((p - 1) / (m + p - 1), m),
        "1f1b": ((p - 1) / (m + p - 1), p),
        "interleaved_1f1b": ((p - 1) / (v * m + p - 1), (v - 1) * p + 2 * (p - 1) + 1),
        "zero_bubble_h1": ((p - 1) / (3 * m + p - 1), p),  # a third of 1F1B's idle seconds
        "zero_bubble_v": (0.0, 2 * p),  # of stages half as large
        "seqpipe": ((p - 1) / (SLICES * m + p - 1), p + SLICES - 1),  # of slices
    }[name]


def bubbles(targets: Targets) -> None:
    print(f"\n{'bubbles':20}{'ranks':>6}{'stages':>8}{'micro':>7}{'bubble':>10}{'published':>10}{'peak':>7}{'published':>10}")
    off = over = 0.0
    for name, ranks, turn in product(schedule_names(), RANKS, TURNS):
        for per_rank in {"interleaved_1f1b": (2, 4), "zero_bubble_v": (2,)}.get(name, (1,)):
            micro = ranks * turn * (2 if name == "zero_bubble_v" else 1)
            schedule = make_schedule(name, ranks, micro, per_rank, SLICES if name == "seqpipe" else 1)
            check_schedule(schedule)
            count = schedule.stage_count
            rate = max(run_clock(schedule, StageTimes([1.0] * count, [1.0] * count, [1.0] * count)).stalls)
            peaks = peak_in_flight(schedule)
            expected, most = closed_form(name, ranks, micro, per_rank)
            print(f"{name:20}{ranks:>6}{count:>8}{micro:>7}{rate:>10.4f}{expected:>10.4f}{max(peaks):>7}{most:>10}")
            off = max(off, abs(rate - expected) / expected if expected else rate)
            over = max(over, max(peaks) - most)
            if name == "1f1b":
                over = max(over, *(peak - (ranks - rank) for rank, peak in enumerate(peaks)))
    targets.reached("bubbles, farthest from the published rate", off, 0.02)
    targets.reached("activations held beyond what was published", over, 0)
    large = make_schedule("zero_bubble_h1", 64, 256)
    started = time.process_time()
    run_clock(large, StageTimes([1.0] * 64, [1.0] * 64, [1.0] * 64))
    targets.reached("clock of 64 stages and 256 micro-batches, seconds", time.process_time() - started, 1.0)


def search(targets: Targets) -> None:
    draw = random.Random(0)
    gaps, seconds, gains = [], [], []
    for _ in range(CASES):
        stages, micro = draw.randint(2, 8), draw.randint(4, 32)
        times = StageTimes(*([draw.uniform(1, 3) for _ in range(stages)] for _ in range(3)))
        started = time.process_time()
        schedule = search_schedule(times, micro, range(stages))
        seconds.append(time.process_time() - started)
        check_schedule(schedule)
        timeline = run_clock(schedule, times)
        gaps.append(gap(timeline, lower_bound(times, micro, range(stages))))
        others = [run_clock(other, times).seconds for other in published(stages, micro, tuple(range(stages)))]
        if others:
            gains.append(min(others) / timeline.seconds)
    gaps.sort()
    print(
        f"\nsearch: {CASES} pipelines of 2 to 8 unequal stages and 4 to 32 micro-batches; {len(gains)} have published schedules"
    )
    print(f"  median gap {gaps[len(gaps) // 2]:.2g}, the largest {gaps[-1]:.3f}; {sum(g < 1e-6 for g in gaps)} proved optimal")
    print(f"  the best published one takes {sum(gains) / len(gains):.3f} times as long on average, {max(gains):.3f} at most")
    targets.reached("within 1 % of the bound, share", sum(g < 0.01 for g in gaps) / CASES, 0.9, at_least=True)
    targets.reached("the best published one over the searched one, least", min(gains) + 1e-9, 1.0, at_least=True)
    targets.reached("seconds per search, mean", sum(seconds) / CASES, 1.0)
    targets.reached("seconds per search, longest", max(seconds), 2.0)


def referee(targets: Targets) -> None:
    """Small pipelines, with and without limits, against the optimum that CP-SAT proves."""
    draw = random.Random(1)
    loose, above, capped, proved = [], [], [], 0
    print(f"\n{'referee':>9}  ranks of stages, micro-batches, limit, transfer: bound, optimum, searched")
    for case in range(REFEREED):
        stages = draw.randint(2, 4)
        micro = draw.randint(stages, 8)
        row_of_stage = (0, 1, 1, 0) if case % 5 == 4 and stages == 4 else tuple(range(stages))
        f, i, w = ([draw.randint(10, 30) for _ in range(stages)] for _ in range(3))
        transfer, limit = draw.choice((0, 0, 5)), None if case % 2 else draw.randint(2, 4)
        times = StageTimes(f, i, w, transfer)
        optimum = least_seconds(f, i, w, micro, row_of_stage, limit, transfer, limit_s=10.0)
        bound = lower_bound(times, micro, row_of_stage, limit)
        found = run_clock(search_schedule(times, micro, row_of_stage, limit), times).seconds
        print(f"{case:>9}  {row_of_stage}, {micro}, {limit}, {transfer}: {bound:g}, {optimum}, {found:g}")
        if optimum is not None:
            proved += 1
            loose.append(bound / optimum)
            (above if limit is None else capped).append(found / optimum - 1)
    targets.reached("optima proved", proved, 0.8 * REFEREED, at_least=True)
    targets.reached("bound over optimum, largest", max(loose), 1 + 1e-9)
    targets.reached("searched without a limit over optimum - 1, largest", max(above), 0.01)
    targets.reached("searched under a limit over optimum - 1, mean", sum(capped) / len(capped), 0.02)


def schedules(targets: Targets, options: argparse.Namespace) -> None:
    """Part 1: schedules by themselves, without tensors."""
    bubbles(targets)
    search(targets)
    referee(targets)


def trains(targets: Targets, options: argparse.Namespace) -> None:
    """Part 2: training steps on ranks of this machine."""
    pipeline_training.steps(targets, options.ranks, options.rounds, options.only)
    pipeline_training.memory(targets, options.ranks, options.only)


PARTS: dict[int, Callable[[Targets, argparse.Namespace], None]] = {1: schedules, 2: trains}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    parser.add_argument("--part", type=int, choices=PARTS, help="only this part")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="of part 2")
    parser.add_argument("--rounds", type=int, default=20, help="steps of each variant of part 2")
    parser.add_argument("--only", default="", help="cases of part 2 whose name has this in it")
    options = parser.parse_args()
    targets = Targets()
    for name, part in PARTS.items():
        if options.part in (None, name):
            part(targets, options)
    print(f"{len(targets.missed)} targets missed" if targets.missed else "all targets reached")
    return 1 if targets.missed and options.check else 0


if __name__ == "__main__":
    raise SystemExit(main())
