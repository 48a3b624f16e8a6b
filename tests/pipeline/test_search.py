"""The search for schedules, its bound, and a referee for both."""

from __future__ import annotations

import random

import pytest
from schedule_referee import least_seconds

from shardwright.errors import PipelineError
from shardwright.pipeline.schedules.bound import gap, lower_bound
from shardwright.pipeline.schedules.check import check_schedule, peak_in_flight
from shardwright.pipeline.schedules.clock import StageTimes, run_clock
from shardwright.pipeline.schedules.named import make_schedule, schedule_names
from shardwright.pipeline.schedules.search import search_schedule


def random_times(draw: random.Random, count: int, **more) -> StageTimes:
    return StageTimes(*([draw.uniform(1, 3) for _ in range(count)] for _ in range(3)), **more)


def published(ranks: int, micro: int, row_of_stage: tuple[int, ...]):
    for name in schedule_names():
        for stages in range(1, 4):
            try:
                schedule = make_schedule(name, ranks, micro, stages)
            except PipelineError:
                continue
            if schedule.row_of_stage == row_of_stage:
                yield schedule


def test_searched_schedules_are_near_the_bound_and_never_behind_published_ones():
    draw = random.Random(3)
    near = 0
    for _ in range(12):
        ranks, micro = draw.randint(2, 8), draw.randint(4, 20)
        times = random_times(draw, ranks, transfer=draw.choice((0.0, 0.2)))
        found = search_schedule(times, micro, range(ranks))
        check_schedule(found)
        timeline = run_clock(found, times)
        for other in published(ranks, micro, tuple(range(ranks))):
            assert timeline.seconds <= run_clock(other, times).seconds * (1 + 1e-9), other.name
        near += gap(timeline, lower_bound(times, micro, range(ranks))) < 0.01
    assert near >= 10


@pytest.mark.parametrize("row_of_stage", [(0, 1, 2), (0, 1, 2, 2, 1, 0), (0, 1, 0, 1), (0, 0, 1), (0,), (1, 0, 0, 1)], ids=str)
def test_no_rank_holds_more_than_it_may(row_of_stage):
    draw = random.Random(4)
    ranks = max(row_of_stage) + 1
    stages = [row_of_stage.count(rank) for rank in range(ranks)]
    for extra in (0, 2):
        times = random_times(draw, len(row_of_stage), transfer=0.1)
        limits = [count + extra for count in stages]
        found = search_schedule(times, 6, row_of_stage, limits)
        check_schedule(found)
        assert found.row_of_stage == row_of_stage
        assert all(peak <= limit for peak, limit in zip(peak_in_flight(found), limits))
        seconds = run_clock(found, times).seconds
        assert seconds >= lower_bound(times, 6, row_of_stage, limits) * (1 - 1e-12)
        for other in published(ranks, 6, row_of_stage):
            if all(peak <= limit for peak, limit in zip(peak_in_flight(other), limits)):
                assert seconds <= run_clock(other, times).seconds * (1 + 1e-9)


def test_the_same_times_give_the_same_schedule_and_whole_backwards_where_splitting_gains_nothing():
    times = StageTimes([1, 1.5, 1.2], [1, 1.4, 1], [1, 1, 2])
    assert search_schedule(times, 5, range(3), 3) == search_schedule(times, 5, range(3), 3)
    alone = search_schedule(StageTimes([1], [1], [1]), 4, (0,))
    assert all(action.kind in "FB" for action in alone.rows[0])


def test_a_referee_finds_nothing_below_the_bound_and_little_below_the_search():
    draw = random.Random(5)
    for case in range(8):
        count = draw.randint(2, 3)
        micro = draw.randint(count, 4)
        row_of_stage = (0, 1, 0) if case % 4 == 3 and count == 3 else tuple(range(count))
        f, i, w = ([draw.randint(10, 30) for _ in range(count)] for _ in range(3))
        transfer, cap = draw.choice((0, 5)), draw.choice((None, None, 3))
        times = StageTimes(f, i, w, transfer)
        optimum = least_seconds(f, i, w, micro, row_of_stage, cap, transfer, limit_s=60.0)
        assert optimum is not None
        assert lower_bound(times, micro, row_of_stage, cap) <= optimum + 1e-6
        seconds = run_clock(search_schedule(times, micro, row_of_stage, cap), times).seconds
        assert optimum - 1e-6 <= seconds <= optimum * (1.0 + 1e-9 if cap is None else 1.05)


def test_limits_that_cannot_be_kept_are_refused():
    times = StageTimes([1] * 4, [1] * 4, [1] * 4)
    with pytest.raises(PipelineError, match="most_in_flight is 1 on rank 0, which has 2 stages.*allow at least 2"):
        search_schedule(times, 4, (0, 1, 1, 0), 1)
    with pytest.raises(PipelineError, match="2 numbers for 4 ranks"):
        search_schedule(times, 4, range(4), (3, 3))
    with pytest.raises(PipelineError, match="give each stage a rank"):
        search_schedule(times, 4, (0, 2, 3, 4))
    with pytest.raises(PipelineError, match="micro_count is 0"):
        search_schedule(times, 0, range(4))
