"""Paths: lists the sequences of collectives for many redistributions at the same time.

These are the sequences of :mod:`shardwright.redistribute.planner`, in closed form for even pieces: what shrinks the tensor
first (slices, reduce-scatters). Sums that are left are reduced together, fast links first, or shared by ranks that would all
do the same. Then at most one transfer, with or without the gathers in it, then the gathers that remain: together, a dim or
an axis at a time. Steps cost what :mod:`shardwright.redistribute.links` says; that module names the sources.

Axes are bits of a mask, the outermost axis, which has the slowest links, the lowest bit. Bytes are shares of the whole
tensor's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

KINDS = ("slice", "all_gather", "reduce_scatter", "all_reduce", "all_to_all", "permute", "exchange")
_GATHER, _SCATTER, _REDUCE, _ALL_TO_ALL, _PERMUTE, _EXCHANGE = range(1, 7)

# Largest size in between, relative to the larger end, as in the planner.
_SLACK = 1.05


class Network:
    """Costs of each set of axes: ranks, rounds to reach them all, and the worst latency and bandwidth."""

    def __init__(self, launch: float, sizes: Sequence[int], speeds: Sequence[tuple[float, float]]):
        masks = range(1 << len(sizes))
        of = [[a for a in range(len(sizes)) if mask >> a & 1] for mask in masks]
        self.launch, self.axes = launch, len(sizes)
        self.count = np.array([np.prod([float(sizes[a]) for a in axes]) for axes in of])
        self.rounds = np.array([float((int(n) - 1).bit_length()) for n in self.count])
        self.latency = np.array([max([speeds[a][0] for a in axes], default=0.0) for axes in of])
        self.second = np.array([1 / min([speeds[a][1] for a in axes], default=np.inf) for axes in of])  # seconds per byte
        self.span = np.array([(1 << mask.bit_length()) - 1 for mask in masks])  # all axes up to the last of the set
        self.last = np.array([(self.span[mask] + 1) >> 1 for mask in masks])
        self.members = np.array([len(axes) for axes in of])
        self.everything = sum(1 << a for a in range(len(sizes)) if sizes[a] > 1)


@dataclass
class PathStep:
    """One step per path. All is 0 for paths without that step.

    Args:
        kind: index into ``KINDS``.
        mask: the axes it runs over.
        fixed: seconds, whatever the bytes.
        rate: seconds per byte of the whole tensor.
        sent: share of the whole tensor that is sent.
    """

    kind: Array
    mask: Array
    fixed: Array
    rate: Array
    sent: Array

    @property
    def of_source(self) -> Array:
        """True where its bytes are those of the source's pieces instead of the target's."""
        return (self.kind == _SCATTER) | (self.kind == _REDUCE)

    def take(self, rows: Array) -> PathStep:
        return PathStep(self.kind[rows], self.mask[rows], self.fixed[rows], self.rate[rows], self.sent[rows])


@dataclass
class Paths:
    """Many paths: for each, its pair, the axes that split each dim now and in the end, and its steps.

    The last dim is no real one: spare axes that share work split it. ``now`` and ``target`` are ``(R, D)`` masks.
    """

    pair: Array
    now: Array
    target: Array
    pending: Array
    kept: Array
    largest: Array
    steps: tuple[PathStep, ...] = ()

    def __len__(self) -> int:
        return len(self.pair)

    def take(self, rows: Array) -> Paths:
        return Paths(
            self.pair[rows], self.now[rows], self.target[rows], self.pending[rows], self.kept[rows], self.largest[rows],
            tuple(step.take(rows) for step in self.steps),
        )  # fmt: skip

    def then(self, kind: Array | int, mask: Array, fixed: Array, rate: Array, sent: Array) -> Paths:
        """Appends a step to the paths where the mask is not empty.

        Args:
            kind: index into ``KINDS``.
            mask, fixed, rate, sent: see :class:`PathStep`; one entry per path.
        """
        used = mask != 0
        step = PathStep(np.broadcast_to(kind, mask.shape), mask, fixed * used, rate * used, sent * used)
        return replace(self, steps=(*self.steps, step))

    def without(self, bad: Array) -> Paths:
        return self.take(~bad) if bad.any() else self

    def split(self) -> Array:
        """Returns all axes that split something now."""
        return np.bitwise_or.reduce(self.now, axis=1)

    def totals(self) -> tuple[Array, Array, Array, Array]:
        """Sums over all steps: fixed seconds, seconds per byte of the source's and the target's pieces, and the share sent."""
        none = np.zeros(len(self))
        fixed = sum((s.fixed for s in self.steps), none)
        source = sum((s.rate * s.of_source for s in self.steps), none)
        target = sum((s.rate for s in self.steps), none) - source
        return fixed, source, target, sum((s.sent for s in self.steps), none)


def together(groups: Sequence[Paths]) -> Paths:
    """Joins the paths of some groups. Those with fewer steps get empty ones."""
    groups = [group for group in groups if len(group)] or list(groups[:1])
    if len(groups) == 1:
        return groups[0]
    longest = max(len(group.steps) for group in groups)
    columns = []
    for group in groups:
        none = np.zeros(len(group))
        nothing = PathStep(none.astype(np.int64), none.astype(np.int64), none, none, none)
        columns.append((*group.steps, *(nothing,) * (longest - len(group.steps))))
    names = ("kind", "mask", "fixed", "rate", "sent")
    steps = tuple(PathStep(*(np.concatenate([getattr(s, n) for s in at]) for n in names)) for at in zip(*columns))
    pair, now, target, pending, kept, largest = (
        np.concatenate([getattr(group, name) for group in groups])
        for name in ("pair", "now", "target", "pending", "kept", "largest")
    )
    return Paths(pair, now, target, pending, kept, largest, steps)


def paths_between(net: Network, before: Array, after: Array, pending: Array, kept: Array) -> Iterator[Paths]:
    """Yields all paths that may be the cheapest, in some groups.

    Args:
        net: the costs of sets of axes.
        before, after: ``(P, D)``, axes that split each dim.
        pending: ``(P,)``, axes with pending sums before.
        kept: ``(P,)``, axes with pending sums after too.
    """
    spare = np.zeros((len(pending), 1), dtype=before.dtype)
    now, target = np.concatenate([before, spare], axis=1), np.concatenate([after, spare], axis=1)
    kept = kept & pending
    ends = [1 / net.count[np.bitwise_or.reduce(masks, axis=1)] for masks in (now, target)]
    start = Paths(np.arange(len(pending)), now, target, pending & ~kept, kept, np.maximum(*ends))
    sums = start.pending != 0
    plain = start.take(np.flatnonzero(~sums))
    if len(plain):
        yield from _arrive(net, _shrink(net, plain), may_move_more=False)
    if sums.any():
        yield from _with_sums(net, start.take(np.flatnonzero(sums)))


def _with_sums(net: Network, start: Paths) -> Iterator[Paths]:
    sliced = _shrink(net, start, slices_only=True)
    scattered = _shrink(net, start)
    differs = (scattered.pending != start.pending) | (scattered.now != sliced.now).any(axis=1)
    starts = together([sliced, scattered.take(np.flatnonzero(differs)), _shared(net, sliced)])
    reduced = together(list(_reduce(net, starts)))
    yield from _arrive(net, _shrink(net, reduced), may_move_more=True)
    yield from _moved_first(net, sliced)


# -- what shrinks ---------------------------------------------------------------------------------------------------------


def _low(mask: Array) -> Array:
    """Returns all bits below the lowest one; all bits for an empty mask."""
    return (mask & -mask) - 1  # type: ignore[no-any-return]


def _shrink(net: Network, paths: Paths, slices_only: bool = False) -> Paths:
    """Slices dims by replicated axes and reduce-scatters them by pending ones.

    It goes as far as the target's axes continue these.
    """
    now, target = paths.now, paths.target
    busy = (paths.split() | paths.kept)[:, None]
    pending = paths.pending[:, None]
    entering = np.where((target & net.span[now]) == now, target & ~now, 0)
    sliced = entering & _low(entering & (busy | pending))
    paths = replace(paths, now=now | sliced)
    scattered = entering & _low(entering & busy) & ~sliced
    if slices_only or not (scattered & pending).any():
        return paths
    held = 1 / net.count[paths.split()]
    # the fast links first, while the tensor is large
    order = np.argsort(net.second[scattered & pending], axis=1, kind="stable")
    rows = np.arange(len(paths))
    for dim in order.T[(scattered[rows, order.T] != 0).any(axis=1)]:
        mask = scattered[rows, dim] & paths.pending
        paths, held = _scatter(net, paths, mask, held)
        held = held / net.count[scattered[rows, dim] & ~mask]
    return replace(paths, now=paths.now | scattered, pending=paths.pending & ~np.bitwise_or.reduce(scattered, axis=1))


def _scatter(net: Network, paths: Paths, mask: Array, held: Array) -> tuple[Paths, Array]:
    n = net.count[mask]
    sent = held * (n - 1) / n
    fixed = net.launch + net.rounds[mask] * net.latency[mask]
    return paths.then(_SCATTER, mask, fixed, sent * net.second[mask], sent), held / n


def _shared(net: Network, paths: Paths) -> Paths:
    """Slices first, so that ranks that hold the same sums reduce different parts."""
    spare = net.everything & ~(paths.split() | paths.pending | paths.kept)
    now = paths.now.copy()
    now[:, -1] |= spare
    return replace(paths, now=now).take(np.flatnonzero(spare))


# -- sums -----------------------------------------------------------------------------------------------------------------


def _reduce(net: Network, paths: Paths) -> Iterator[Paths]:
    """Reduces the sums that are left."""
    finished = paths.take(np.flatnonzero(paths.pending == 0))
    if len(finished):
        yield finished
    paths = paths.take(np.flatnonzero(paths.pending))
    if not len(paths):
        return
    yield from _all_reduce(net, paths)
    yield _to_spare(net, paths, paths.pending)
    several = paths.take(np.flatnonzero(net.members[paths.pending] > 1))
    if len(several):
        # the fast links first, while the tensor is large
        fast = _to_spare(net, several, net.last[several.pending])
        yield from _all_reduce(net, fast)
        yield _to_spare(net, fast, fast.pending)


def _all_reduce(net: Network, paths: Paths) -> Iterator[Paths]:
    """Reduces whole tensors by doubling, in few rounds; or by a reduce-scatter and a gather."""
    mask, held = paths.pending, 1 / net.count[paths.split()]
    n, rounds, latency, second = net.count[mask], net.rounds[mask], net.latency[mask], net.second[mask]
    sent = held * 2 * (n - 1) / n
    done = replace(paths, pending=paths.pending & 0)
    yield done.then(_REDUCE, mask, net.launch + rounds * latency, rounds * held * second, sent)
    yield done.then(_REDUCE, mask, net.launch + 2 * rounds * latency, sent * second, sent)


def _to_spare(net: Network, paths: Paths, mask: Array) -> Paths:
    """Reduce-scatters over a dim that the target does not split by these axes."""
    paths, _ = _scatter(net, paths, mask, 1 / net.count[paths.split()])
    now = paths.now.copy()
    now[:, -1] |= mask
    return replace(paths, now=now, pending=paths.pending & ~mask)


def _moved_first(net: Network, paths: Paths) -> Iterator[Paths]:
    """Moves the parts to where the target has them, then reduce-scatters straight into it."""
    between = paths.target & _low(paths.target & paths.pending[:, None])
    rows = np.flatnonzero((between != paths.now).any(axis=1))
    if not len(rows):
        return
    paths, between = paths.take(rows), between[rows]
    target = paths.target
    moved = list(_arrive(net, replace(paths, target=between), may_move_more=True))
    if moved:
        all_moved = together(moved)
        back = replace(all_moved, target=target[np.searchsorted(paths.pair, all_moved.pair)])
        reduced = together(list(_reduce(net, _shrink(net, back))))
        yield from _arrive(net, _shrink(net, reduced), may_move_more=True)


# -- transfers and gathers ------------------------------------------------------------------------------------------------


def _arrive(net: Network, paths: Paths, may_move_more: bool) -> Iterator[Paths]:
    """Adds at most one transfer, then gathers. Paths differ in which of the gathers the transfer does too."""
    paths = paths.without(1 / net.count[paths.split()] > _SLACK * paths.largest)
    if not len(paths):
        return
    refined = ((paths.now & net.span[paths.target]) == paths.target).all(axis=1)
    gathers = paths.take(np.flatnonzero(refined))
    if len(gathers):
        yield from _gather(net, gathers, gathers.now & ~gathers.target)
    paths = paths.take(np.flatnonzero(~refined))
    left = paths.split() & ~np.bitwise_or.reduce(paths.target, axis=1)
    while len(paths):
        later = paths.now & left[:, None]
        moved, valid = _transfer(net, paths, later)
        rows = np.arange(len(paths)) if may_move_more else np.flatnonzero(valid)
        if len(rows):
            yield from _gather(net, moved.take(rows), later[rows])
        again = np.flatnonzero(left)
        paths, left = paths.take(again), left[again]
        left = left & (left - 1)  # the transfer takes over the gathers with the slowest links first


def _transfer(net: Network, paths: Paths, later: Array) -> tuple[Paths, Array]:
    """Adds a transfer to the target. Dims stay split at their end by the axes that are gathered ``later``.

    Returns the paths and whether each moves no more than must be moved.
    """
    now, target = paths.now, paths.target
    after = target | later
    goes_on = ((now & net.span[after]) == after) & ((later & net.span[target]) == 0)  # its pieces consist of the pieces now
    aligned = goes_on | ((later == 0) & ((target & net.span[now]) == now))
    arriving = np.bitwise_or.reduce(after, axis=1)
    # where pieces do not nest, some rank has nothing of its target piece
    kept = np.where(aligned.all(axis=1), 1 / np.multiply.reduce(net.count[now & ~after], axis=1), 0.0)
    lacked = (1 - kept) / net.count[arriving]
    moving = _moving(net, now, target, later)
    permutes = (net.count[now] == net.count[after]).all(axis=1)
    messages = np.where(permutes, 1.0, np.maximum(1.0, net.count[moving] - 1))
    kind = np.where(permutes, _PERMUTE, np.where(aligned.all(axis=1), _ALL_TO_ALL, _EXCHANGE))
    mask = np.asarray(np.where(moving, moving, arriving))
    fixed = net.launch + messages * net.latency[moving]
    result = replace(paths, now=after).then(kind, mask, fixed, lacked * net.second[moving], lacked)
    # a rank keeps its part of the target piece where the pieces to be gathered stay in the same places, too
    staying = now & ~later
    swapped = ((later & net.span[staying]) == 0) & (net.count[staying] == net.count[target])
    return result, (goes_on | swapped | (later == 0)).all(axis=1)


def _moving(net: Network, now: Array, target: Array, later: Array) -> Array:
    """Returns the axes along which pieces move: those that change their place among the axes of their dim."""
    rest = now & ~target
    common = np.where((now & net.span[target]) == target, target | (rest & _low(rest ^ later)), now & _low(now ^ target))
    return np.asarray(np.bitwise_or.reduce(now & ~common, axis=1))


def _gather(net: Network, paths: Paths, later: Array) -> Iterator[Paths]:
    """Yields the remaining gathers, the slowest first: all together, dim by dim, or axis by axis from the end of a dim."""
    mask = np.bitwise_or.reduce(later, axis=1)
    arrived = replace(paths, now=paths.target)
    held = 1 / net.count[paths.split()]
    yield _gathered(net, arrived, mask, held)[0]
    several = np.flatnonzero(net.members[mask] > 1)
    if not len(several):
        return
    paths, later, held = arrived.take(several), later[several], held[several]
    by_dim = np.flatnonzero((later != 0).sum(axis=1) > 1)
    if len(by_dim):
        at, share, masks = paths.take(by_dim), held[by_dim], later[by_dim]
        order = np.argsort(-net.second[masks], axis=1, kind="stable")
        rows = np.arange(len(at))
        for dim in order.T[(masks[rows, order.T] != 0).any(axis=1)]:
            at, share = _gathered(net, at, masks[rows, dim], share)
        yield at
    none = 1 << net.axes
    while later.any():
        ends = net.last[later]
        chosen = np.where(ends == 0, none, ends).min(axis=1) & (none - 1)
        paths, held = _gathered(net, paths, chosen, held)
        later = later & ~chosen[:, None]
    yield paths


def _gathered(net: Network, paths: Paths, mask: Array, held: Array) -> tuple[Paths, Array]:
    after = held * net.count[mask]
    received = after - held
    fixed = net.launch + net.rounds[mask] * net.latency[mask]
    return paths.then(_GATHER, mask, fixed, received * net.second[mask], received), after
