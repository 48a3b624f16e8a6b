"""Schedules of pipelines: the published ones, their check, their clock, and torch's CSV."""

from __future__ import annotations

import json
import random
from itertools import pairwise

import pytest
from torch.distributed.pipelining import schedules as torchs
from torch.distributed.pipelining.stage import _PipelineStageBase

from shardwright.errors import PipelineError
from shardwright.pipeline.schedules.actions import KINDS, Action
from shardwright.pipeline.schedules.bound import gap, lower_bound
from shardwright.pipeline.schedules.check import check_schedule, peak_in_flight
from shardwright.pipeline.schedules.clock import StageTimes, run_clock
from shardwright.pipeline.schedules.draw import draw_timeline, write_trace
from shardwright.pipeline.schedules.named import make_schedule, schedule_names
from shardwright.pipeline.schedules.schedule import Schedule

NAMES = schedule_names()
STAGES = {"interleaved_1f1b": (1, 2, 3), "zero_bubble_v": (2,)}
SLICES = {"seqpipe": (2, 3, 4)}
SHAPES = [
    (name, ranks, stages, slices)
    for name in NAMES
    for ranks in range(1, 9)
    for stages in STAGES.get(name, (1,))
    for slices in SLICES.get(name, (1,))
]


def micro_counts(name: str, ranks: int, slices: int = 1) -> list[int]:
    least = 2 * ranks if name == "zero_bubble_v" else -(-ranks // slices)
    return sorted({least, least + 1, 2 * least - 1, 2 * least, 2 * least + 1, 3 * least + 2})


def equal_times(count: int) -> StageTimes:
    return StageTimes([1.0] * count, [1.0] * count, [1.0] * count)


def random_times(draw: random.Random, count: int, **more) -> StageTimes:
    return StageTimes(*([draw.uniform(1, 3) for _ in range(count)] for _ in range(3)), **more)


@pytest.mark.parametrize("name, ranks, stages, slices", SHAPES)
def test_published_schedules_are_what_was_published(name, ranks, stages, slices):
    draw = random.Random(0)
    for whole in micro_counts(name, ranks, slices):
        schedule = make_schedule(name, ranks, whole, stages, slices)
        micro = whole * slices
        check_schedule(schedule)
        assert (schedule.stage_count, len(schedule.rows)) == (ranks * stages, ranks)
        across = [min(s, 2 * ranks - 1 - s) for s in range(2 * ranks)] if name == "zero_bubble_v" else None
        assert list(schedule.row_of_stage) == (across or [s % ranks for s in range(ranks * stages)])

        # Bubbles and activations as published.
        peaks = peak_in_flight(schedule)
        rate = max(run_clock(schedule, equal_times(ranks * stages)).stalls)
        p, m = ranks, micro
        assert rate == pytest.approx(
            {"zero_bubble_h1": (p - 1) / (3 * m + p - 1), "zero_bubble_v": 0.0}.get(name, (p - 1) / (stages * m + p - 1)),
            abs=1e-9,
        )
        if name == "gpipe":
            assert peaks == [m] * p
        elif name == "1f1b" or (name, stages) == ("interleaved_1f1b", 1):
            assert peaks == [p - rank for rank in range(p)]
        elif name == "interleaved_1f1b" and m % p == 0:
            assert peaks == [min(stages * m, (stages - 1) * p + 2 * (p - 1 - rank) + 1) for rank in range(p)]
        elif name == "seqpipe":
            assert peaks == [min(m, p - rank + slices - 1) for rank in range(p)]
        elif name == "zero_bubble_h1":
            assert max(peaks) <= p  # that of 1F1B
        elif name == "zero_bubble_v":
            assert max(peaks) <= 2 * p  # halves

        # No order beats the bound, whatever the stages take.
        factors = [1.0] * (micro - 1) + [0.5]
        for more in ({}, {"transfer": 0.7}, {"micro_factors": factors}):
            times = random_times(draw, ranks * stages, **more)
            timeline = run_clock(schedule, times)
            bound = lower_bound(times, micro, schedule.row_of_stage)
            assert gap(timeline, bound) >= 0
            assert bound <= lower_bound(times, micro, schedule.row_of_stage, peaks) <= timeline.seconds * (1 + 1e-12)
            total = sum(map(sum, (times.forward, times.backward, times.weight))) * (
                sum(factors) if "micro_factors" in more else m
            )
            assert sum((1 - b) * timeline.seconds for b in timeline.bubbles) == pytest.approx(total)


def test_the_bound_is_at_least_the_work_of_a_stage_after_the_forwards_before_it():
    draw = random.Random(1)
    for _ in range(20):
        count, micro = draw.randint(1, 8), draw.randint(1, 20)
        times = random_times(draw, count)
        f, i, w = times.forward, times.backward, times.weight
        least = max(sum(f[:s]) + micro * (f[s] + i[s] + w[s]) for s in range(count))
        assert lower_bound(times, micro, range(count)) >= least * (1 - 1e-12)


# The clock, by hand.


def test_the_clock_counts_transfers_between_ranks_and_small_micro_batches():
    schedule = make_schedule("1f1b", 2, 2)
    times = StageTimes([1, 1], [1, 1], [1, 1], transfer=[0.25], micro_factors=[1, 0.5], memory=[10, 3])
    timeline = run_clock(schedule, times)
    when = {str(event.action): (event.start, event.end) for event in timeline.events}
    assert when["0F1"] == (1, 1.5)
    assert when["1F0"] == (1.25, 2.25)
    assert when["1B0"] == (2.25, 4.25)
    assert when["0B0"] == (4.5, 6.5)
    assert when["1F1"] == (4.25, 4.75)
    assert when["0B1"] == (6.5, 7.5)
    assert timeline.peak_memory == (20, 3)
    assert timeline.seconds == 7.5
    assert timeline.bubbles == pytest.approx((1 - 4.5 / 7.5,) * 2)
    assert timeline.bubble == pytest.approx(1 - 4.5 / 7.5)


def test_stages_on_the_same_rank_transfer_nothing():
    schedule = make_schedule("zero_bubble_v", 1, 2)
    slow = StageTimes([1, 1], [1, 1], [1, 1], transfer=100.0)
    assert run_clock(schedule, slow).seconds == 12 == lower_bound(slow, 2, (0, 0))


# The check, against an executor that shares nothing with it.


def runs_through(schedule: Schedule) -> bool:
    """Does one thing after another, whichever can be done, and looks whether all is done."""
    home = {}
    for rank, row in enumerate(schedule.rows):
        for action in row:
            if home.setdefault(action.stage, rank) != rank:
                return False
    last = schedule.stage_count - 1
    done: set[str] = set()
    rows = [[str(action) for action in row] for row in schedule.rows]
    moved = True
    while moved:
        moved = False
        for row in rows:
            while row:
                action = Action.parse(row[0])
                s, m = action.stage, action.micro
                gradient = {f"{s + 1}B{m}", f"{s + 1}I{m}"} & done or s == last
                allowed = {
                    "F": s == 0 or f"{s - 1}F{m}" in done,
                    "B": f"{s}F{m}" in done and gradient and f"{s}I{m}" not in done,
                    "I": f"{s}F{m}" in done and gradient and f"{s}B{m}" not in done,
                    "W": f"{s}I{m}" in done,
                }[action.kind]
                if not allowed or row[0] in done:
                    break
                done.add(row.pop(0))
                moved = True
    whole = all(
        f"{s}F{m}" in done and (f"{s}B{m}" in done or f"{s}W{m}" in done)
        for s in range(schedule.stage_count)
        for m in range(schedule.micro_count)
    )
    return whole and not any(rows)


def broken(schedule: Schedule, draw: random.Random) -> Schedule:
    """Drops, doubles, swaps, moves or renames something."""
    rows = [list(row) for row in schedule.rows]
    row = draw.choice([row for row in rows if row])
    at = draw.randrange(len(row))
    way = draw.choice(("drop", "double", "swap", "neighbours", "rank", "kind", "join"))
    if way == "drop":
        del row[at]
    elif way == "double":
        row.insert(draw.randrange(len(row) + 1), row[at])
    elif way == "swap":
        other = draw.randrange(len(row))
        row[at], row[other] = row[other], row[at]
    elif way == "neighbours":
        other = max(at - 1, 0)
        row[at], row[other] = row[other], row[at]
    elif way == "rank":
        target = draw.choice(rows)
        target.insert(draw.randrange(len(target) + 1), row.pop(at))
    elif way == "kind":
        row[at] = row[at]._replace(kind=draw.choice("FBIW"))
    else:
        stage, _, micro = row[at]
        row[:] = [
            action._replace(kind="B") if action == Action(stage, "I", micro) else action
            for action in row
            if action != Action(stage, "W", micro)
        ]
    return Schedule(way, tuple(map(tuple, rows)), schedule.stage_count, schedule.micro_count)


def is_accepted(schedule: Schedule) -> bool:
    try:
        check_schedule(schedule)
    except PipelineError:
        return False
    return True


def test_the_check_refuses_exactly_what_does_not_run_through():
    draw = random.Random(2)
    outcomes = {True: 0, False: 0}
    for _ in range(400):
        name = draw.choice([name for name in NAMES if name not in SLICES])
        ranks = draw.randint(1, 4)
        schedule = make_schedule(name, ranks, 2 * ranks + draw.randint(0, 2), draw.choice(STAGES.get(name, (1,))))
        for _ in range(draw.randint(1, 2)):
            schedule = broken(schedule, draw)
        expected = runs_through(schedule)
        outcomes[expected] += 1
        assert is_accepted(schedule) == expected, schedule
    assert min(outcomes.values()) > 60


def rows_of(*texts: str) -> tuple[tuple[Action, ...], ...]:
    return tuple(tuple(map(Action.parse, text.split())) for text in texts)


def test_a_deadlock_is_told_as_a_chain():
    schedule = Schedule("mine", rows_of("0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"), 2, 2)
    with pytest.raises(PipelineError) as caught:
        check_schedule(schedule)
    assert caught.value.problems == (
        "deadlock: rank 0 waits with 0B0 for 1B0, which stands behind 1F1 on rank 1; "
        "rank 1 waits with 1F1 for 0F1, which stands behind 0B0 on rank 0: put one of these earlier in its row",
    )
    with pytest.raises(PipelineError, match="never ends; check_schedule says why"):
        run_clock(schedule, equal_times(2))
    assert str(schedule).count("\n") == 2  # it can still be looked at


def test_all_problems_are_told_at_once():
    schedule = Schedule("mine", rows_of("0F0 0B0 0I0 1F0 1F1", "1B0 1F0 2F0 0F7"), 2, 1)
    with pytest.raises(PipelineError, match="nothing was run") as caught:
        check_schedule(schedule)
    text = "\n".join(caught.value.problems)
    for part in (
        "2F0 on rank 1: there are only stages 0 to 1",
        "0F7 on rank 1: there are only micro-batches 0 to 0",
        "stage 0 is on ranks 0, 1; put it on one",
        "stage 1 is on ranks 0, 1",
        "1F0 stands in it 2 times",
        "on stage 0 is 1× 0B0, 1× 0I0; it has to be 0B0, or 0I0 and 0W0",
        "1B0 stands before 1F0 on rank 1",
    ):
        assert part in text


def test_schedules_of_inference_have_forwards_only():
    rows = rows_of("0F0 0F1", "1F0 1F1")
    check_schedule(Schedule("inference", rows, 2, 2), forward_only=True)
    for name in NAMES:
        check_schedule(make_schedule(name, 3, 7, slices=SLICES.get(name, (1,))[0]).forward_only(), forward_only=True)
    with pytest.raises(PipelineError, match="backward of micro-batch 1 on stage 0 is none of them"):
        check_schedule(Schedule("inference", rows, 2, 2))
    with pytest.raises(PipelineError, match="stage 0 has a backward of micro-batch 0"):
        check_schedule(make_schedule("1f1b", 2, 2), forward_only=True)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("1f2b", 2, 4), "no schedule '1f2b'; use one of gpipe, 1f1b"),
        (
            ("1f1b", 4, 3),
            "'1f1b' on 4 ranks needs at least 4 micro-batches and has 3; use micro_size=4 or more, or at most 3 ranks",
        ),
        (("gpipe", 2, 0), "at least 2 micro-batches and has 0"),
        (("zero_bubble_v", 4, 7), "needs at least 8 micro-batches and has 7; use micro_size=8 or more, or at most 3 ranks"),
        (("zero_bubble_v", 4, 8, 1), "with 1 stages per rank; it takes stages_per_rank=2"),
        (("1f1b", 4, 8, 2), "with 2 stages per rank; it takes stages_per_rank=1"),
        (("interleaved_1f1b", 4, 8, 0), "stages_per_rank=1 or more"),
        (("gpipe", 0, 8), "on 0 ranks; give at least one"),
        (("seqpipe", 4, 8), "in slices of their sequence and has slices=1; give slices=2 or more"),
        (("seqpipe", 4, 1, 1, 2), "needs at least 2 micro-batches and has 1; use micro_size=2 or more, or at most 2 ranks"),
        (("gpipe", 4, 8, 1, 2), 'whole and has slices=2; leave slices out, or give scheduler="seqpipe"'),
    ],
)
@pytest.mark.whole
def test_numbers_that_do_not_fit_are_refused(arguments, says):
    with pytest.raises(PipelineError) as caught:
        make_schedule(*arguments)
    assert says in str(caught.value)


def test_times_that_do_not_fit_are_refused():
    with pytest.raises(PipelineError, match="backward has 1 numbers for 2 stages; give 2"):
        StageTimes([1, 1], [1], [1, 1])
    with pytest.raises(PipelineError, match="transfer has 2 numbers for 2 stages; give 1"):
        StageTimes([1, 1], [1, 1], [1, 1], transfer=[1, 1])
    with pytest.raises(PipelineError, match="not negative"):
        StageTimes([1, -1], [1, 1], [1, 1])
    with pytest.raises(PipelineError, match="not negative"):
        StageTimes([1, float("nan")], [1, 1], [1, 1])
    schedule = make_schedule("gpipe", 2, 2)
    with pytest.raises(PipelineError, match="times of 3 stages for schedule 'gpipe' of 2"):
        run_clock(schedule, equal_times(3))
    with pytest.raises(PipelineError, match="micro_factors has 3 numbers for 2 micro-batches"):
        run_clock(schedule, StageTimes([1, 1], [1, 1], [1, 1], micro_factors=[1, 1, 1]))
    with pytest.raises(PipelineError, match="row_of_stage has 3 ranks for 2 stages"):
        lower_bound(equal_times(2), 2, (0, 1, 2))
    with pytest.raises(PipelineError, match="stage 1 on no rank"):
        _ = Schedule("mine", rows_of("0F0"), 2, 1).row_of_stage


# Texts, and torch's files.


def test_actions_are_read_as_they_are_written():
    for kind in KINDS:
        for micro in (None, 0, 12):
            if micro is not None or kind in ("UNSHARD", "RESHARD", "REDUCE_GRAD"):
                assert Action.parse(str(Action(3, kind, micro))) == Action(3, kind, micro)
                assert str(Action(3, kind, micro)) == str(torchs._Action.from_str(str(Action(3, kind, micro))))
    for text in ("", "F0", "0X1", "0F", "1SEND_F", "0F1 0F2", "-1F0"):
        with pytest.raises(PipelineError, match="no action of a pipeline schedule"):
            Action.parse(text)


class FirstStage(_PipelineStageBase):
    """As much of a stage as torch's schedules ask for while nothing runs."""

    def __init__(self, ranks: int, stages: int, index: int):
        self.group_size, self.num_stages, self.group_rank, self.group = ranks, stages, 0, None
        self.stage_index = index
        self.stage_index_to_group_rank = {stage: stage % ranks for stage in range(stages)}
        self.submod = self.has_backward = None

    def _nothing(self, *_):
        raise AssertionError("nothing runs")

    _create_grad_recv_info = _prepare_forward_infra = _prepare_backward_infra = _nothing


def of_torch(kind, ranks: int, stages: int, micro: int):
    """A schedule of torch's on rank 0, which has every ranks-th stage, or the first and the last one."""
    across = kind in (torchs.ScheduleZBVZeroBubble, torchs.ScheduleDualPipeV)
    own = [0, stages - 1] if across else range(0, stages, ranks)
    made = [FirstStage(ranks, stages, index) for index in own]
    return kind(made, micro, loss_fn=lambda *_: None)


@pytest.mark.whole
@pytest.mark.parametrize("with_communication", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        torchs.ScheduleInterleaved1F1B,
        torchs.ScheduleLoopedBFS,
        torchs.ScheduleInterleavedZeroBubble,
        torchs.ScheduleZBVZeroBubble,
        torchs.ScheduleDualPipeV,
    ],
    ids=lambda kind: kind.__name__,
)
def test_files_of_torch_are_read(kind, with_communication, tmp_path):
    for ranks, micro in ((2, 4), (4, 8)):
        theirs = of_torch(kind, ranks, 2 * ranks, micro)
        theirs._dump_csv(tmp_path / "torch.csv", format="compute_comms" if with_communication else "compute_only")
        schedule = Schedule.from_csv(tmp_path / "torch.csv")
        check_schedule(schedule)
        assert (schedule.name, schedule.stage_count, schedule.micro_count) == ("torch", 2 * ranks, micro)
        kinds = {action.kind for row in schedule.rows for action in row}
        assert kinds <= {"F", "B", "I", "W"} or with_communication
        assert not any(kind.startswith(("SEND", "RECV")) for kind in kinds)
        # What torch adds changes neither the order of work nor when it runs.
        times = equal_times(2 * ranks)
        assert run_clock(schedule, times).seconds == run_clock(schedule.compute_only(), times).seconds
        schedule.to_csv(tmp_path / "ours.csv")
        assert Schedule.from_csv(tmp_path / "ours.csv", "torch") == schedule


def test_files_of_torch_with_one_stage_per_rank_are_read(tmp_path):
    for kind, name in ((torchs.ScheduleGPipe, "gpipe"), (torchs.Schedule1F1B, "1f1b")):
        for ranks, micro in ((1, 2), (2, 4), (4, 6)):
            theirs = kind(FirstStage(ranks, ranks, 0), micro, loss_fn=lambda *_: None)._get_pipeline_order()
            text = "\n".join(",".join("" if a is None else str(a) for a in theirs[rank]) for rank in range(ranks))
            (tmp_path / "torch.csv").write_text(text)
            read = Schedule.from_csv(tmp_path / "torch.csv", name)
            assert any(action.kind == "REDUCE_GRAD" for row in read.rows for action in row)
            ours, rows = make_schedule(name, ranks, micro), read.compute_only().rows
            if name == "gpipe":
                assert (rows, read.micro_count) == (ours.rows, micro)
            else:  # of torch's 1F1B the listing, not what runs, begins on the last rank with F1
                assert rows[:-1] == ours.rows[:-1]


@pytest.mark.whole
@pytest.mark.parametrize("name", NAMES)
def test_torch_reads_our_files(name, tmp_path):
    for ranks, micro in ((2, 4), (3, 7), (4, 8)):
        slices = SLICES.get(name, (1,))[0]
        schedule = make_schedule(name, ranks, micro, STAGES.get(name, (1,))[-1], slices)
        schedule.to_csv(tmp_path / "ours.csv")
        assert Schedule.from_csv(tmp_path / "ours.csv", name, slices) == schedule
        theirs = of_torch(torchs._PipelineScheduleRuntime, ranks, schedule.stage_count, micro * slices)
        theirs._load_csv(str(tmp_path / "ours.csv"))  # puts sends and receives in, which raises where they never meet
        assert theirs.stage_index_to_group_rank == dict(enumerate(schedule.row_of_stage))
        theirs._dump_csv(tmp_path / "torch.csv", format="compute_comms")
        assert Schedule.from_csv(tmp_path / "torch.csv", name, slices).compute_only() == schedule


def test_files_that_are_none_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("0F0,0B0\n1F0,oops\n")
    with pytest.raises(PipelineError, match=r"a.csv, row 2: 'oops' is no action"):
        Schedule.from_csv(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text(",,\n")
    with pytest.raises(PipelineError, match=r"b.csv has no action"):
        Schedule.from_csv(tmp_path / "b.csv")


# Pictures.


def test_a_timeline_is_drawn_and_traced(tmp_path):
    timeline = run_clock(make_schedule("zero_bubble_v", 2, 4), equal_times(4))
    for name in ("a.png", "a.svg"):
        draw_timeline(timeline, tmp_path / name)
    drawn = (tmp_path / "a.svg").read_text()
    assert all(text in drawn for text in ("rank 1", "0F3", "gradients of weights"))
    with pytest.raises(PipelineError, match="cannot draw a .gif: name a .png or .svg file"):
        draw_timeline(timeline, tmp_path / "a.gif")
    write_trace(timeline, tmp_path / "a.json")
    events = [event for event in json.loads((tmp_path / "a.json").read_text())["traceEvents"] if event["ph"] == "X"]
    assert len(events) == 4 * 4 * 3
    for rank in range(2):
        row = sorted((event for event in events if event["tid"] == rank), key=lambda event: event["ts"])
        assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-6 for a, b in pairwise(row))
