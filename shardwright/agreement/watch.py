"""Compares what ranks do, so that those that do different things raise errors instead of hanging.

Collectives of different programs wait for each other for ever, end the process, or mix up numbers. So every rank keeps a
list of its *events* (calls of nets, and backward passes), and ranks compare events through the job's store. For that no
other rank has to be at the same place in its script:

- A rank *asks* at a call with a new signature, at every 64th call, and where a net changes from one signature to another:
  it writes what it is about to do and waits for what the others do at the same event. As a rule they ask there too.
- A rank that does not ask there, as it runs a program it knows, has a *watcher*: a thread that looks into the store while
  the program stands still, and answers. So the rank that asks learns of the difference and raises an error.
- A rank that stands still for some seconds writes its latest events into the store. Where the events of two ranks differ,
  they wait for each other in vain; the job ends and says so.

Invariants:

- The rank that writes the last message of an event judges all of them, so that all ranks read the same verdict.
- No verdict depends on time. A rank that is slow, or computes for an hour, is waited for.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwright.agreement.events import Event, EventLog, Net
from shardwright.agreement.messages import Messages
from shardwright.agreement.processes import Processes
from shardwright.agreement.signature import Signature, number_of, value_summaries
from shardwright.agreement.verdict import _STAGES, _first_difference
from shardwright.agreement.watcher import Watcher
from shardwright.base.torch_private import cloned_store, current_graph_task
from shardwright.errors import WorldError

EVERY = 64  # calls between comparisons of known programs
_PARTS = 8  # of the weights, of which one is compared at a time
_TIMED_OUT = re.compile("[Tt]imed out|timeout")
_CHANGES = 16  # changes of signature that are compared each; from then on one of as many


Summarize = Callable[[bool], list[Any]]  # of the inputs' values: returns checksums, or sketches if ``True``


class Watch:
    """Compares the events of this rank with those of the other ranks; one per process.

    Args:
        rank: this process's rank.
        size: the number of ranks.
        patience: seconds to wait for other ranks at an event.
    """

    def __init__(self, rank: int, size: int, patience: float):
        self.rank, self.size, self.patience = rank, size, patience
        self.calls = self.nets = 0
        self._checked = 0  # the latest call at which all weights were compared
        self._is_planning = False
        self.is_in_pipeline = False  # whose stages have backward passes of their own
        self._backward = -1
        self._log = EventLog(rank)
        self._messages = Messages(rank, size)
        self._store = dist.PrefixStore("shardwright", cloned_store())
        self._processes = Processes(rank, size, self._store)
        self._watcher = Watcher(self._log, self._messages)

    def check_weights(self, every: int | None) -> None:
        """Sets after how many calls all weights that ranks hold whole are compared; ``None``: a part of them at times."""
        self._log.weights_every = every

    @property
    def has_printed_verdict(self) -> bool:
        """Tells whether the watcher thread has printed why this rank cannot go on."""
        return bool(self._log.verdict) and self._watcher.has_printed

    # -- events of the program ------------------------------------------------------------------------------------

    def begin_call(self, owner: Any) -> Event:
        """Begins the event of a net's call, which :meth:`known_call` or :meth:`new_call` completes.

        Args:
            owner: the ``AutoParallel`` that is called.

        Raises:
            WorldError: the watcher has found that this rank cannot go on.
        """
        log = self._log
        if log.verdict:
            raise WorldError(log.verdict)
        net: Net | None = owner.__dict__.get("_net")
        if net is None or net.log is not log:
            net = owner.__dict__["_net"] = Net(log, self.nets, _kind_of(owner.target))
            self.nets += 1
        net.calls += 1
        self.calls += 1
        log.current_call = event = log.add(net, net.calls)
        return event

    def name_of(self, owner: Any) -> str:
        """Returns the number and kind of a net that was called."""
        net: Net = owner.__dict__["_net"]
        return net.name

    def note(self, text: str) -> None:
        """Records something other than a call of a net that all ranks have to do."""
        self._log.settle(self._log.add(None, 0, text), len(text))

    def in_backward(self) -> None:
        """Records that a backward pass communicates; the first time of each pass is an event."""
        task = current_graph_task()
        if task != self._backward and not self.is_in_pipeline:
            self._backward = task
            self.note("a backward pass")

    def known_call(self, bound: Any, summarize: Summarize | None) -> None:
        """Records that the current call runs a program bound earlier; compares it with other ranks when due.

        Args:
            bound: the bound program, with its signatures by gradient mode.
            summarize: summarizes the values of the call's inputs, where all ranks should have the same.

        Raises:
            WorldError: other ranks make another call, or have other inputs or weights.
        """
        event, enabled = self._log.current_call, torch.is_grad_enabled()
        assert event is not None
        assert event.net is not None
        net, sign = event.net, bound.signatures.get(enabled)
        if sign is None:
            sign = bound.signatures[enabled] = next(iter(bound.signatures.values())).with_gradients(enabled)
            is_due = True
        elif sign is not net.latest:
            net.changes += 1
            is_due = net.changes <= _CHANGES or net.changes % _CHANGES == 0
        else:
            is_due = False
        net.latest = sign
        self._log.settle(event, sign.number)
        every = self._log.weights_every
        checks_all = every is not None and self.calls - self._checked >= every
        event.asked = is_due or checks_all or self.calls % EVERY == 0
        if event.asked:
            self._ask(event, sign, False, summarize)
            if checks_all:
                self._checked = self.calls
                self._compare_weights(event, bound.weights(1, 0))
            elif self.calls % EVERY == 0:
                self._compare_weights(event, bound.weights(_PARTS, self.calls // EVERY % _PARTS))
        else:
            event.sign = sign

    @contextlib.contextmanager
    def new_call(self, sign: Signature, summarize: Summarize | None) -> Iterator[None]:
        """Surrounds the planning of the current call: all ranks plan it, with the same signature.

        A rank that fails within tells those that wait for it in :meth:`compare`.

        Args:
            sign: the signature of the call.
            summarize: summarizes the values of the call's inputs, where all ranks should have the same.

        Raises:
            WorldError: other ranks make another call, or have other inputs.
        """
        event = self._log.current_call
        assert event is not None
        assert event.net is not None
        event.net.latest, event.asked, self._is_planning = sign, True, True
        self._log.settle(event, sign.number)
        self._ask(event, sign, True, summarize)
        try:
            yield
        except BaseException as error:
            self._log.withdraw(event)
            said = f"rank {self.rank} cannot go on with {event}: {type(error).__name__}: {str(error)[:300]}"
            with contextlib.suppress(Exception):
                for stage in _STAGES:
                    self._messages.publish(self._store, f"{event.index}{stage}", said)
            raise
        else:
            self._processes.learn()
        finally:
            self._is_planning = False

    def compare(self, stage: str, lines: Sequence[str], values: Sequence[Any] = ()) -> None:
        """Refuses, on all ranks, what differs between them; does nothing outside :meth:`new_call`.

        Args:
            stage: what is compared, ``"graph"`` or ``"program"``.
            lines: its text.
            values: the :func:`value_summaries` of the tensors that it holds.

        Raises:
            WorldError: the ranks hold different texts or values.
        """
        event = self._log.current_call
        if not self._is_planning:
            return
        assert event is not None
        at = f"/{stage}"
        message = {"number": number_of(lines), "sketches": values, "stage": stage, "event": str(event)}
        verdict = self._verdict_on(event, at, message)
        if not verdict.startswith("="):
            raise WorldError(verdict)
        if verdict == "=":
            return
        other = int(verdict[1:])  # the texts differ: rank 0 and the first that has another show theirs
        if self.rank in (0, other):
            self._store.set(f"t/{event.index}{at}/{self.rank}", json.dumps(list(lines)))
        keys = {rank: f"t/{event.index}{at}/{rank}" for rank in (0, other)}
        self._until(lambda: bool(self._store.check(list(keys.values()))), event, keys)
        here, there = (json.loads(text) for text in self._store.multi_get(list(keys.values())))
        raise WorldError(f"{event}: {_first_difference(stage, here, there, other)}")

    # -- asking ---------------------------------------------------------------------------------------------------

    def _ask(self, event: Event, sign: Signature, is_new: bool, summarize: Summarize | None) -> None:
        message = self._log.message(event, sign, is_new)
        if summarize is not None:
            message["values"] = summarize(False)
        verdict = self._verdict_on(event, "", message)
        if verdict.startswith("~"):  # bits of inputs differ: it may be that rounding set them apart
            assert summarize is not None
            verdict = self._verdict_on(event, "/values", {"event": str(event), "sketches": summarize(True)})
        if verdict != "=":
            self._log.withdraw(event)
            raise WorldError(verdict)

    def _compare_weights(self, event: Event, weights: Mapping[str, Tensor]) -> None:
        """Refuses, on all ranks, weights that differ between ranks and should not."""
        sketches = value_summaries(weights.values(), True)
        names = list(weights)
        verdict = self._verdict_on(event, "/weights", {"event": str(event), "sketches": sketches, "names": names})
        if verdict != "=":
            raise WorldError(verdict)

    def _verdict_on(self, event: Event, stage: str, message: dict[str, Any]) -> str:
        """Writes this rank's message and waits for the verdict."""
        at = f"{event.index}{stage}"
        self._log.is_asking = True
        try:
            self._messages.write(self._store, at, message)
            keys = {rank: f"m/{at}/{rank}" for rank in range(self.size)}
            self._until(lambda: self._store.add(f"v/{at}", 0) > 0, event, keys, not stage)
            return "=" if self._store.add(f"v/{at}", 0) == 1 else str(self._store.get(f"w/{at}").decode())
        finally:
            self._log.is_asking = False

    def _until(self, is_there: Callable[[], bool], event: Event, keys: Mapping[int, str], asks: bool = False) -> None:
        """Waits until ``is_there``, and raises an error where that is in vain.

        With ``asks``, the watchers of the other ranks are asked to answer after a short time.
        """
        began, pause, looked = time.monotonic(), 5e-5, 0.0
        while not is_there():
            if self._log.verdict:
                raise WorldError(self._log.verdict)
            time.sleep(pause)
            pause = min(pause * 1.5, 0.005)
            waited = time.monotonic() - began
            if asks and waited > 0.05:
                asks = False
                if self._store.add(f"a/{event.index}", 1) == 1:
                    self._store.set(f"ask/{self._store.add('asks', 1)}", str(event.index))
            if waited - looked > 0.5:
                looked = waited
                missing = [rank for rank, key in keys.items() if not self._store.check([key])]
                gone = [rank for rank in missing if self._store.check([f"gone/{rank}"])]
                if gone and not is_there():
                    said = self._store.get(f"gone/{gone[0]}").decode()
                    raise WorldError(f"rank {self.rank} comes to {event}, but {said}: make the same calls on every rank")
                if waited > self.patience:
                    named = ", ".join(map(str, missing[:8])) or "0"
                    raise WorldError(
                        f"rank {self.rank} has waited {waited:.0f} s at {event} for rank {named}, "
                        "which has not come there: make the same calls on every rank; for more patience, sw.init(timeout=...)"
                    )

    # -- the end --------------------------------------------------------------------------------------------------

    def explain(self, error: BaseException | None = None) -> str:
        """Explains, if it is known, why another rank has left this one alone.

        Args:
            error: with which communication has failed.
        """
        with contextlib.suppress(Exception):
            self._watcher.look_once()
            if said := self.who_left(range(self.size)):
                return said
        ended = None if self._log.verdict else self._processes.ended()
        if ended is None:
            is_late = error is not None and _TIMED_OUT.search(str(error))
            return self._log.verdict or (self.missing() if is_late else "")
        return (
            f"rank {self.rank} is in {self.last_event}, but rank {ended}'s process has ended: its own output says why; where "
            "it says nothing, something has killed it, such as the system for memory"
        )

    def missing(self) -> str:
        """Says which ranks have not come where this one waits, after it has waited as long as communication may take."""
        if not self._log.events:
            return ""
        event, others = self._log.events[-1], [rank for rank in range(self.size) if rank != self.rank]
        shown = {rank: f"at/{rank}" for rank in others}
        with contextlib.suppress(Exception):
            there = [rank for rank, key in shown.items() if self._store.check([key])]
            latest = {rank: json.loads(self._store.get(shown[rank]))[-1][0] for rank in there}
            away = [rank for rank in others if latest.get(rank) != event.index]
            named = ", ".join(map(str, away[:8]))
            if away:
                return (
                    f"rank {self.rank} has waited in {event} for rank {named}, which has not come there: it hangs, is "
                    "stopped, or takes longer in its own code than communication may take; for more time, sw.init(timeout=...)"
                )
        return ""

    @property
    def last_event(self) -> Event | str:
        """Returns the event that this rank is in."""
        return self._log.events[-1] if self._log.events else "its first call"

    def who_left(self, ranks: Iterable[int]) -> str:
        """Says why waiting for these ranks is in vain, if that is known: one's script has ended, or the watch found so."""
        if self._log.verdict:
            return self._log.verdict
        for rank in ranks:
            if rank != self.rank and self._store.check([f"gone/{rank}"]):
                return f"rank {self.rank} is in {self.last_event}, but {self._store.get(f'gone/{rank}').decode()}"
        return ""

    def close(self, said: str = "") -> None:
        """Ends the thread, and tells waiting ranks that this one's script has ended."""
        last = f"after {self.calls} calls of nets" if self.calls else "before any call of a net"
        with contextlib.suppress(Exception):
            self._store.set(f"gone/{self.rank}", f"rank {self.rank}'s script has ended {last}{said}")
        self._watcher.stop()


def _kind_of(target: Any) -> str:
    return type(target).__name__ if isinstance(target, nn.Module) else getattr(target, "__qualname__", type(target).__name__)
