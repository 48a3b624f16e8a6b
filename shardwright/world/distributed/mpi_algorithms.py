"""Collectives of MPI as algorithms beside our own: MPI moves what each member needs, and the member adds it up itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shardwright.world.distributed.messages import Algorithm, Messenger, Reduction, both, plain
from shardwright.world.execute.summation import prepare_reduce

_KEPT = 1 << 18  # bytes of received data that an operation keeps memory for: to take it from others costs as much as a message


class _Received(NamedTuple):
    """Memory for what members send.

    Args:
        flat: all of it.
        parts: what each member sends, in the order of summation.
        memory: what MPI takes.
        kept: whether it stays for the next time.
    """

    flat: Tensor
    parts: list[Tensor]
    memory: Any
    kept: bool


class _Room:
    """Gives memory for parts of one size from all members: kept where it is small, else scratch.

    Args:
        link: the communicator.
        count: elements of a part.
        how: the order of the parts, and their dtype.
    """

    def __init__(self, link: Messenger, count: int, how: Reduction):
        self.link, self.count, self.how = link, count, how
        self.is_small = link.size * count * how.dtype.itemsize <= _KEPT
        self.free: list[_Received] = []  # one for each time that it is under way

    def take(self) -> _Received:
        try:
            return self.free.pop()
        except IndexError:
            return self._made()

    def give(self, received: _Received) -> None:
        if received.kept:
            self.free.append(received)
        else:
            self.link.scratch.give(received.flat)

    def _made(self) -> _Received:
        total, dtype = self.link.size * self.count, self.how.dtype
        if self.is_small:
            with torch.inference_mode(False):  # tensors made in inference mode could not be written outside
                flat = torch.empty(total, dtype=dtype)
        else:
            flat = self.link.scratch.take(total, dtype)
        parts = [flat[m * self.count : (m + 1) * self.count] for m in self.how.order]
        return _Received(flat, parts, self.link.group.memory(flat[:total]), self.is_small)


def mpi_all_reduce(link: Messenger, count: int, how: Reduction, inplace: bool) -> Algorithm:
    """All-reduces ``count`` elements, of which each member gets all members' and combines them.

    Args:
        link: the communicator.
        count: elements.
        how: how contributions are combined.
        inplace: whether the result may overwrite the argument.
    """
    combine, room = prepare_reduce(how.dtype, how.op, link.size), _Room(link, count, how)

    def begin(x: Tensor) -> Any:
        x, received = plain(x), room.take()
        return link.group.gather(received.flat, x, None, received.memory), received, x if inplace else torch.empty_like(x)

    def finish(state: Any) -> Tensor:
        work, received, result = state
        work.wait()
        combine(received.parts, result if result.dim() == 1 else result.view(-1))
        room.give(received)
        return result  # type: ignore[no-any-return]

    return both(begin, finish)


def mpi_reduce_scatter(link: Messenger, sizes: Sequence[int], how: Reduction) -> Algorithm:
    """Reduce-scatters a flat tensor: each member gets its piece from all, and combines them."""
    own, width = sizes[link.position], how.dtype.itemsize
    combine, room = prepare_reduce(how.dtype, how.op, link.size), _Room(link, own, how)
    sent, taken = [n * width for n in sizes], [own * width] * link.size

    def begin(x: Tensor) -> Any:
        received = room.take()
        return link.group.exchange(received.flat, plain(x), taken, sent, received.memory), received, x.new_empty(own)

    def finish(state: Any) -> Tensor:
        work, received, result = state
        work.wait()
        if own:
            combine(received.parts, result)
        room.give(received)
        return result  # type: ignore[no-any-return]

    return both(begin, finish)


def mpi_all_gather(link: Messenger, sizes: Sequence[int], dtype: torch.dtype) -> Algorithm:
    """All-gathers flat pieces."""
    total = sum(sizes)
    counts = None if len(set(sizes)) == 1 else [n * dtype.itemsize for n in sizes]

    def begin(x: Tensor) -> Any:
        out = x.new_empty(total)
        return link.group.gather(out, plain(x), counts), out

    return both(begin, _end)


def mpi_exchange(link: Messenger, sent: Sequence[int], received: Sequence[int], dtype: torch.dtype) -> Algorithm:
    """Exchanges flat tensors among the members.

    Args:
        link: the communicator.
        sent, received: elements to and from each member.
        dtype: of the tensors.
    """
    total = sum(received)
    given, taken = ([n * dtype.itemsize for n in sizes] for sizes in (sent, received))

    def begin(x: Tensor) -> Any:
        out = x.new_empty(total)
        return link.group.exchange(out, plain(x), taken, given), out

    return both(begin, _end)


def _end(state: Any) -> Tensor:
    work, out = state
    work.wait()
    return out  # type: ignore[no-any-return]
