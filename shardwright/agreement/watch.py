"""The watch: ranks of a job tell each other what they are doing, so that those that do different things find out.

Collectives of different programs wait for each other for ever, end the process, or mix up numbers. So every rank keeps a
list of its *events* (calls of nets, and backward passes), and ranks compare events through the job's store, which needs no
other rank to be at the same place:

- At a call with a signature that is new (and at every 64th call, and where a net goes from one signature to another) a rank
  *asks*: it writes what it is about to do and waits for what the others do at that event. They ask too, as a rule.
- A rank that does not, for it runs what it knows, is answered for by its *watcher*, a thread that looks into the store when
  the program stands still. So the rank that asks learns of the difference and raises an error, and never waits for nobody.
- A rank that stands still for some seconds shows its latest events. Where those of two ranks differ, it is proved that they
  wait for each other in vain, and the job ends with words that say so.

Invariants:

- Whoever writes the last message of an event judges it, so that each rank reads one verdict: as many messages as ranks.
- Nothing is proved by time. A rank that is slow, or computes for an hour, is waited for.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwright.agreement.signature import Signature, looked_at, number_of
from shardwright.agreement.verdict import _STAGES, _first_difference, judge
from shardwright.base.torch_private import cloned_store, current_graph_task, job_timeout
from shardwright.errors import WorldError

EVERY = 64  # calls between comparisons of what is known
_PARTS = 8  # of the weights, of which one is compared at a time
_CHANGES = 16  # changes of signature that are compared each; from then on one of as many
_LOOK = 0.2  # seconds between two looks of the watcher
_STILL = 3.0  # seconds without an event after which a rank shows what it is at
_GRACE = 5.0  # seconds that a program which waits in vain has to come out of it by itself
_REMEMBERED, _SHOWN = 4096, 48  # events
_KEPT = 32  # verdicts in the store

_MASK = (1 << 61) - 1


Look = Callable[[bool], list[Any]]  # what to compare of the inputs' values: checksums, or sketches


class Net:
    """What the watch knows of one net: its number, in the order of first calls, and what it ran last."""

    def __init__(self, watch: Watch, number: int, kind: str):
        self.watch, self.name = watch, f"{number} ({kind})"
        self.calls = self.changes = 0
        self.latest: Signature | None = None


class Event:
    """One thing that a rank does which other ranks have to do too."""

    __slots__ = ("asked", "chain", "index", "net", "number", "sign", "text")

    def __init__(self, index: int, chain: int, net: Net | None, number: int, text: str = ""):
        self.index, self.chain, self.net, self.number, self.text = index, chain, net, number, text
        self.sign: Signature | None = None  # of a call, once it is known and nobody is asked
        self.asked = False

    def __str__(self) -> str:
        return self.text or f"call {self.number} of net {self.net.name if self.net else ''}"


class Watch:
    """The events of this rank, and the thread that answers for it."""

    def __init__(self, rank: int, size: int, patience: float):
        self.rank, self.size, self.patience = rank, size, patience
        self.events: deque[Event] = deque(maxlen=_REMEMBERED)
        self.count = self.calls = self.nets = 0
        self._judged: deque[str] = deque()
        self.litter: deque[str] = deque()  # keys that nobody reads any more
        self.verdict = ""  # why this rank cannot go on, though it asked nobody
        self.asking = self._telling = False
        self.now: Event | None = None
        self._chain = 0
        self._backward = -1
        self._thread_of_calls = threading.get_ident()
        self._store = dist.PrefixStore("shardwright", cloned_store())
        self._watcher = _Watcher(self)

    # -- events of the program ------------------------------------------------------------------------------------

    def begin(self, owner: Any) -> Event:
        """Returns a call of a net begins; what it is comes with :meth:`again` or :meth:`told`."""
        if self.verdict:
            raise WorldError(self.verdict)
        net: Net | None = owner.__dict__.get("_net")
        if net is None or net.watch is not self:
            net = owner.__dict__["_net"] = Net(self, self.nets, _kind_of(owner.target))
            self.nets += 1
        net.calls += 1
        self.calls += 1
        self.now = event = self._event(net, net.calls)
        return event

    def name_of(self, owner: Any) -> str:
        """Returns the number and kind of a net that was called."""
        net: Net = owner.__dict__["_net"]
        return net.name

    def _event(self, net: Net | None, number: int, text: str = "") -> Event:
        event = Event(self.count, self._chain, net, number, text)
        self.events.append(event)
        self.count += 1
        return event

    def _is(self, event: Event, number: int) -> None:
        """Says what an event was; those to come are chained to it."""
        self._chain = (event.chain * 0x5851F42D4C957F2D + number + 1) & _MASK

    def note(self, text: str) -> None:
        """Something that is no call of a net, and that all ranks have to do."""
        self._is(self._event(None, 0, text), len(text))

    def in_backward(self) -> None:
        """A backward pass communicates; the first time of each is an event."""
        task = current_graph_task()
        if task != self._backward:
            self._backward = task
            self.note("a backward pass")

    def again(self, compiled: Any, look: Look | None) -> None:
        """The call that has begun runs what is compiled already.

        Args:
            look: what to compare of the values of its inputs, where all ranks should have the same.
        """
        event, enabled = self.now, torch.is_grad_enabled()
        assert event is not None
        assert event.net is not None
        net, sign = event.net, compiled.signs.get(enabled)
        if sign is None:
            sign = compiled.signs[enabled] = next(iter(compiled.signs.values())).with_gradients(enabled)
            is_due = True
        elif sign is not net.latest:
            net.changes += 1
            is_due = net.changes <= _CHANGES or net.changes % _CHANGES == 0
        else:
            is_due = False
        net.latest = sign
        self._is(event, sign.number)
        event.asked = is_due or self.calls % EVERY == 0
        if event.asked:
            self._ask(event, sign, False, look)
            if self.calls % EVERY == 0:
                self._compare_weights(event, compiled.weights(_PARTS, self.calls // EVERY % _PARTS))
        else:
            event.sign = sign

    @contextlib.contextmanager
    def told(self, sign: Signature, look: Look | None) -> Iterator[None]:
        """Around the making of what the call that has begun will run: all ranks make it, of the same signature.

        A rank that fails within tells those that wait for it in :meth:`compare`.
        """
        event = self.now
        assert event is not None
        assert event.net is not None
        event.net.latest, event.asked, self._telling = sign, True, True
        self._is(event, sign.number)
        self._ask(event, sign, True, look)
        try:
            yield
        except BaseException as error:
            self._chain = event.chain
            said = f"rank {self.rank} cannot go on with {event}: {type(error).__name__}: {str(error)[:300]}"
            with contextlib.suppress(Exception):
                for stage in _STAGES:
                    self.say(self._store, f"{event.index}{stage}", said)
            raise
        finally:
            self._telling = False

    def compare(self, stage: str, lines: Sequence[str], values: Sequence[Any] = ()) -> None:
        """Refuses what differs between ranks, on all of them; within :meth:`told`.

        Args:
            stage: what it is, ``"graph"`` or ``"program"``.
            lines: its text.
            values: what :func:`looked_at` says of tensors that it holds.
        """
        event = self.now
        if not self._telling:
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

    def _message(self, event: Event, sign: Signature | None, is_new: bool | None) -> dict[str, Any]:
        """What this rank does at an event, for the others."""
        return {
            "event": str(event),
            "facts": {} if sign is None else dict(sign.facts),
            "number": 0 if sign is None else sign.number,
            "new": is_new,
            "chain": event.chain,
            "before": [str(e) for e in self._lately(event, 4)],
            "values": None,
        }

    def _lately(self, event: Event, many: int) -> list[Event]:
        back = self.count - event.index
        return [e for e in list(self.events)[-(many + back) :] if e.index < event.index][-many:]

    def _ask(self, event: Event, sign: Signature, is_new: bool, look: Look | None) -> None:
        message = self._message(event, sign, is_new)
        if look is not None:
            message["values"] = look(False)
        verdict = self._verdict_on(event, "", message)
        if verdict.startswith("~"):  # bits of inputs differ: it may be that rounding set them apart
            assert look is not None
            verdict = self._verdict_on(event, "/values", {"event": str(event), "sketches": look(True)})
        if verdict != "=":
            self._chain = event.chain  # ranks that are refused alike go on alike
            raise WorldError(verdict)

    def _compare_weights(self, event: Event, weights: Mapping[str, Tensor]) -> None:
        """Refuses weights that should be the same on all ranks and are not; all ranks do."""
        sketches = looked_at(weights.values(), True)
        names = list(weights)
        verdict = self._verdict_on(event, "/weights", {"event": str(event), "sketches": sketches, "names": names})
        if verdict != "=":
            raise WorldError(verdict)

    def _verdict_on(self, event: Event, stage: str, message: dict[str, Any]) -> str:
        """Writes this rank's message and waits for the verdict."""
        at = f"{event.index}{stage}"
        self.asking = True
        try:
            self._write(self._store, at, message)
            keys = {rank: f"m/{at}/{rank}" for rank in range(self.size)}
            self._until(lambda: self._store.add(f"v/{at}", 0) > 0, event, keys, not stage)
            return "=" if self._store.add(f"v/{at}", 0) == 1 else str(self._store.get(f"w/{at}").decode())
        finally:
            self.asking = False

    def _write(self, store: Any, at: str, message: dict[str, Any]) -> int:
        """Writes a message of this rank; the last of all ranks judges. Returns how many have written."""
        store.set(f"m/{at}/{self.rank}", json.dumps(message))
        arrived: int = store.add(f"n/{at}", 1)
        if arrived == self.size:
            keys = [f"m/{at}/{rank}" for rank in range(self.size)]
            self.say(store, at, judge([json.loads(text) for text in store.multi_get(keys)]))
            self.litter.extend(keys)
            self._judged.append(at)
            if len(self._judged) > _KEPT:  # all ranks have been in later comparisons
                old = self._judged.popleft()
                self.litter.extend(f"{kind}/{old}" for kind in "nvwa")
        return arrived

    def say(self, store: Any, at: str, verdict: str) -> None:
        """Tells all ranks a verdict, unless there is one."""
        if verdict == "=":
            store.add(f"v/{at}", 1)
        elif store.compare_set(f"w/{at}", "", verdict).decode() == verdict:
            store.add(f"v/{at}", 2)

    def _until(self, is_there: Callable[[], bool], event: Event, keys: Mapping[int, str], asks: bool = False) -> None:
        """Waits, and says why where it is in vain; with ``asks``, soon asks the watchers of the other ranks."""
        began, pause, looked = time.monotonic(), 5e-5, 0.0
        while not is_there():
            if self.verdict:
                raise WorldError(self.verdict)
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

    def explain(self) -> str:
        """Why another rank has left this one alone, if that is known; where communication failed."""
        with contextlib.suppress(Exception):
            self._watcher.join_look()
            if self.verdict:
                return self.verdict
            store = self._store
            for rank in range(self.size):
                if rank != self.rank and store.check([f"gone/{rank}"]):
                    last = self.events[-1] if self.events else "its first call"
                    return f"rank {self.rank} is in {last}, but {store.get(f'gone/{rank}').decode()}"
        return self.verdict

    def close(self, said: str = "") -> None:
        """Ends the thread, and tells ranks that wait for this one that it has gone."""
        last = f"after {self.calls} calls of nets" if self.calls else "before any call of a net"
        with contextlib.suppress(Exception):
            self._store.set(f"gone/{self.rank}", f"rank {self.rank}'s script has ended {last}{said}")
        self._watcher.stop()


class _Watcher:
    """The thread that looks into the store while the program stands still."""

    def __init__(self, watch: Watch):
        self.watch = watch
        self._store = dist.PrefixStore("shardwright", cloned_store())
        self._end = threading.Event()
        self._seen, self._since, self._ticks = -1, time.monotonic(), 0
        self._asks = 0
        self._open: list[int] = []  # events that were asked about and that this rank has not come to
        self._answered: list[int] = []  # those without a verdict yet
        self._shown = -1
        self._told_at = 0.0
        self.said = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="shardwright-watcher", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=2)

    def join_look(self) -> None:
        """Looks once more, for what was said since the last time."""
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
        watch, now = self.watch, time.monotonic()
        self._ticks += 1
        while watch.litter:
            self._store.delete_key(watch.litter.popleft())
        if watch.count != self._seen:
            self._seen, self._since = watch.count, now
            if self._ticks % 5:
                return
        if not watch.verdict and not self._is_inside():
            return  # the user's own code; nobody to ask, perhaps, and no store any more
        self._read_asks()
        self._read_verdicts()
        if now - self._since > _STILL and self._ticks % 5 == 0 and not watch.verdict and watch.count:
            self._show()
        if watch.verdict:
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
            if index >= self.watch.count:
                continue
            message = self._answer(index)
            if message is None:
                continue
            self._open.remove(index)
            if message:
                self._answered.append(index)
                self.watch._write(self._store, str(index), message)

    def _answer(self, index: int) -> dict[str, Any] | None:
        """What this rank does at an event; empty where it says so itself, ``None`` where it is not known yet."""
        watch = self.watch
        events = list(watch.events)
        if not events or index < events[0].index:
            return {"event": "", "past": True, "facts": {}, "new": None, "chain": 0, "values": None}
        event = events[index - events[0].index]
        if event.net is not None and event.sign is None:
            return {} if event.asked else None if event is watch.now else watch._message(event, None, None)
        return watch._message(event, event.sign, False)

    def _read_verdicts(self) -> None:
        for index in list(self._answered):
            found = self._store.add(f"v/{index}", 0)
            if found:
                self._answered.remove(index)
            if found > 1:
                self._tell(self._store.get(f"w/{index}").decode())
        if not self.watch.verdict and self._ticks % 5 == 0 and self._store.check(["end"]):
            self._tell(self._store.get("end").decode())

    def _show(self) -> None:
        """Shows this rank's latest events, and compares them with rank 0's."""
        watch = self.watch
        if self._shown != watch.count:
            self._shown = watch.count
            latest = [[e.index, str(e), e.sign.number if e.sign else 0] for e in list(watch.events)[-_SHOWN:]]
            self._store.set(f"at/{watch.rank}", json.dumps(latest))
        if watch.rank == 0 or not self._store.check(["at/0"]):
            return
        rank0 = {index: rest for index, *rest in json.loads(self._store.get("at/0"))}
        for event in list(watch.events)[-_SHOWN:]:
            its = rank0.get(event.index)
            number = event.sign.number if event.sign else 0
            if its is None or (its[0] == str(event) and (not its[1] or not number or its[1] == number)):
                continue
            said = "in another way" if its[0] == str(event) else f"in {its[0]}"
            self._store.compare_set(
                "end", "",
                f"the ranks wait for each other in vain: rank {watch.rank} is in {event} where rank 0 is {said}; make the same "
                "calls, and as many backward passes, on every rank",
            )  # fmt: skip
            return

    def _tell(self, said: str) -> None:
        self.watch.verdict = said
        self._told_at = time.monotonic()
        if self._is_waiting():
            self.said = True
            print(f"shardwright: rank {self.watch.rank}: {said}", file=sys.stderr, flush=True)

    def _is_waiting(self) -> bool:
        """Tells whether the program is in a collective, or in a backward pass, which has some."""
        return not self.watch.asking and self._is_inside()

    def _is_inside(self) -> bool:
        frame: Any = sys._current_frames().get(self.watch._thread_of_calls)
        while frame is not None and frame.f_code.co_filename == threading.__file__:
            frame = frame.f_back  # waits for a thread that waits for the others
        return frame is not None and any(part in frame.f_code.co_filename for part in _INSIDE)

    def _end_in_vain(self, now: float) -> None:
        """Ends the process where the program still waits for what will not come."""
        if now - self._told_at > _GRACE and now - self._since > _GRACE and self._is_waiting():
            print(f"shardwright: rank {self.watch.rank} ends: {self.watch.verdict}", file=sys.stderr, flush=True)
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os._exit(1)


# Parts of the names of files whose functions wait for other ranks.
_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_INSIDE = (_PACKAGE, "<shardwright", os.path.join("torch", "distributed"), os.path.join("torch", "autograd"))


# -- one watch a job ----------------------------------------------------------------------------------------------------

_watches: weakref.WeakKeyDictionary[Any, Watch] = weakref.WeakKeyDictionary()
_active: list[Watch] = []


def _kind_of(target: Any) -> str:
    return type(target).__name__ if isinstance(target, nn.Module) else getattr(target, "__qualname__", type(target).__name__)


def note(text: str) -> None:
    """Something that all ranks have to do, and that is no call of a net."""
    if _active:
        _active[0].note(text)


def in_backward() -> None:
    """A backward pass communicates."""
    if _active:
        _active[0].in_backward()


def compare_on_ranks(world: Any, stage: str, lines: Sequence[str], values: Sequence[Any] = ()) -> None:
    """See :meth:`Watch.compare`; nothing where there are no other ranks."""
    watch = watch_of(world)
    if watch is not None:
        watch.compare(stage, lines, values)


def explain(world: Any) -> str:
    """See :meth:`Watch.explain`."""
    watch = watch_of(world)
    return "" if watch is None else watch.explain()


def watch_of(world: Any) -> Watch | None:
    """Returns the watch of the job that a world is; ``None`` for simulated worlds and jobs of one rank."""
    if world.processes == 1:
        return None
    found: Watch | None = world.watch
    if found is None:
        found = world.watch = _watches.get(dist.group.WORLD)
        if found is None:
            found = world.watch = _watches[dist.group.WORLD] = Watch(world.rank, world.size, _patience(world))
            _active[:] = [found]
            _explain_failures()
    return found


def _patience(world: Any) -> float:
    """Returns the seconds that a rank waits for the others: those of the job, or torch's half hour."""
    timeout = job_timeout(world.device.type)
    return 1800.0 if timeout is None else timeout.total_seconds()


_MIXED = (
    "the parameters of a model are distributed at the first call of its AutoParallel: call that, net(x), in place of the "
    "model; give a copy that is to run or average by itself whole values, sw.full_value(parameter) on every rank; write into a "
    "parameter with parameter.data = value"
)


@lru_cache(maxsize=1)
def _explain_failures() -> None:
    """Has a failure of communication that nobody catches say what other ranks did, where that is known."""
    plain = sys.excepthook

    def hook(kind: Any, error: Any, trace: Any) -> None:
        plain(kind, error, trace)
        if isinstance(error, RuntimeError) and _active:
            watch = _active[0]
            said = _MIXED if "got mixed torch.Tensor and DTensor" in str(error) else watch.explain()
            if said and not (watch.verdict and watch._watcher.said):
                print(f"shardwright: rank {watch.rank}: {said}", file=sys.stderr, flush=True)

    sys.excepthook = hook
