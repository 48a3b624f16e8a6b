"""Notices that a job is to end soon, so that it can be saved first: schedulers send SIGTERM, and some seconds later SIGKILL."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from shardwright.errors import WorldError
from shardwright.world.current import current_world

_before: dict[int, Any] = {}  # handlers that are called as well
_asked: list[int] = []  # signals that have come
_calls = [0]


def preempted(every: int = 1, signals: tuple[signal.Signals, ...] = (signal.SIGTERM,)) -> bool:
    """Tells whether any rank has been asked to end since the first call; every rank of a job makes this call.

    The answer is the same on all ranks, so that all save the same step. A second signal ends the process as it would have.

    Args:
        every: at which calls ranks ask each other, which costs them one small message; others answer ``False``.
        signals: that ask.

    Raises:
        WorldError: the first call is not made by the main thread, which alone may handle signals.

    >>> for step in range(3):
    ...     if preempted(every=10):
    ...         break  # sw.save(...)
    >>> step
    2
    """
    for number in signals:
        if number not in _before:
            _handle(number)
    _calls[0] += 1
    if _calls[0] % every:
        return False
    return any(asked for (asked,) in current_world().gather_numbers([len(_asked)]))


def _handle(number: signal.Signals) -> None:
    if threading.current_thread() is not threading.main_thread():
        raise WorldError("sw.preempted() is called first by another thread than the main one: call it once before, in that one")

    def note(came: int, frame: FrameType | None) -> None:
        before = _before[came]
        if _asked:
            signal.signal(came, before or signal.SIG_DFL)  # None: of C code, which Python cannot put back
            os.kill(os.getpid(), came)
            return
        _asked.append(came)
        if callable(before) and before is not signal.default_int_handler:
            before(came, frame)

    _before[number] = signal.signal(number, note)
