"""Records kind, axes, groups, bytes and cause of every collective that runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from shardwright.ir.instructions import Wire
from shardwright.ir.redistribution import Redistribution
from shardwright.redistribute.volume import groups_that_communicate, sent_elements


@dataclass(frozen=True)
class CommunicationEvent:
    """One collective.

    Args:
        kind: ``all_reduce``, ``all_gather``, ``reduce_scatter``, ``all_to_all``, ``permute`` or ``exchange``.
        axes: mesh axes it runs over.
        groups: the groups of ranks that communicate with each other.
        bytes: bytes that the busiest rank sends, by the bandwidth-optimal algorithm of the collective.
        shape: global shape of the tensor; ``dtype`` its dtype.
        cause: name of the operator that needs it, ``edge`` the edge it belongs to.
        phase: ``forward``, ``backward``, or ``recompute``: the forward repeated for the backward.
        launch: number of the collective within the log: tensors that share one have the same.
        started, ended: positions in the log's ``timeline`` of its start and its wait; one after the other unless it travelled
            while its ranks computed.
    """

    kind: str
    axes: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    cause: str
    edge: str
    phase: str
    launch: int = 0
    started: int = 0
    ended: int = 0


@dataclass(frozen=True)
class Moment:
    """Something that happened at one position of a log's timeline.

    Args:
        kind: ``start`` or ``end`` of a collective, or a ``call`` of an operator; calls are recorded for programs whose
            operators
            run in copies, as they can lie between a start and its end there.
        phase: ``forward`` or ``backward``.
        what: the edge of the collective, or the node that the call comes from.
        copy: the copy that it belongs to, from 0; ``None`` if it belongs to none.
    """

    kind: str
    phase: str
    what: str
    copy: int | None = None


@dataclass
class CommunicationLog:
    """Result of :func:`record_communication`: one event per tensor, in the order in which collectives start."""

    events: list[CommunicationEvent] = field(default_factory=list)
    timeline: list[Moment] = field(default_factory=list)

    def meanwhile(self, event: CommunicationEvent) -> list[Moment]:
        """Returns what happened between the start of a collective and its end."""
        return self.timeline[event.started + 1 : event.ended]

    def count(self, kind: str | None = None) -> int:
        """Counts the collectives of one kind or of all; one that several tensors share counts once."""
        return len({e.launch for e in self.events if kind is None or e.kind == kind})

    def bytes(self, kind: str | None = None) -> int:
        """Sums the bytes that the busiest rank sends, over collectives of one kind or all."""
        return sum(e.bytes for e in self.events if kind is None or e.kind == kind)

    def __str__(self) -> str:
        return "\n".join(
            f"{e.phase:8} {e.kind:14} over {','.join(e.axes) or 'all ranks':10} {e.bytes:>10} B  {e.edge}" for e in self.events
        )


_active: list[CommunicationLog] = []


@contextmanager
def record_communication() -> Iterator[CommunicationLog]:
    """Records every collective that runs within the block, forward and backward.

    >>> with record_communication() as log:
    ...     pass
    >>> log.count("all_reduce"), log.bytes()
    (0, 0)
    """
    log = CommunicationLog()
    _active.append(log)
    try:
        yield log
    finally:
        _active.remove(log)


@dataclass(frozen=True)
class Moved:
    """Description of a move for the log: its steps forward and backward, its cause, and dtypes that are not the value's."""

    redistribution: Redistribution
    cause: str
    edge: str
    copy: int | None = None
    wire: Wire | None = None


# Where an event that is under way stands: a log, and its number there.
UnderWay = tuple[CommunicationLog, int]


def emit(moves: Sequence[Moved], dtype: torch.dtype, phase: str, ends_later: bool = False) -> list[UnderWay]:
    """Adds the collectives of moves that share them to every active log; does nothing where none is active.

    Args:
        moves: the moves.
        dtype: of the value.
        phase: ``forward``, ``backward`` or ``recompute``.
        ends_later: whether the collectives have only been started; pass the result to :func:`ended` when they are done.
    """
    under_way: list[UnderWay] = []
    for log in _active:
        first = log.events[-1].launch + 1 if log.events else 0
        for moved in moves:
            plan, launch = moved.redistribution, first
            if moved.wire is not None:
                dtype = moved.wire.of(phase, dtype)[0]
            for step in plan.backward if phase == "backward" else plan.forward:
                if not step.communicates:
                    continue
                groups = tuple(tuple(g) for g in groups_that_communicate(step, plan.shape))
                sent = sent_elements(step, plan.shape) * dtype.itemsize
                at = len(log.timeline)
                log.timeline.append(Moment("start", phase, moved.edge, moved.copy))
                if not ends_later:
                    log.timeline.append(Moment("end", phase, moved.edge, moved.copy))
                under_way.append((log, len(log.events)))
                log.events.append(
                    CommunicationEvent(
                        step.kind, step.axes, groups, sent, plan.shape, dtype, moved.cause, moved.edge, phase, launch,
                        at, at + 1,
                    )
                )  # fmt: skip
                launch += 1
    return under_way if ends_later else []


def ended(under_way: list[UnderWay]) -> None:
    """Records in the logs that started collectives are done."""
    for log, number in under_way:
        event = log.events[number]
        log.events[number] = replace(event, ended=len(log.timeline))
        log.timeline.append(replace(log.timeline[event.started], kind="end"))
    under_way.clear()


class CallNote:
    """Record of a call in the active logs, and of its backward when that begins."""

    def __init__(self, cause: str, copy: int | None):
        self.forward, self.backward = Moment("call", "forward", cause, copy), Moment("call", "backward", cause, copy)

    def __call__(self, result: Any) -> None:
        for log in _active:
            log.timeline.append(self.forward)
        node = getattr(result[0] if isinstance(result, (list, tuple)) else result, "grad_fn", None)
        if node is not None:
            node.register_prehook(self._begins_backward)

    def _begins_backward(self, gradients: Any) -> None:
        for log in _active:
            log.timeline.append(self.backward)
