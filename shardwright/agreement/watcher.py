"""A thread that answers for its rank in the job's store while the program stands still."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
from typing import Any

import torch.distributed as dist

from shardwright.agreement.events import EventLog
from shardwright.agreement.messages import Messages
from shardwright.base.torch_private import cloned_store

_LOOK = 0.2  # seconds between two looks at the store
_STILL = 3.0  # seconds without an event after which a rank shows its latest events
_GRACE = 5.0  # seconds that a program which waits in vain has to come out of it by itself
_SHOWN = 48  # events


class Watcher:
    """Thread that looks into the store while the program stands still."""

    def __init__(self, log: EventLog, messages: Messages):
        self.log, self.messages = log, messages
        self.has_printed = False  # the verdict
        self._store = dist.PrefixStore("shardwright", cloned_store())
        self._end = threading.Event()
        self._seen, self._since, self._ticks = -1, time.monotonic(), 0
        self._asks = 0
        self._open: list[int] = []  # events that were asked about and that this rank has not come to
        self._answered: list[int] = []  # those without a verdict yet
        self._shown = -1
        self._verdict_since = 0.0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="shardwright-watcher", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread."""
        self._end.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=2)

    def look_once(self) -> None:
        """Reads questions and verdicts once, from the calling thread."""
        with self._lock:
            self._read_asks()
            self._read_verdicts()

    def _run(self) -> None:
        failures = 0
        while not self._end.wait(_LOOK):
            try:
                with self._lock:
                    self._look()
                failures = 0
            except Exception:  # the store has gone, as a rule, and the job with it
                failures += 1
                logging.getLogger("shardwright").debug("the watch failed", exc_info=True)
                if failures > 3:
                    return

    def _look(self) -> None:
        log, now = self.log, time.monotonic()
        self._ticks += 1
        while self.messages.deletable:
            self._store.delete_key(self.messages.deletable.popleft())
        if log.count != self._seen:
            self._seen, self._since = log.count, now
            if self._ticks % 5:
                return
        if not log.verdict and not self._is_inside():
            return  # the user's own code; other ranks and the store may be gone
        self._read_asks()
        self._read_verdicts()
        if now - self._since > _STILL and self._ticks % 5 == 0 and not log.verdict and log.count:
            self._show()
        if log.verdict:
            self._end_in_vain(now)

    def _read_asks(self) -> None:
        asked = self._store.add("asks", 0)
        while self._asks < asked:
            key = f"ask/{self._asks + 1}"
            if not self._store.check([key]):
                break
            self._asks += 1
            self._open.append(int(self._store.get(key)))
        for index in list(self._open):
            if index >= self.log.count:
                continue
            message = self._answer(index)
            if message is None:
                continue
            self._open.remove(index)
            if message:
                self._answered.append(index)
                self.messages.write(self._store, str(index), message)

    def _answer(self, index: int) -> dict[str, Any] | None:
        """Returns this rank's message at an event: empty where the program writes it, ``None`` where it is unknown yet."""
        log = self.log
        events = list(log.events)
        if not events or index < events[0].index:
            return {"event": "", "past": True, "facts": {}, "new": None, "chain": 0, "values": None}
        event = events[index - events[0].index]
        if event.net is not None and event.sign is None:
            return {} if event.asked else None if event is log.current_call else log.message(event, None, None)
        return log.message(event, event.sign, False)

    def _read_verdicts(self) -> None:
        for index in list(self._answered):
            found = self._store.add(f"v/{index}", 0)
            if found:
                self._answered.remove(index)
            if found > 1:
                self._accept(self._store.get(f"w/{index}").decode())
        if not self.log.verdict and self._ticks % 5 == 0 and self._store.check(["end"]):
            self._accept(self._store.get("end").decode())

    def _show(self) -> None:
        """Writes this rank's latest events into the store, and compares them with rank 0's."""
        log = self.log
        if self._shown != log.count:
            self._shown = log.count
            latest = [[e.index, str(e), e.sign.number if e.sign else 0] for e in list(log.events)[-_SHOWN:]]
            self._store.set(f"at/{log.rank}", json.dumps(latest))
        if log.rank == 0 or not self._store.check(["at/0"]):
            return
        rank0 = {index: rest for index, *rest in json.loads(self._store.get("at/0"))}
        for event in list(log.events)[-_SHOWN:]:
            its = rank0.get(event.index)
            number = event.sign.number if event.sign else 0
            if its is None or (its[0] == str(event) and (not its[1] or not number or its[1] == number)):
                continue
            said = "in another way" if its[0] == str(event) else f"in {its[0]}"
            self._store.compare_set(
                "end", "",
                f"the ranks wait for each other in vain: rank {log.rank} is in {event} where rank 0 is {said}; make the same "
                "calls, and as many backward passes, on every rank",
            )  # fmt: skip
            return

    def _accept(self, verdict: str) -> None:
        """Records a verdict that ends the job. Prints it if the program waits for other ranks."""
        self.log.verdict = verdict
        self._verdict_since = time.monotonic()
        if self._is_waiting():
            self.has_printed = True
            print(f"shardwright: rank {self.log.rank}: {verdict}", file=sys.stderr, flush=True)

    def _is_waiting(self) -> bool:
        """Tells whether the program is in a collective, or in a backward pass with collectives."""
        return not self.log.is_asking and self._is_inside()

    def _is_inside(self) -> bool:
        """Tells whether the program is in a function, ours or torch's, that waits for ranks."""
        frame: Any = sys._current_frames().get(self.log.program_thread)
        while frame is not None and frame.f_code.co_filename == threading.__file__:
            frame = frame.f_back  # waits for a thread that waits for the others
        return frame is not None and any(part in frame.f_code.co_filename for part in _INSIDE)

    def _end_in_vain(self, now: float) -> None:
        """Ends the process if the program still waits for what will not come."""
        if now - self._verdict_since > _GRACE and now - self._since > _GRACE and self._is_waiting():
            print(f"shardwright: rank {self.log.rank} ends: {self.log.verdict}", file=sys.stderr, flush=True)
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os._exit(1)


# Parts of the names of files whose functions wait for other ranks.
_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_INSIDE = (_PACKAGE, "<shardwright", os.path.join("torch", "distributed"), os.path.join("torch", "autograd"))
