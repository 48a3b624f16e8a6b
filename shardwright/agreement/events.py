"""Events of one rank: the calls of nets and backward passes that all ranks make alike."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

from shardwright.agreement.signature import Signature

_REMEMBERED = 4096  # events
_MASK = (1 << 61) - 1


class Net:
    """A net as the ranks know it: its number in the order of first calls, its kind, and the signature it ran last."""

    def __init__(self, log: EventLog, number: int, kind: str):
        self.log, self.name = log, f"{number} ({kind})"
        self.calls = self.changes = 0
        self.latest: Signature | None = None


class Event:
    """One thing that a rank does and that the other ranks have to do too."""

    __slots__ = ("asked", "chain", "index", "net", "number", "sign", "text")

    def __init__(self, index: int, chain: int, net: Net | None, number: int, text: str = ""):
        self.index, self.chain, self.net, self.number, self.text = index, chain, net, number, text
        self.sign: Signature | None = None  # of a call that runs a known program without asking the other ranks
        self.asked = False

    def __str__(self) -> str:
        return self.text or f"call {self.number} of net {self.net.name if self.net else ''}"


class EventLog:
    """Events of this rank, and the verdict on them. The program writes it; the watcher thread reads it."""

    def __init__(self, rank: int):
        self.rank = rank
        self.events: deque[Event] = deque(maxlen=_REMEMBERED)
        self.count = 0
        self.current_call: Event | None = None
        self.verdict = ""  # why this rank cannot go on; found by the watcher
        self.weights_every: int | None = None  # calls, after which all weights are compared
        self.is_asking = False  # whether the program waits for a verdict
        self.program_thread = threading.get_ident()
        self._chain = 0

    def add(self, net: Net | None, number: int, text: str = "") -> Event:
        """Appends an event, which :meth:`settle` completes."""
        event = Event(self.count, self._chain, net, number, text)
        self.events.append(event)
        self.count += 1
        return event

    def settle(self, event: Event, number: int) -> None:
        """Records what an event was, as a number; the chain hash of later events depends on it."""
        self._chain = (event.chain * 0x5851F42D4C957F2D + number + 1) & _MASK

    def withdraw(self, event: Event) -> None:
        """Takes an event out of the chain hash: ranks that are refused alike go on alike."""
        self._chain = event.chain

    def message(self, event: Event, sign: Signature | None, is_new: bool | None) -> dict[str, Any]:
        """Builds the message that tells the other ranks what this rank does at an event.

        Args:
            event: the event.
            sign: the signature of the call, if it is known.
            is_new: whether the call has to be planned; ``None`` where that is not known.
        """
        return {
            "event": str(event),
            "facts": {} if sign is None else dict(sign.facts),
            "number": 0 if sign is None else sign.number,
            "new": is_new,
            "chain": event.chain,
            "every": self.weights_every,
            "before": [str(e) for e in self._before(event, 4)],
            "values": None,
        }

    def _before(self, event: Event, many: int) -> list[Event]:
        back = self.count - event.index
        return [e for e in list(self.events)[-(many + back) :] if e.index < event.index][-many:]
