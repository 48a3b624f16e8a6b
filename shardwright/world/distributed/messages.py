"""Building blocks of collectives made of gloo's direct messages.

They serve where gloo's own collectives are slow, or do not add in the order of :mod:`.summation`. Each function in
:mod:`.message_algorithms` prepares one algorithm for one rank and one dtype, as an :class:`Algorithm`:

- ``hub``: the first member gets everything, combines it and sends the result to each. 2(n-1) messages, two rounds: the
  cheapest where messages cost more than bytes do.
- ``copies``: each sends all it has to each, and each combines. n(n-1) messages, one round.
- ``pieces``: each combines one piece and sends it to each. 2n(n-1) messages per part of the pieces, all ranks busy.
- ``chain``: the first member's tensor goes from member to member, each adding its own; the last one's goes back. In
  chunks, so that all links are busy. 2(n-1) messages per chunk.
- ``direct``: each sends each what it needs.

Invariants:

- Messages of one call have tags of their own, so that calls under way at the same time do not mix, whatever the order
  in which they end. Nothing empty is sent.
- Where all send to all, a rank posts its sends before its receives. gloo sends when the receiver has said that it is
  ready. If it is not yet, gloo's thread does it later; else the caller's thread does it at once, and posts its own
  receives that much later (up to a third, measured with two to four ranks). Where all wait for one rank, as for the hub,
  receives are posted early.
- In place, a result may be received into the argument's memory: it comes only after the old content has been sent, as it
  depends on it.
- Results, and views of them, are made by ``begin``; ``finish`` writes into them, in whatever thread it runs.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from shardwright.cost.message_sizes import AHEAD, is_kept, parts_of_piece
from shardwright.world.execute.summation import Combine


class Algorithm(NamedTuple):
    """One prepared way to do a collective.

    Args:
        begin: starts it with a tensor, without waiting; returns what ``finish`` needs.
        finish: waits for the rest, and returns the result.
        run: both at once.
        continues: whether other ranks need this one's ``finish`` to get to the end of theirs.
    """

    begin: Callable[[Tensor], Any]
    finish: Callable[[Any], Tensor]
    run: Callable[[Tensor], Tensor]
    continues: bool = False


def both(begin: Callable[[Tensor], Any], finish: Callable[[Any], Tensor], continues: bool = False) -> Algorithm:
    """Makes an algorithm that runs by ``finish(begin(x))``."""
    return Algorithm(begin, finish, lambda x: finish(begin(x)), continues)


class Scratch:
    """Memory for received data, used repeatedly: fresh pages cost about as much as the message that fills them.

    It keeps one buffer, the largest that was given back.
    """

    def __init__(self) -> None:
        self._kept: Tensor | None = None
        self._taken = 0
        self._lock = threading.Lock()

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        """Returns a flat CPU tensor of at least ``count`` elements that nobody else uses."""
        nbytes = math.ceil(count * dtype.itemsize / 64) * 64  # so that it is whole in every dtype
        with self._lock:
            buffer, self._kept = self._kept, None
            self._taken += 1
        if buffer is None or buffer.numel() < nbytes:
            with torch.inference_mode(False):  # tensors made in inference mode could not be written outside
                buffer = torch.empty(nbytes, dtype=torch.uint8)
        return buffer.view(dtype)

    def give(self, buffer: Tensor) -> None:
        """Takes back a buffer from :meth:`take` that nothing uses any more."""
        buffer = buffer.view(torch.uint8)
        with self._lock:
            self._taken -= 1
            if is_kept(buffer.numel()) and (self._kept is None or self._kept.numel() < buffer.numel()):
                self._kept = buffer

    @property
    def is_taken(self) -> bool:
        """Tells whether some operation has memory of it. Others had then better wait than take more."""
        return self._taken > 0


class Messenger(Protocol):
    """Group that messages go through, as one rank uses it: a :class:`~shardwright.world.distributed.links.Link`."""

    size: int
    position: int
    group: Any
    scratch: Scratch

    def open(self) -> tuple[Callable[..., Any], Callable[..., Any], int]:
        """Returns the send and receive functions, and the first of two unused tags."""


class Reduction(NamedTuple):
    """Way in which contributions are combined.

    Args:
        op: ``sum``, ``max`` or ``min``.
        order: positions in the group, in the order in which their contributions are combined.
        dtype: of the contributions.
    """

    op: str
    order: tuple[int, ...]
    dtype: torch.dtype


def plain(x: Tensor) -> Tensor:
    """Returns the values of a tensor contiguous in memory; the tensor itself where it is so already."""
    if x.is_conj() or x.is_neg():
        x = x.resolve_conj().resolve_neg()
    return x.contiguous()


def _wait(works: Sequence[Any]) -> None:
    for work in works:
        work.wait()


def _arriving(parts: Sequence[tuple[Any, Tensor]]) -> Iterator[Tensor]:
    """Yields the contributions in order, each as soon as it has arrived; this rank's own has no work."""
    for work, part in parts:
        if work is not None:
            work.wait()
        yield part


def _others(link: Messenger) -> list[int]:
    """Lists the other members, beginning with the next. So not all send to the same one at first."""
    return [(link.position + k) % link.size for k in range(1, link.size)]


def _receive_into(
    link: Messenger, receive: Any, tag: int, memory: Tensor, own: Tensor, how: Reduction
) -> list[tuple[Any, Tensor]]:
    """Receives as much as ``own`` from each other member, one after the other into ``memory``.

    Returns:
        The contributions in the order of summation, with their works.
    """
    found: list[tuple[Any, Tensor]] = []
    count, start = own.numel(), 0
    for member in how.order:
        if member == link.position:
            found.append((None, own))
        else:
            buffer = memory[start : start + count]
            found.append((receive([buffer], member, tag), buffer))
            start += count
    return found


def _parts(count: int, dtype: torch.dtype, members: int) -> list[int]:
    """Computes the sizes of the parts in which members send a piece of ``count`` elements; none where it is empty."""
    number = parts_of_piece(count * dtype.itemsize, members)
    return [size for size in _pieces(count, number) if size] if count else []


class _Incoming:
    """Receives the members' contributions to one piece, a few parts ahead, into reused scratch memory.

    So received data need little memory. Where another operation under way has scratch memory already, this one requests nothing
    before it is its turn to be ended: operations end in the order of their start, and then need that memory once.

    Args:
        own: this member's piece, cut into parts; none where it is empty.
    """

    def __init__(self, link: Messenger, receive: Any, tag: int, own: Sequence[Tensor], how: Reduction):
        self.link, self.receive, self.tag, self.own, self.how = link, receive, tag, own, how
        self.size = own[0].numel() if own else 0  # of the largest part
        self.memory: Tensor | None = None
        self.coming: list[list[tuple[Any, Tensor]]] = []
        if not link.scratch.is_taken:
            self._begin()

    def _begin(self) -> None:
        if self.own and self.memory is None:
            ahead = min(AHEAD, len(self.own))
            self.memory = self.link.scratch.take(ahead * (self.link.size - 1) * self.size, self.how.dtype)
            for _ in self.own[:AHEAD]:
                self._ask()

    def _ask(self) -> None:
        """Requests the next part, into the memory of a part that has been added."""
        assert self.memory is not None
        number = len(self.coming)
        own = self.own[number]
        start = number % AHEAD * (self.link.size - 1) * self.size
        self.coming.append(_receive_into(self.link, self.receive, self.tag, self.memory[start:], own, self.how))

    def combine(self, combine: Combine, outs: Sequence[Tensor]) -> Iterator[Tensor]:
        """Combines part after part into ``outs``, and yields each that is done."""
        self._begin()
        for number, out in enumerate(outs):
            combine(_arriving(self.coming[number]), out)
            self.coming[number] = []
            if len(self.coming) < len(self.own):
                self._ask()
            yield out
        if self.memory is not None:
            self.link.scratch.give(self.memory)


def _exhaust(parts: Iterator[Tensor]) -> None:
    """Combines the remaining parts; the memory is given back after the last one."""
    for _ in parts:
        pass


# -- all-reduce --------------------------------------------------------------------------------------------------------


# -- reduce-scatter ----------------------------------------------------------------------------------------------------


# -- all-gather --------------------------------------------------------------------------------------------------------


# -- exchange ----------------------------------------------------------------------------------------------------------


def _pieces(count: int, members: int) -> list[int]:
    """Computes the sizes of the pieces, in whole cache lines if there are enough; the last ones may be empty."""
    size = math.ceil(count / members)
    if size >= 1024:
        size = math.ceil(size / 64) * 64
    return [min(size, max(0, count - i * size)) for i in range(members)]
