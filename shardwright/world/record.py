"""Recording of collectives: kind, axes, groups, bytes and cause of every one that runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from shardwright.redistribute.steps import Redistribution
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
        cause: name of the operator that needs it, ``edge`` the edge it stands on.
        phase: ``forward``, ``backward``, or ``recompute``: forward once more, for the backward.
        launch: number of the collective within the log: tensors that share one have the same.
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


@dataclass
class CommunicationLog:
    """What :func:`record_communication` yields: one event a tensor, in the order in which collectives start."""

    events: list[CommunicationEvent] = field(default_factory=list)

    def count(self, kind: str | None = None) -> int:
        """Number of collectives, of one kind or of all; one that several tensors share counts once."""
        return len({e.launch for e in self.events if kind is None or e.kind == kind})

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


@dataclass(frozen=True)
class Moved:
    """What the record needs to know of a move: its steps there and back, and why it is."""

    redistribution: Redistribution
    cause: str
    edge: str


def emit(moves: Sequence[Moved], dtype: torch.dtype, phase: str) -> None:
    """Tells every active log of the collectives of moves that share them; nothing to do where none is active."""
    for log in _active:
        first = log.events[-1].launch + 1 if log.events else 0
        for moved in moves:
            plan, launch = moved.redistribution, first
            for step in plan.backward if phase == "backward" else plan.forward:
                if step.kind == "slice":
                    continue
                groups = tuple(tuple(g) for g in groups_that_communicate(step, plan.shape))
                sent = sent_elements(step, plan.shape) * dtype.itemsize
                log.events.append(
                    CommunicationEvent(
                        step.kind, step.axes, groups, sent, plan.shape, dtype, moved.cause, moved.edge, phase, launch
                    )
                )
                launch += 1
