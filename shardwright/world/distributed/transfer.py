"""Transfers between ranks by direct messages: sends every region straight to the ranks that need it.

A region that is contiguous in the sender's tensor is sent from there, and one that is contiguous in the receiver's result
is received there; only others are copied, once. A region that several ranks need is copied once for all of them, so that
sending needs no more memory than the tensor itself. Nothing is sent to ranks that need nothing.

Messages between two ranks arrive in the order in which they were sent, and every rank starts its transfers in the same
order, so that several may be under way at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from shardwright.world.distributed.links import Link
from shardwright.world.distributed.messages import plain
from shardwright.world.distributed.operations import Handle

# Of all transfers: ranks that have no part in one would not know how many there were.
_TAG = 1 << 23

Bounds = tuple[tuple[int, int], ...]
Shape = tuple[int, ...]
Cut = Callable[[Tensor], Tensor]
Route = tuple[int, int, Bounds]


class Transfer:
    """Prepared transfer: the regions that one rank sends, keeps and receives.

    Args:
        link: all ranks of the job.
        routes: ``(from rank, to rank, region)`` of all ranks, or at least of those that involve this rank.
        have: bounds of what it holds, ``None`` for nothing: then its argument is an empty tensor.
        want: bounds of what it is to hold, ``None`` for nothing: then its result is an empty tensor.
        tag: of its messages; those with the same tag arrive in the order in which they are sent.
    """

    def __init__(self, link: Link, routes: Sequence[Route], have: Bounds | None, want: Bounds | None, tag: int = _TAG):
        self.link, self.tag, rank = link, tag, link.position
        self.shape: Shape = (0,) if want is None else tuple(b - a for a, b in want)
        sends: dict[Bounds, list[int]] = {}
        self.kept: list[tuple[Cut, Cut]] = []
        self.receives: list[tuple[int, Cut, Shape, bool]] = []
        # each rank starts with its successor, so that not all send to the same one at once
        for source, target, region in sorted(routes, key=lambda r: ((r[1] - r[0]) % link.size, r[0], r[2])):
            if source == rank and target == rank:
                self.kept.append((cutter(region, have), cutter(region, want)))
            elif source == rank:
                sends.setdefault(region, []).append(target)
            elif target == rank:
                extent = tuple(b - a for a, b in region)
                self.receives.append((source, cutter(region, want), extent, is_contiguous(region, want)))
        self.sends = [(cutter(region, have), to) for region, to in sends.items()]

    def __call__(self, x: Tensor) -> Tensor:
        return self._finish(self._begin(x))

    def start(self, x: Tensor) -> Handle:
        """Starts sending and receiving. ``x`` must not change before the end."""
        return Handle(self._finish, self._begin(x))

    def _begin(self, x: Tensor) -> Any:
        send, receive = self.link.group.send, self.link.group.recv
        out = x.new_empty(self.shape)
        sending: list[tuple[Any, Tensor]] = []
        for cut, targets in self.sends:
            region = plain(cut(x))
            sending += [(send([region], target, self.tag), region) for target in targets]
        receiving: list[tuple[Any, Cut, Tensor | None]] = []
        for source, place, extent, direct in self.receives:
            buffer = place(out) if direct else x.new_empty(extent)
            receiving.append((receive([buffer], source, self.tag), place, None if direct else buffer))
        for cut, place in self.kept:
            place(out).copy_(cut(x))
        return out, receiving, sending

    @staticmethod
    def _finish(state: Any) -> Tensor:
        out, receiving, sending = state
        for work, place, buffer in receiving:
            work.wait()
            if buffer is not None:
                place(out).copy_(buffer)
        for work, _ in sending:
            work.wait()
        return out  # type: ignore[no-any-return]


def is_contiguous(region: Bounds, holder: Bounds | None) -> bool:
    """Tells whether a region of a contiguous piece is contiguous itself."""
    assert holder is not None
    inner_is_whole = True
    for (a, b), (c, d) in reversed(list(zip(region, holder, strict=True))):
        if not inner_is_whole and b - a > 1:
            return False
        inner_is_whole = inner_is_whole and (a, b) == (c, d)
    return True


def cutter(region: Bounds, holder: Bounds | None) -> Cut:
    """Makes a function that cuts ``region`` out of a piece with bounds ``holder``."""
    assert holder is not None
    cuts = [(d, a - c, b - a) for d, ((a, b), (c, e)) in enumerate(zip(region, holder, strict=True)) if (a, b) != (c, e)]
    if not cuts:
        return lambda x: x
    if len(cuts) == 1:
        dim, start, length = cuts[0]
        return lambda x: x.narrow(dim, start, length)
    index = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(region, holder, strict=True))
    return lambda x: x[index]


def count(region: Bounds) -> int:
    """Counts the elements of a region."""
    return math.prod(b - a for a, b in region)
