"""One watch per job: finds the watch of a world, and passes on to it what other folders report."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch.distributed as dist

from shardwright.agreement.watch import Watch
from shardwright.base.torch_private import job_timeout

_watches: weakref.WeakKeyDictionary[Any, Watch] = weakref.WeakKeyDictionary()
_active: list[Watch] = []


def note(text: str) -> None:
    """Records something other than a call of a net that all ranks have to do."""
    if _active:
        _active[0].note(text)


def in_backward() -> None:
    """Records that a backward pass communicates."""
    if _active:
        _active[0].in_backward()


@contextmanager
def within_pipeline() -> Iterator[None]:
    """Leaves backward passes within the block unrecorded: the stages of a pipeline have different ones."""
    watch = _active[0] if _active else None
    if watch is not None:
        watch.is_in_pipeline = True
    try:
        yield
    finally:
        if watch is not None:
            watch.is_in_pipeline = False


def compare_on_ranks(world: Any, stage: str, lines: Sequence[str], values: Sequence[Any] = ()) -> None:
    """Refuses, on all ranks, what differs between them; see :meth:`Watch.compare`. Does nothing on a single process.

    Args:
        world: the world whose ranks compare.
        stage: what is compared, ``"graph"`` or ``"program"``.
        lines: its text.
        values: the summaries of the tensors that it holds.

    Raises:
        WorldError: the ranks hold different texts or values.
    """
    watch = watch_of(world)
    if watch is not None:
        watch.compare(stage, lines, values)


def explain(world: Any, error: BaseException | None = None) -> str:
    """Explains, if it is known, why another rank has left this one alone; else returns ``""``."""
    watch = watch_of(world)
    return "" if watch is None else watch.explain(error)


def why_alone(error: BaseException | None = None) -> str:
    """Explains, like :func:`explain`, for code that has no world at hand."""
    return _active[0].explain(error) if _active else ""


def who_left(ranks: Iterable[int]) -> str:
    """Says why waiting for these ranks is in vain, if that is known; else returns ``""``."""
    with contextlib.suppress(Exception):  # the store has gone
        return _active[0].who_left(ranks) if _active else ""
    return ""


def last_event() -> str:
    """Names the event that this rank is in."""
    return str(_active[0].last_event) if _active else "a collective"


def watch_of(world: Any) -> Watch | None:
    """Returns the watch of a world's job; ``None`` for simulated worlds and jobs of one rank."""
    if world.processes == 1:
        return None
    found: Watch | None = world.watch
    if found is None:
        found = world.watch = _watches.get(dist.group.WORLD)
        if found is None:
            found = world.watch = _watches[dist.group.WORLD] = Watch(world.rank, world.size, _patience(world))
            _active[:] = [found]
            _explain_failures()
        found.check_weights(world.check_weights)
    return found


def _patience(world: Any) -> float:
    """Returns the seconds that a rank waits for the others: the job's timeout, or torch's half hour."""
    timeout = job_timeout(world.device.type)
    return 1800.0 if timeout is None else timeout.total_seconds()


_MIXED = (
    "the parameters of a model are distributed at the first call of its AutoParallel, and an operator of another library got "
    "one of them: give it sw.full_value(parameter), on every rank, or run it within net.whole()"
)


@lru_cache(maxsize=1)
def _explain_failures() -> None:
    """Makes uncaught failures of communication print what other ranks did, if that is known."""
    plain = sys.excepthook

    def hook(kind: Any, error: Any, trace: Any) -> None:
        plain(kind, error, trace)
        if isinstance(error, RuntimeError) and _active:
            watch = _active[0]
            said = _MIXED if "got mixed torch.Tensor and DTensor" in str(error) else watch.explain(error)
            if said and not (watch.has_printed_verdict):
                print(f"shardwright: rank {watch.rank}: {said}", file=sys.stderr, flush=True)

    sys.excepthook = hook
