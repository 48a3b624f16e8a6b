"""Collectives over one process group: prepared once, then run at once or started now and waited for later.

A :class:`Link` prepares an operation for tensors of a fixed size. On gloo it is done by the fastest of several algorithms
for that size and group, as the :class:`~shardwright.cost.algorithms.Calibration` says; on another backend, NCCL say, by
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

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from shardwright.cost.algorithms import DEFAULT, Calibration
from shardwright.cost.message_sizes import may_hold_copies
from shardwright.errors import WorldError
from shardwright.world.distributed import message_algorithms as algorithms
from shardwright.world.distributed import mpi_algorithms as mpi
from shardwright.world.distributed.backend import (
    _REDUCIBLE,
    _WHOLE,
    _backend_all_gather,
    _backend_all_reduce,
    _backend_copies,
    _backend_exchange,
    _backend_reduce_scatter,
    _backend_scatter_reduce,
    _backend_uneven_gather,
    _empty,
    _nothing,
)
from shardwright.world.distributed.messages import Algorithm, Reduction, Scratch, plain
from shardwright.world.distributed.operations import Operation, _Closed, _Later
from shardwright.world.execute.summation import is_widened

# What gloo's own sum of two is worth having in: its float16 takes twice our time. (Its max and min of floats lose NaN.)
_SUM_OF_TWO = frozenset({torch.float32, torch.float64, torch.complex64, torch.complex128})

_FIRST_TAG, _LAST_TAG = 1 << 24, (1 << 25) - 2  # of direct messages; away from those that a user's own sends may have


class Link:
    """One process group of two ranks or more, as one of them uses it.

    Args:
        ranks: its ranks in torch's order, ascending.
        group: the process group.
        engine: what serves it: ``gloo``, ``mpi``, or ``other`` for another backend of torch.
        calibration: the fastest algorithms; the same on every rank. Default: as measured on a machine of two cores.
        scratch: memory that links may share; default: one's own.
    """

    __slots__ = ("_later", "_tag", "by_messages", "calibration", "engine", "group", "position", "ranks", "scratch", "size")

    def __init__(
        self,
        ranks: Sequence[int],
        group: Any,
        engine: str,
        calibration: Calibration | None = None,
        scratch: Scratch | None = None,
    ):
        self.ranks, self.group, self.engine = tuple(ranks), group, engine
        self.by_messages = engine != "other"  # whether our own algorithms serve it
        self.calibration, self.scratch = calibration or DEFAULT, scratch or Scratch()
        self.size = len(self.ranks)
        self.position: int = group.rank()
        self._tag = _FIRST_TAG
        self._later = _Later()

    def open(self) -> tuple[Callable[..., Any], Callable[..., Any], int]:
        """Returns the send and receive functions, and the first of two unused tags."""
        group, tag = self.group, self._tag
        self._tag = tag + 2 if tag < _LAST_TAG else _FIRST_TAG
        return group.send, group.recv, tag

    def close(self) -> None:
        """Releases the group and ends the thread; prepared operations raise errors from then on. May be called twice."""
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
        """Prepares the combination of all members' tensors, on each member.

        Args:
            count: elements of a tensor, of any shape.
            op: ``sum``, ``max`` or ``min``.
            order: members in the order in which their tensors are combined; default ascending.
            inplace: whether it may write into its argument, and return that if it is contiguous.
            algorithm: its name, for tests and measurements; default: the calibration's choice.

        Returns:
            An operation on a tensor of ``count`` elements; the result has its shape.
        """
        members = tuple(order) if order is not None else tuple(range(self.size))

        def ways(dtype: torch.dtype) -> dict[str, Callable[[], Algorithm]]:
            how = Reduction(op, members, dtype)
            if not self.by_messages:
                if dtype in _REDUCIBLE:
                    return {"backend": lambda: _backend_all_reduce(self, op, inplace)}
                return {"backend": lambda: _backend_copies(self, how)}
            found: dict[str, Callable[[], Algorithm]] = {
                "pieces": lambda: algorithms.pieces_all_reduce(self, count, how, inplace)
            }
            if may_hold_copies(count * dtype.itemsize, self.size):
                found["hub"] = lambda: algorithms.hub_all_reduce(self, count, how, inplace)
                found["copies"] = lambda: algorithms.copies_all_reduce(self, count, how, inplace)
            if not is_widened(dtype, op, self.size):
                found["chain"] = lambda: algorithms.chain_all_reduce(self, count, how, inplace)
            if self.engine == "mpi":
                if may_hold_copies(count * dtype.itemsize, self.size + 1):
                    found["backend"] = lambda: mpi.mpi_all_reduce(self, count, how, inplace)
            elif dtype in _WHOLE or (dtype in _SUM_OF_TWO and op == "sum" and self.size == 2):
                found["backend"] = lambda: _backend_all_reduce(self, op, inplace)
            return found

        return self._operation("all_reduce", count, ways, algorithm) if count else _nothing(lambda x: x)

    def prepare_reduce_scatter(
        self, sizes: Sequence[int], op: str = "sum", order: Sequence[int] | None = None, algorithm: str | None = None
    ) -> Operation:
        """Prepares each member's piece of the combination of all members' tensors.

        Args:
            sizes: elements of each member's piece; zero allowed.
            op: ``sum``, ``max`` or ``min``.
            order: members in the order in which their tensors are combined; default ascending.
            algorithm: its name, for tests and measurements; default: the calibration's choice.

        Returns:
            An operation on a flat tensor of ``sum(sizes)`` elements, the members' pieces one after the other, to a flat
            one of this member's size.
        """
        members = tuple(order) if order is not None else tuple(range(self.size))
        even, total = len(set(sizes)) == 1, sum(sizes)

        def ways(dtype: torch.dtype) -> dict[str, Callable[[], Algorithm]]:
            how = Reduction(op, members, dtype)
            if not self.by_messages and even and dtype in _REDUCIBLE:
                return {"backend": lambda: _backend_reduce_scatter(self, sizes, op)}
            found: dict[str, Callable[[], Algorithm]] = {}
            if self.engine != "mpi":
                found["backend"] = lambda: _backend_scatter_reduce(self, sizes, how)
            elif may_hold_copies(total * dtype.itemsize, self.size + 1):
                found["backend"] = lambda: mpi.mpi_reduce_scatter(self, sizes, how)
            if self.by_messages:
                found["direct"] = lambda: algorithms.direct_reduce_scatter(self, sizes, how)
                if may_hold_copies(total * dtype.itemsize, self.size):
                    found["hub"] = lambda: algorithms.hub_reduce_scatter(self, sizes, how)
            return found

        return self._operation("reduce_scatter", total, ways, algorithm) if total else _nothing(_empty)

    def prepare_all_gather(self, sizes: Sequence[int], algorithm: str | None = None) -> Operation:
        """Prepares the collection of all members' pieces, on each member.

        Args:
            sizes: elements of each member's piece; zero allowed.

        Returns:
            An operation on a tensor of this member's size to a flat one of the pieces, one after the other.
        """
        even, total = len(set(sizes)) == 1, sum(sizes)

        def ways(dtype: torch.dtype) -> dict[str, Callable[[], Algorithm]]:
            found: dict[str, Callable[[], Algorithm]] = {}
            if self.engine == "mpi":
                found["backend"] = lambda: mpi.mpi_all_gather(self, sizes, dtype)
            elif even:
                found["backend"] = lambda: _backend_all_gather(self, total)
            elif not self.by_messages:
                found["backend"] = lambda: _backend_uneven_gather(self, sizes)
            if self.by_messages:
                found["direct"] = lambda: algorithms.direct_all_gather(self, sizes)
                found["hub"] = lambda: algorithms.hub_all_gather(self, sizes)
            return found

        return self._operation("all_gather", total, ways, algorithm) if total else _nothing(_empty)

    def prepare_exchange(self, counts: Mapping[tuple[int, int], int], algorithm: str | None = None) -> Operation:
        """Prepares the exchange of each member's data for each other member.

        Args:
            counts: elements that go from a member to a member, ``counts[source, target]``, of all pairs that have any:
                the same on every member. A member's elements for itself, ``counts[i, i]``, are not sent but copied.
            algorithm: its name, for tests and measurements; default: the calibration's choice.

        Returns:
            An operation on a flat tensor, this member's data for each member in order, to a flat tensor, each member's data for
            this one in order.
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
            if self.engine == "mpi":
                found["backend"] = lambda: mpi.mpi_exchange(self, sent, received, dtype)
            if self.by_messages:
                found["direct"] = lambda: algorithms.direct_exchange(self, sent, received)
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


# -- the backend's own collectives -------------------------------------------------------------------------------------
