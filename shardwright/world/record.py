"""Recording of collectives: kind, axes, groups, bytes and cause of every one that runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from shardwright.redistribute.step import Step
from shardwright.redistribute.volume import sent_elements


@dataclass(frozen=True)
class CommunicationEvent:
    """One collective.

    Args:
        kind: ``all_reduce``, ``all_gather``, ``reduce_scatter``, ``all_to_all`` or ``exchange``.
        axes: mesh axes it runs over.
        groups: the groups of ranks that communicate with each other.
        bytes: bytes that the busiest rank sends, by the bandwidth-optimal algorithm of the collective.
        shape: global shape of the tensor; ``dtype`` its dtype.
        cause: name of the operator that needs it, ``edge`` the edge it stands on.
        phase: ``forward`` or ``backward``.
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


@dataclass
class CommunicationLog:
    """What :func:`record_communication` yields."""

    events: list[CommunicationEvent] = field(default_factory=list)

    def count(self, kind: str | None = None) -> int:
        """Number of collectives, of one kind or of all."""
        return sum(kind is None or e.kind == kind for e in self.events)

    def bytes(self, kind: str | None = None) -> int:
        """Bytes that the busiest rank sends, over the collectives of one kind or of all."""
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


def emit(steps: Sequence[Step], shape: tuple[int, ...], dtype: torch.dtype, cause: str, edge: str, phase: str) -> None:
    """Tells every active log of the collectives among ``steps``; nothing to do where none is active."""
    if not _active:
        return
    for step in steps:
        if step.kind == "slice":
            continue
        groups = tuple(tuple(g) for g in step.groups)
        sent = sent_elements(step, shape) * dtype.itemsize
        event = CommunicationEvent(step.kind, step.axes, groups, sent, shape, dtype, cause, edge, phase)
        for log in _active:
            log.events.append(event)
