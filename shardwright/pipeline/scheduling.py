"""Chooses the schedule of a pipeline: as asked, searched for, or all forwards first where the batch is too small."""

from __future__ import annotations

import math
from dataclasses import replace

from shardwright.errors import PipelineError
from shardwright.pipeline.batch import Batch
from shardwright.pipeline.cell import SEARCHED, PipelineRequest
from shardwright.pipeline.schedules.actions import BACKWARD, FORWARD, Action
from shardwright.pipeline.schedules.check import check_schedule
from shardwright.pipeline.schedules.clock import StageTimes
from shardwright.pipeline.schedules.named import make_schedule
from shardwright.pipeline.schedules.schedule import Schedule
from shardwright.pipeline.schedules.search import search_schedule
from shardwright.pipeline.stages import Placement

FORWARDS_FIRST = "forwards first"


def micro_batches(batch: Batch, micro_size: int) -> tuple[int, ...]:
    """Returns the sizes of the micro-batches, as ``torch.chunk`` cuts: of 5 samples in 4 they are 2, 2 and 1.

    Raises:
        PipelineError: nothing carries a batch.
    """
    size = batch.size
    if not size:
        raise PipelineError(
            f"a pipeline needs a tensor input whose dim {batch.dim} is the batch; give it one with at least one sample"
        )
    step = math.ceil(size / min(micro_size, size))
    return tuple(min(step, size - at) for at in range(0, size, step))


def placement_of(request: PipelineRequest, rows: int, micro_size: int) -> Placement:
    """Returns which row runs which stage, and refuses a request that no batch can be run with.

    Args:
        request: what was asked for.
        rows: number of rows.
        micro_size: number of micro-batches that was asked for.

    Raises:
        PipelineError: too few micro-batches for the schedule, or a schedule of other numbers.
    """
    asked = request.scheduler
    if isinstance(asked, Schedule):
        micro = asked.micro_count // asked.slices
        if len(asked.rows) != rows or micro != micro_size:
            raise PipelineError(
                f"pipeline(scheduler=...): the schedule {asked.name!r} is of {len(asked.rows)} ranks and "
                f"{micro} micro-batches, the pipeline of {rows} and {micro_size}; give "
                f"PipelineCell(micro_size={micro}) and stages={len(asked.rows)}, or a schedule of theirs"
            )
        check_schedule(asked)
        return Placement(rows, asked.row_of_stage)
    if asked == SEARCHED:
        if micro_size < rows:
            raise PipelineError(
                f"a searched schedule on {rows} stages needs at least {rows} micro-batches and has {micro_size}; "
                f"use micro_size={rows} or more"
            )
        return Placement.of(rows, 2 if request.interleave else 1)
    return Placement(rows, _named(request, rows, micro_size).row_of_stage)


def schedule_of(request: PipelineRequest, placement: Placement, micro: int, times: StageTimes) -> Schedule:
    """Returns the schedule for so many micro-batches.

    A batch with too few samples for what was asked for passes by all forwards, then all backwards: an order for any number.

    Args:
        request: what was asked for.
        placement: which row runs which stage.
        micro: the micro-batches that the batch has.
        times: the seconds of the stages, for a search.
    """
    asked = request.scheduler
    if isinstance(asked, Schedule):
        return asked if asked.micro_count == micro * asked.slices else forwards_first(placement, micro, asked.slices)
    if asked == SEARCHED:
        return search_schedule(times, micro, placement.row_of_stage)
    try:
        return _named(request, placement.rows, micro)
    except PipelineError:
        return forwards_first(placement, micro, request.slices)


def _named(request: PipelineRequest, rows: int, micro: int) -> Schedule:
    name = request.scheduler
    if request.interleave and name == "1f1b":
        name = "interleaved_1f1b"
    per_row = 2 if name in ("interleaved_1f1b", "zero_bubble_v") else 1
    if request.interleave and per_row == 1:
        raise PipelineError(
            f"pipeline(scheduler={name!r}, interleave=True): it has one stage on each part of the ranks; use "
            'scheduler="1f1b", "zero_bubble_v" or "searched"'
        )
    return make_schedule(name, rows, micro, per_row, request.slices)


def forwards_first(placement: Placement, micro: int, slices: int = 1) -> Schedule:
    """Makes the schedule in which each row runs all forwards of its stages, then all backwards.

    Args:
        placement: which row runs which stage.
        micro: number of micro-batches.
        slices: of each; backwards go through them in reverse.

    >>> print(forwards_first(Placement.of(2), 1))
    forwards first: 2 stages on 2 ranks, 1 micro-batch
    rank 0  0F0         0B0
    rank 1      1F0 1B0
    """
    rows = []
    for row in range(placement.rows):
        own = [stage for stage, at in enumerate(placement.row_of_stage) if at == row]
        forwards = [Action(stage, FORWARD, unit) for stage in own for unit in range(micro * slices)]
        back = [m * slices + slices - 1 - at for m in range(micro) for at in range(slices)]
        rows.append((*forwards, *(Action(stage, BACKWARD, unit) for stage in reversed(own) for unit in back)))
    return Schedule(FORWARDS_FIRST, tuple(rows), len(placement.row_of_stage), micro * slices, slices)


def without_loss(schedule: Schedule) -> Schedule:
    """Returns a schedule as it runs if gradients come from outside: all forwards, then all backwards, each in its order."""
    rows = tuple((*(a for a in row if a.kind == FORWARD), *(a for a in row if a.goes_back)) for row in schedule.rows)
    return replace(schedule, rows=rows)
