"""The published schedules by their names, one function each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from shardwright.errors import PipelineError
from shardwright.pipeline.schedules.actions import BACKWARD, FORWARD, INPUT, WEIGHT, Action
from shardwright.pipeline.schedules.schedule import Schedule

Row = list[Action]
# (rank, ranks, micro-batches, stages per rank) -> what the rank does; of slices, their number in place of that of stages
MakeRow = Callable[[int, int, int, int], Row]


class Named(NamedTuple):
    """A schedule that has a name: the row of a rank, and how many stages a rank may have."""

    make_row: MakeRow
    least_stages: int = 1
    most_stages: int | None = 1
    micro_per_rank: int = 1  # the least, for each rank
    is_sliced: bool = False  # whether micro-batches are cut into slices


_NAMED: dict[str, Named] = {}


def schedule_names() -> tuple[str, ...]:
    """Lists the names that :func:`make_schedule` knows.

    >>> schedule_names()
    ('gpipe', '1f1b', 'interleaved_1f1b', 'zero_bubble_h1', 'zero_bubble_v', 'seqpipe')
    """
    return tuple(_NAMED)


def sliced_names() -> tuple[str, ...]:
    """Lists the names of schedules that pass micro-batches in slices of their sequence."""
    return tuple(name for name, named in _NAMED.items() if named.is_sliced)


def make_schedule(name: str, ranks: int, micro_count: int, stages_per_rank: int | None = None, slices: int = 1) -> Schedule:
    """Makes a published schedule.

    Args:
        name: one of :func:`schedule_names`.
        ranks: how many ranks there are; a rank may be several devices.
        micro_count: how many micro-batches; as many as ranks at least, and twice as many for ``zero_bubble_v``. For ``seqpipe``
            as many slices of micro-batches as ranks are enough.
        stages_per_rank: 1 by default, and 2 for ``zero_bubble_v``. Stage s is on rank s modulo ranks, and with
            ``zero_bubble_v`` the second half of the stages goes back from the last rank to the first.
        slices: how many slices each micro-batch is cut into, for ``seqpipe``: 2 or more.

    Raises:
        PipelineError: there is no such schedule, or the numbers do not fit it.

    >>> print(make_schedule("1f1b", ranks=2, micro_count=3))
    1f1b: 2 stages on 2 ranks, 3 micro-batches
    rank 0  0F0 0F1     0B0 0F2 0B1     0B2
    rank 1      1F0 1B0 1F1 1B1 1F2 1B2
    """
    named = _NAMED.get(name)
    if named is None:
        raise PipelineError(f"there is no schedule {name!r}; use one of {', '.join(_NAMED)}")
    stages = named.least_stages if stages_per_rank is None else stages_per_rank
    if ranks < 1:
        raise PipelineError(f"schedule {name!r} on {ranks} ranks; give at least one")
    if stages < named.least_stages or (named.most_stages is not None and stages > named.most_stages):
        allowed = f"{named.least_stages}" + (" or more" if named.most_stages is None else "")
        raise PipelineError(f"schedule {name!r} with {stages} stages per rank; it takes stages_per_rank={allowed}")
    check_slices(name, named.is_sliced, slices)
    least = -(-named.micro_per_rank * ranks // slices)
    if micro_count < least:
        raise PipelineError(
            f"schedule {name!r} on {ranks} ranks needs at least {least} micro-batches and has {micro_count}; "
            f"use micro_size={least} or more, or at most {max(micro_count, 0) * slices // named.micro_per_rank} ranks"
        )
    count, last = micro_count * slices, slices if named.is_sliced else stages
    rows = tuple(tuple(named.make_row(rank, ranks, count, last)) for rank in range(ranks))
    return Schedule(name, rows, ranks * stages, count, slices)


def check_slices(name: str, is_sliced: bool, slices: int) -> None:
    """Checks that slices are given where a schedule has them, and there alone.

    Args:
        name: of the schedule.
        is_sliced: whether it has slices.
        slices: their number.

    Raises:
        PipelineError: they are missing, or given to another one.
    """
    if is_sliced and slices < 2:
        raise PipelineError(
            f"schedule {name!r} passes micro-batches in slices of their sequence and has slices={slices}; give slices=2 or "
            'more, or scheduler="1f1b"'
        )
    if not is_sliced and slices != 1:
        raise PipelineError(
            f"schedule {name!r} passes micro-batches whole and has slices={slices}; leave slices out, or give "
            'scheduler="seqpipe"'
        )


def _named(name: str, **limits: int | bool | None) -> Callable[[MakeRow], MakeRow]:
    def add(make_row: MakeRow) -> MakeRow:
        _NAMED[name] = Named(make_row, **limits)  # type: ignore[arg-type]
        return make_row

    return add


@_named("gpipe")
def _gpipe(rank: int, ranks: int, micro_count: int, stages: int) -> Row:
    """Runs all forwards, then all backwards. Every activation is held in between."""
    return [Action(rank, kind, micro) for kind in (FORWARD, BACKWARD) for micro in range(micro_count)]


@_named("1f1b")
def _one_forward_one_backward(rank: int, ranks: int, micro_count: int, stages: int) -> Row:
    """Runs as many forwards as the first gradient needs time to come, then one backward after each forward."""
    forwards = [Action(rank, FORWARD, micro) for micro in range(micro_count)]
    backwards = [Action(rank, BACKWARD, micro) for micro in range(micro_count)]
    return _alternating(forwards, backwards, ahead=ranks - 1 - rank)


@_named("interleaved_1f1b", most_stages=None)
def _interleaved(rank: int, ranks: int, micro_count: int, stages: int) -> Row:
    """Goes through its stages in turns, with a group of micro-batches each; the bubble shrinks by the number of stages.

    A group smaller than the number of ranks would wait for itself, so that what is left over is spread over the groups.
    """
    count = micro_count // ranks
    ends = [micro_count * (at + 1) // count for at in range(count)]
    groups = [range(start, end) for start, end in zip([0, *ends], ends)]
    forwards = [Action(rank + turn * ranks, FORWARD, m) for group in groups for turn in range(stages) for m in group]
    backwards = [
        Action(rank + turn * ranks, BACKWARD, m) for group in groups for turn in reversed(range(stages)) for m in group
    ]
    first = max(len(group) for group in groups) * (stages - 1)
    return _alternating(forwards, backwards, ahead=first + (2 if stages > 1 else 1) * (ranks - 1 - rank))


@_named("zero_bubble_h1")
def _zero_bubble_h1(rank: int, ranks: int, micro_count: int, stages: int) -> Row:
    """Is 1F1B with its backward split, W so much later that every rank holds what the first of 1F1B does."""
    row: Row = [Action(rank, FORWARD, micro) for micro in range(min(ranks - rank, micro_count))]
    for micro in range(micro_count):
        row.append(Action(rank, INPUT, micro))
        if micro >= rank:
            row.append(Action(rank, WEIGHT, micro - rank))
        if micro + ranks - rank < micro_count:
            row.append(Action(rank, FORWARD, micro + ranks - rank))
    return row + [Action(rank, WEIGHT, micro) for micro in range(max(micro_count - rank, 0), micro_count)]


@_named("zero_bubble_v", least_stages=2, most_stages=2, micro_per_rank=2)
def _zero_bubble_v(rank: int, ranks: int, micro_count: int, stages: int) -> Row:
    """Has stages that go down the ranks and up again: the last gradients start where the first stage is.

    Between warming up and cooling down each rank does F, I and W of its outer stage, then those of its inner one.
    """
    outer, inner = rank, 2 * ranks - 1 - rank
    following: Counter[tuple[int, str]] = Counter()
    row: Row = []

    def run(stage: int, kinds: str, times: int = 1) -> None:
        for kind in kinds * times:
            row.append(Action(stage, kind, following[stage, kind]))
            following[stage, kind] += 1

    run(outer, FORWARD, 2 * (ranks - rank) - 1)
    for _ in range(rank):
        run(inner, FORWARD)
        run(outer, FORWARD)
    run(inner, FORWARD + INPUT + WEIGHT, ranks - rank)
    while following[inner, FORWARD] < micro_count:
        run(outer, (FORWARD if following[outer, FORWARD] < micro_count else "") + INPUT + WEIGHT)
        run(inner, FORWARD + INPUT + WEIGHT)
    for _ in range(rank):
        run(outer, INPUT)
        run(inner, INPUT)
    run(outer, INPUT + WEIGHT, ranks - rank)
    for stage in (inner, outer):
        run(stage, WEIGHT, micro_count - following[stage, WEIGHT])
    return row


@_named("seqpipe", is_sliced=True)
def _seqpipe(rank: int, ranks: int, micro_count: int, slices: int) -> Row:
    """Is 1F1B of slices of the sequence: forward slice by slice, backward through those of a micro-batch in reverse.

    The first gradient comes from the last slice of a micro-batch, so that all ranks are further ahead by the others.
    """
    forwards = [Action(rank, FORWARD, unit) for unit in range(micro_count)]
    units = [first + slices - 1 - at for first in range(0, micro_count, slices) for at in range(slices)]
    return _alternating(forwards, [Action(rank, BACKWARD, unit) for unit in units], ahead=ranks - 1 - rank + slices - 1)


def _alternating(forwards: Row, backwards: Row, ahead: int) -> Row:
    """Puts a backward after each forward once ``ahead`` forwards have gone before; then the rest of the backwards."""
    row = forwards[:ahead]
    for forward, backward in zip(forwards[ahead:], backwards):
        row += [forward, backward]
    return row + backwards[max(len(forwards) - ahead, 0) :]
