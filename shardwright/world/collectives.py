"""Collectives over one process group: prepared once, then run at once or started now and waited for later.

A :class:`Link` prepares an operation for tensors of a fixed size. On gloo it is done by the fastest of several algorithms
for that size and group, as the :class:`~shardwright.world.calibration.Calibration` says; on another backend, NCCL say, by
the backend's own collective where it has one.

Invariants:

- On gloo every algorithm gives the same bits: contributions are combined as :mod:`.summation` says. The backend's own
  all-reduce adds in an order of its own, so gloo's serves only where that cannot be seen: whole numbers, and sums of two.
- Every member chooses the same algorithm: choices depend on the calibration, the sizes, the order and the dtype, and
  members are given the same.
- Members call a group's operations in the same order; several may be under way at a time, and end in any order.
- Members count from 0, in torch's order: ascending ranks.
- The argument is never changed, unless ``inplace`` says that it may be, and must not change before the operation ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwright.errors import WorldError
from shardwright.world import point_to_point as messages
from shardwright.world.calibration import DEFAULT, Calibration
from shardwright.world.point_to_point import Algorithm, Reduction, Scratch, plain
from shardwright.world.summation import is_widened, prepare_reduce

# The names before torch 2.13 and since.
_all_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_REDUCE = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}

_WHOLE = frozenset({torch.uint8, torch.int8, torch.int32, torch.int64})
# What gloo and NCCL reduce. (gloo adds bools as bytes, which makes a bool of 2; neither knows int16.)
_REDUCIBLE = _WHOLE | {
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
}
_MOVABLE = _REDUCIBLE | {torch.bool}  # what they move; anything else travels as bytes
# What gloo's own sum of two is worth having in: its float16 takes twice our time. (Its max and min of floats lose NaN.)
_SUM_OF_TWO = frozenset({torch.float32, torch.float64, torch.complex64, torch.complex128})

_MOST_COPIES = 64 << 20  # bytes of whole tensors that one member may hold for the others
_FIRST_TAG, _LAST_TAG = 1 << 24, (1 << 25) - 2  # of direct messages; away from those that a user's own sends may have

_CLOSED = "this distributed world was closed: bind the program again in a new one"


def backend_of(group: Any, device_type: str) -> str:
    """Name of the backend that serves tensors of ``device_type`` in a process group."""
    served = dict(pair.split(":") for pair in dist.get_backend_config(group).split(",") if ":" in pair)
    return served.get(device_type) or str(dist.get_backend(group))


# -- handles -----------------------------------------------------------------------------------------------------------


class Handle:
    """An operation under way. It keeps its tensors alive; drop it only after :meth:`wait`."""

    __slots__ = ("_finish", "_result", "_state")

    def __init__(self, finish: Callable[[Any], Tensor] | None, state: Any):
        self._finish, self._state = finish, state
        self._result: Tensor | None = None if finish else state

    def wait(self) -> Tensor:
        """Waits until the operation is done; every call returns the same result.

        Raises:
            RuntimeError: another rank is gone, or did not do its part within the group's timeout.
        """
        if self._finish is not None:
            self._result = self._finish(self._state)
            self._finish = self._state = None
        return self._result  # type: ignore[return-value]


class _Continued(Handle):
    """An operation under way whose later rounds a thread of the link does, unless somebody waits for it before."""

    __slots__ = ("_claim", "_done", "_error")

    def __init__(self, finish: Callable[[Any], Tensor], state: Any):
        super().__init__(finish, state)
        self._claim, self._done = threading.Lock(), threading.Event()
        self._error: BaseException | None = None

    def advance(self) -> None:
        """Does what is left to do, if nobody does that already."""
        if not self._claim.acquire(blocking=False):
            return
        try:
            super().wait()
        except BaseException as error:  # for those who wait
            self._error = error
        finally:
            self._done.set()

    def wait(self) -> Tensor:
        self.advance()
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]


class _Later:
    """A thread that does the later rounds of started operations, in the order of their start; made at the first."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[_Continued | None] | None = None

    def put(self, handle: _Continued) -> None:
        if self._queue is None:
            self._queue = SimpleQueue()
            threading.Thread(target=_serve, args=(self._queue,), name="shardwright-link", daemon=True).start()
        self._queue.put(handle)

    def close(self) -> None:
        if self._queue is not None:
            self._queue.put(None)
            self._queue = None


def _serve(queue: SimpleQueue[_Continued | None]) -> None:
    # what was started in inference mode may be written in it only, and what was not may be written in it too
    with torch.inference_mode():
        while (handle := queue.get()) is not None:
            handle.advance()
            del handle  # with its tensors, which get() would else keep until the next one comes


# -- operations --------------------------------------------------------------------------------------------------------


class Operation:
    """A collective of a fixed size, as a function of this rank's tensor; every member has to call it.

    It is prepared for a dtype when it first meets it.
    """

    __slots__ = ("_algorithms", "_later", "_prepare", "_runs")

    def __init__(self, prepare: Callable[[torch.dtype], tuple[str, Algorithm]], later: _Later):
        self._prepare, self._later = prepare, later
        self._algorithms: dict[torch.dtype, tuple[str, Algorithm]] = {}
        self._runs: dict[torch.dtype, Callable[[Tensor], Tensor]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        run = self._runs.get(x.dtype)
        return run(x) if run is not None else self._of(x.dtype)[1].run(x)

    def start(self, x: Tensor) -> Handle:
        """Starts it. On gloo it goes on without this thread; on NCCL it is in the stream's order when waited for."""
        algorithm = self._of(x.dtype)[1]
        state = algorithm.begin(x)
        if not algorithm.continues:
            return Handle(algorithm.finish, state)
        handle = _Continued(algorithm.finish, state)
        self._later.put(handle)
        return handle

    def algorithm(self, dtype: torch.dtype = torch.float32) -> str:
        """Name of the algorithm for tensors of a dtype."""
        return self._of(dtype)[0]

    def is_possible(self, dtype: torch.dtype) -> bool:
        """Whether the algorithm that it was prepared with can do tensors of a dtype, and of its size."""
        try:
            self._of(dtype)
        except WorldError:
            return False
        return True

    def _of(self, dtype: torch.dtype) -> tuple[str, Algorithm]:
        if dtype not in self._algorithms:
            self._algorithms[dtype] = self._prepare(dtype)
            self._runs[dtype] = self._algorithms[dtype][1].run
        return self._algorithms[dtype]


class _Closed:
    """What stands for a process group once its world is closed."""

    def __getattr__(self, name: str) -> Any:
        raise WorldError(_CLOSED)


class Link:
    """One process group of two ranks or more, seen from one of them.

    Args:
        ranks: its ranks in torch's order, ascending.
        group: the process group.
        is_gloo: whether gloo serves it.
        calibration: what is fastest; the same on every rank. Default: as measured on a machine of two cores.
        scratch: memory that links may share; default: one's own.
    """

    __slots__ = ("_later", "_tag", "calibration", "group", "is_gloo", "position", "ranks", "scratch", "size")

    def __init__(
        self,
        ranks: Sequence[int],
        group: Any,
        is_gloo: bool,
        calibration: Calibration | None = None,
        scratch: Scratch | None = None,
    ):
        self.ranks, self.group, self.is_gloo = tuple(ranks), group, is_gloo
        self.calibration, self.scratch = calibration or DEFAULT, scratch or Scratch()
        self.size = len(self.ranks)
        self.position: int = dist.get_rank(group)
        self._tag = _FIRST_TAG
        self._later = _Later()

    def open(self) -> tuple[Callable[..., Any], Callable[..., Any], int]:
        """What sends, what receives, and the first of two tags that no call under way has; for :mod:`.point_to_point`."""
        group, tag = self.group, self._tag
        self._tag = tag + 2 if tag < _LAST_TAG else _FIRST_TAG
        return group.send, group.recv, tag

    def close(self) -> None:
        """Lets go of the group and ends the thread; what was prepared raises from then on. Twice does no harm."""
        self.group = _Closed()
        self._later.close()

    # Each operation: what it does, and what its algorithms are, by name.

    def prepare_all_reduce(
        self,
        count: int,
        op: str = "sum",
        order: Sequence[int] | None = None,
        inplace: bool = False,
        algorithm: str | None = None,
    ) -> Operation:
        """The combination of all members' tensors, on each.

        Args:
            count: elements of a tensor, of any shape.
            op: ``sum``, ``max`` or ``min``.
            order: members in the order in which their tensors are combined; default ascending.
            inplace: whether it may write into its argument. If that is contiguous it then may return it, too.
            algorithm: its name, for tests and measurements; default: the calibration's choice.

        Returns:
            An operation on a tensor of ``count`` elements; the result has its shape.
        """
        members = tuple(order) if order is not None else tuple(range(self.size))

        def ways(dtype: torch.dtype) -> dict[str, Callable[[], Algorithm]]:
            how = Reduction(op, members, dtype)
            if not self.is_gloo:
                if dtype in _REDUCIBLE:
                    return {"backend": lambda: _backend_all_reduce(self, op, inplace)}
                return {"backend": lambda: _backend_copies(self, how)}
            found: dict[str, Callable[[], Algorithm]] = {
                "pieces": lambda: messages.pieces_all_reduce(self, count, how, inplace)
            }
            if (self.size - 1) * count * dtype.itemsize <= _MOST_COPIES:
                found["hub"] = lambda: messages.hub_all_reduce(self, count, how, inplace)
                found["copies"] = lambda: messages.copies_all_reduce(self, count, how, inplace)
            if not is_widened(dtype, op, self.size):
                found["chain"] = lambda: messages.chain_all_reduce(self, count, how, inplace)
            if dtype in _WHOLE or (dtype in _SUM_OF_TWO and op == "sum" and self.size == 2):
                found["backend"] = lambda: _backend_all_reduce(self, op, inplace)
            return found

        return self._operation("all_reduce", count, ways, algorithm) if count else _nothing(lambda x: x)

    def prepare_reduce_scatter(
        self, sizes: Sequence[int], op: str = "sum", order: Sequence[int] | None = None, algorithm: str | None = None
    ) -> Operation:
        """Each member's piece of the combination of all members' tensors.

        Args:
            sizes: elements of each member's piece; zero allowed.
            op: ``sum``, ``max`` or ``min``.
            order: members in the order in which their tensors are combined; default ascending.

        Returns:
            An operation on a flat tensor of ``sum(sizes)`` elements, the members' pieces one after the other, to a flat
            one of this member's size.
        """
        members = tuple(order) if order is not None else tuple(range(self.size))
        even, total = len(set(sizes)) == 1, sum(sizes)

        def ways(dtype: torch.dtype) -> dict[str, Callable[[], Algorithm]]:
            how = Reduction(op, members, dtype)
            if not self.is_gloo and even and dtype in _REDUCIBLE:
                return {"backend": lambda: _backend_reduce_scatter(self, sizes, op)}
            found = {"backend": lambda: _backend_scatter_reduce(self, sizes, how)}
            if self.is_gloo:
                found["direct"] = lambda: messages.direct_reduce_scatter(self, sizes, how)
                if (self.size - 1) * total * dtype.itemsize <= _MOST_COPIES:
                    found["hub"] = lambda: messages.hub_reduce_scatter(self, sizes, how)
            return found

        return self._operation("reduce_scatter", total, ways, algorithm) if total else _nothing(_empty)

    def prepare_all_gather(self, sizes: Sequence[int], algorithm: str | None = None) -> Operation:
        """All members' pieces, on each.

        Args:
            sizes: elements of each member's piece; zero allowed.

        Returns:
            An operation on a tensor of this member's size to a flat one of the pieces, one after the other.
        """
        even, total = len(set(sizes)) == 1, sum(sizes)

        def ways(dtype: torch.dtype) -> dict[str, Callable[[], Algorithm]]:
            found: dict[str, Callable[[], Algorithm]] = {}
            if even:
                found["backend"] = lambda: _backend_all_gather(self, total)
            elif not self.is_gloo:
                found["backend"] = lambda: _backend_uneven_gather(self, sizes)
            if self.is_gloo:
                found["direct"] = lambda: messages.direct_all_gather(self, sizes)
                found["hub"] = lambda: messages.hub_all_gather(self, sizes)
            return found

        return self._operation("all_gather", total, ways, algorithm) if total else _nothing(_empty)

    def prepare_exchange(self, counts: Mapping[tuple[int, int], int], algorithm: str | None = None) -> Operation:
        """What each member has for each.

        Args:
            counts: elements that go from a member to a member, ``counts[source, target]``, of all pairs that have any:
                the same on every member. What a member has for itself, ``counts[i, i]``, is not sent but copied.

        Returns:
            An operation on a flat tensor, what this member has for each, one after the other, to a flat tensor, what
            each has for this member, one after the other.
        """
        me, members = self.position, range(self.size)
        sent = [counts.get((me, m), 0) for m in members]
        received = [counts.get((m, me), 0) for m in members]
        moved = [0] * self.size
        for (source, target), n in counts.items():
            if source != target:
                moved[source] += n

        def ways(dtype: torch.dtype) -> dict[str, Callable[[], Algorithm]]:
            found = {"backend": lambda: _backend_exchange(self, sent, received)}
            if self.is_gloo:
                found["direct"] = lambda: messages.direct_exchange(self, sent, received)
            return found

        if not any(moved):
            return _nothing(plain)
        return self._operation("exchange", max(moved), ways, algorithm)

    def _operation(
        self, kind: str, count: int, ways: Callable[[torch.dtype], dict[str, Callable[[], Algorithm]]], forced: str | None
    ) -> Operation:
        def prepare(dtype: torch.dtype) -> tuple[str, Algorithm]:
            found = ways(dtype)
            if forced is not None and forced not in found:
                known = ", ".join(sorted(found))
                raise WorldError(f"{kind} of {count} {dtype} among {self.size} ranks has no algorithm {forced!r}: {known}")
            name = forced or self.calibration.choose(kind, self.size, count * dtype.itemsize, found)
            return name, found[name]()

        return Operation(prepare, self._later)


def _nothing(run: Callable[[Tensor], Tensor]) -> Operation:
    """An operation that moves nothing."""
    return Operation(lambda dtype: ("nothing", Algorithm(run, lambda result: result, run)), _Later())


def _empty(x: Tensor) -> Tensor:
    return x.new_empty(0)


# -- the backend's own collectives -------------------------------------------------------------------------------------


def _backend_algorithm(
    call: Callable[[Tensor, bool], tuple[Any, Any]], end: Callable[[Any], Tensor] | None = None
) -> Algorithm:
    """An algorithm that is one collective of the backend, and maybe something local after it.

    Args:
        call: of the tensor and whether it is to return before the end; returns the work, and what ``end`` needs.
    """

    def begin(x: Tensor) -> Any:
        return call(x, True)

    def finish(state: Any) -> Tensor:
        work, value = state
        work.wait()
        return value if end is None else end(value)  # type: ignore[no-any-return]

    def run(x: Tensor) -> Tensor:
        _, value = call(x, False)
        return value if end is None else end(value)  # type: ignore[no-any-return]

    return Algorithm(begin, finish, run)


def _backend_all_reduce(link: Link, op: str, inplace: bool) -> Algorithm:
    reduce_op = _REDUCE[op]

    def call(x: Tensor, later: bool) -> tuple[Any, Tensor]:
        x = plain(x)
        out = x if inplace else x.clone()
        return dist.all_reduce(out, reduce_op, link.group, later), out

    return _backend_algorithm(call)


def _backend_copies(link: Link, how: Reduction) -> Algorithm:
    """All-reduce of a dtype that the backend does not reduce: everybody gets all, and combines it."""
    combine, n = prepare_reduce(how.dtype, how.op, link.size), link.size

    def call(x: Tensor, later: bool) -> tuple[Any, Any]:
        x = plain(x)
        out = x.new_empty(n * x.numel())
        work = _all_to_all(link, out, x.view(-1).repeat(n), None, None, later)
        result = torch.empty_like(x)
        return work, (out.split(x.numel()), result, result.view(-1))

    def end(value: Any) -> Tensor:
        parts, result, out = value
        combine([parts[m] for m in how.order], out)
        return result  # type: ignore[no-any-return]

    return _backend_algorithm(call, end)


def _backend_reduce_scatter(link: Link, sizes: Sequence[int], op: str) -> Algorithm:
    reduce_op, own = _REDUCE[op], sizes[link.position]

    def call(x: Tensor, later: bool) -> tuple[Any, Tensor]:
        out = x.new_empty(own)
        return _reduce_scatter_single(out, plain(x), reduce_op, link.group, later), out

    return _backend_algorithm(call)


def _backend_scatter_reduce(link: Link, sizes: Sequence[int], how: Reduction) -> Algorithm:
    """Reduce-scatter by the backend's all-to-all, combined here."""
    combine, n, own = prepare_reduce(how.dtype, how.op, link.size), link.size, sizes[link.position]
    even = len(set(sizes)) == 1
    received, sent = (None, None) if even else ([own] * n, list(sizes))

    def call(x: Tensor, later: bool) -> tuple[Any, Any]:
        out = x.new_empty(n * own)
        return _all_to_all(link, out, plain(x), received, sent, later), (out.view(n, own).unbind(), x.new_empty(own))

    def end(value: Any) -> Tensor:
        parts, result = value
        return combine([parts[m] for m in how.order], result)

    return _backend_algorithm(call, end)


def _backend_all_gather(link: Link, total: int) -> Algorithm:
    def call(x: Tensor, later: bool) -> tuple[Any, Tensor]:
        out = x.new_empty(total)
        into, piece = out, plain(x).view(-1)
        if x.dtype not in _MOVABLE:
            into, piece = into.view(torch.uint8), piece.view(torch.uint8)
        return _all_gather_single(into, piece, link.group, later), out

    return _backend_algorithm(call)


def _backend_uneven_gather(link: Link, sizes: Sequence[int]) -> Algorithm:
    """All-gather of pieces of several sizes, by the backend's all-to-all of copies."""
    n, total, received, sent = link.size, sum(sizes), list(sizes), [sizes[link.position]] * link.size

    def call(x: Tensor, later: bool) -> tuple[Any, Tensor]:
        out = x.new_empty(total)
        return _all_to_all(link, out, plain(x).view(-1).repeat(n), received, sent, later), out

    return _backend_algorithm(call)


def _backend_exchange(link: Link, sent: Sequence[int], received: Sequence[int]) -> Algorithm:
    total, takes, gives = sum(received), list(received), list(sent)

    def call(x: Tensor, later: bool) -> tuple[Any, Tensor]:
        out = x.new_empty(total)
        return _all_to_all(link, out, plain(x), takes, gives, later), out

    return _backend_algorithm(call)


def _all_to_all(
    link: Link, out: Tensor, packed: Tensor, received: list[int] | None, sent: list[int] | None, later: bool
) -> Any:
    """Flat tensors; elements received from and sent to each member, where they are not all the same."""
    if packed.dtype not in _MOVABLE:
        width = packed.dtype.itemsize
        out, packed = out.view(torch.uint8), packed.view(torch.uint8)
        received = None if received is None else [n * width for n in received]
        sent = None if sent is None else [n * width for n in sent]
    return dist.all_to_all_single(out, packed, received, sent, link.group, later)
