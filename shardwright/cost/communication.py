"""Communication: what redistributions cost, in closed form, for whole tables of layouts at once.

A redistribution is priced as the steps that the planner of :mod:`shardwright.redistribute` would take: slices first, for
they cost nothing and make the rest smaller, then reduce-scatters, all-reduces and all-to-alls, gathers last; each on what
a rank then holds. Along several axes a collective is hierarchical: gathers cross the slow links first, with small pieces,
reduce-scatters last. The model of one step is Hockney's with the launch apart, as in :mod:`shardwright.redistribute.links`.

Layouts are codes, one int an axis: -2 a sum is pending, -1 replicated, ``d >= 0`` the axis splits dim ``d``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardwright.cost.machine import Machine
from shardwright.mesh import Mesh

Array = np.ndarray[Any, Any]

KINDS = ("reduce_scatter", "all_reduce", "all_to_all", "exchange", "all_gather")


@dataclass(frozen=True)
class Moves:
    """Seconds and bytes of redistributions, ``(S, T)``; bytes are what the busiest rank sends."""

    seconds: Array
    bytes: Array


@dataclass(frozen=True)
class CollectivePrice:
    """One collective: its kind, the axes it runs over, the bytes the busiest rank sends, and seconds."""

    kind: str
    axes: tuple[str, ...]
    bytes: float
    seconds: float

    def __str__(self) -> str:
        return f"{self.kind}({','.join(self.axes)})"


class Communication:
    """Prices on one machine and mesh.

    >>> from shardwright.cost.machine import load_machine
    >>> prices = Communication(load_machine("h100"), Mesh(("dp", "tp"), (4, 8)))
    >>> split, whole = np.array([[0, -1]]), np.array([[-1, -1]])
    >>> float(prices.moves((64, 32), 4, split, whole).bytes[0, 0])
    6144.0
    """

    def __init__(self, machine: Machine, mesh: Mesh):
        self.mesh, self.launch = mesh, machine.collective_launch
        self.sizes = mesh.sizes
        self.speeds = machine.axis_speeds(mesh)
        # the slowest links first; among equal ones the outermost axis
        self.slow_first = sorted(range(len(mesh.sizes)), key=lambda a: (self.speeds[a][1], a))

    def moves(self, shape: Sequence[int], itemsize: int, source: Array, target: Array) -> Moves:
        """Every redistribution from a source code ``(S, A)`` to a target code ``(T, A)`` of a tensor of global shape.

        A pair that would make a sum pending that is not costs infinitely much.
        """
        source, target = np.asarray(source), np.asarray(target)
        steps = _Steps(self, shape, itemsize, source[:, None, :], target[None, :, :])
        seconds = sum((s for s, _ in steps.found.values()), np.zeros(steps.shape))
        sent = sum((b for _, b in steps.found.values()), np.zeros(steps.shape))
        invented = ((source[:, None, :] != -2) & (target[None, :, :] == -2)).any(axis=-1)
        return Moves(np.where(invented, np.inf, seconds), sent)

    def describe(
        self, shape: Sequence[int], itemsize: int, source: Sequence[int], target: Sequence[int]
    ) -> tuple[CollectivePrice, ...]:
        """The collectives of one redistribution, in order."""
        here, there = np.asarray(source)[None, None, :], np.asarray(target)[None, None, :]
        steps = _Steps(self, shape, itemsize, here, there)
        result = []
        for kind in KINDS:
            if kind in steps.found and steps.found[kind][0][0, 0] > 0:
                seconds, sent = steps.found[kind]
                axes = tuple(self.mesh.axes[a] for a in range(len(self.sizes)) if steps.axes[kind][a][0, 0])
                result.append(CollectivePrice(kind, axes, float(sent[0, 0]), float(seconds[0, 0])))
        return tuple(result)

    def all_reduce(self, nbytes: float, axes: Sequence[int]) -> float:
        """Seconds to sum a tensor of ``nbytes`` that every rank holds whole, over axes given by position."""
        code, whole = np.full((1, len(self.sizes)), -1), np.full((1, len(self.sizes)), -1)
        code[0, list(axes)] = -2
        return float(self.moves((max(1, math.ceil(nbytes)),), 1, code, whole).seconds[0, 0])


class _Steps:
    """The steps of many pairs side by side: seconds and bytes of each kind, and the axes it runs over."""

    def __init__(self, prices: Communication, shape: Sequence[int], itemsize: int, source: Array, target: Array):
        self.prices, self.source, self.target = prices, source, target
        self.shape = np.broadcast_shapes(source.shape[:-1], target.shape[:-1])
        self.held = np.broadcast_to(_local(source, shape, prices.sizes) * float(itemsize), self.shape)
        self.found: dict[str, tuple[Array, Array]] = {}
        self.axes: dict[str, list[Array]] = {}
        axes = range(len(prices.sizes))
        self.now = [np.broadcast_to(source[..., a], self.shape) for a in axes]
        self.then = [np.broadcast_to(target[..., a], self.shape) for a in axes]
        self.misplaced = self._misplaced()
        for a in axes:
            free = (self.now[a] == -1) & (self.then[a] >= 0)
            self._shrink(free, prices.sizes[a])
        self._reduce_scatter()
        self._all_reduce()
        self._all_to_all()
        self._exchange()
        self._all_gather()

    def _shrink(self, where: Array, ways: int) -> None:
        if where.any():
            self.held = np.where(where, self.held / ways, self.held)

    def _record(self, kind: str, masks: list[Array], seconds: Array, sent: Array) -> None:
        used = np.logical_or.reduce(masks)
        if used.any():
            self.found[kind] = (np.where(used, seconds + self.prices.launch, 0.0), np.where(used, sent, 0.0))
            self.axes[kind] = masks

    def _masks(self, now: Any, then: Any) -> list[Array]:
        return [now(n) & then(t) & (size > 1) for n, t, size in zip(self.now, self.then, self.prices.sizes)]

    def _reduce_scatter(self) -> None:
        masks = self._masks(lambda n: n == -2, lambda t: t >= 0)
        seconds, sent = np.zeros(self.shape), np.zeros(self.shape)
        for a in reversed(self.prices.slow_first):
            if masks[a].any():
                n, (latency, bandwidth) = self.prices.sizes[a], self.prices.speeds[a]
                moved = np.where(masks[a], self.held * ((n - 1) / n), 0.0)
                sent += moved
                seconds += moved / bandwidth + np.where(masks[a], _rounds(n) * latency, 0.0)
                self._shrink(masks[a], n)
        self._record("reduce_scatter", masks, seconds, sent)

    def _all_reduce(self) -> None:
        """A reduce-scatter and a gather, or, for few bytes, whole tensors in half the rounds."""
        masks = self._masks(lambda n: n == -2, lambda t: t == -1)
        halves, whole, sent = np.zeros(self.shape), np.zeros(self.shape), np.zeros(self.shape)
        piece = self.held
        for a in reversed(self.prices.slow_first):
            if masks[a].any():
                n, (latency, bandwidth) = self.prices.sizes[a], self.prices.speeds[a]
                moved = np.where(masks[a], piece * (2 * (n - 1) / n), 0.0)
                sent += moved
                halves += moved / bandwidth + np.where(masks[a], 2 * _rounds(n) * latency, 0.0)
                whole += np.where(masks[a], _rounds(n) * (latency + self.held / bandwidth), 0.0)
                piece = np.where(masks[a], piece / n, piece)
        self._record("all_reduce", masks, np.minimum(halves, whole), sent)

    def _all_to_all(self) -> None:
        masks = [
            (n >= 0) & (t >= 0) & (n != t) & (size > 1) for n, t, size in zip(self.now, self.then, self.prices.sizes)
        ]  # fmt: skip
        seconds, sent = np.zeros(self.shape), np.zeros(self.shape)
        for a, mask in enumerate(masks):
            if mask.any():
                n, (latency, bandwidth) = self.prices.sizes[a], self.prices.speeds[a]
                moved = np.where(mask, self.held * ((n - 1) / n), 0.0)
                sent += moved
                seconds += moved / bandwidth + np.where(mask, (n - 1) * latency, 0.0)
        self._record("all_to_all", masks, seconds, sent)

    def _misplaced(self) -> list[tuple[Array, int]]:
        """Where an axis comes to, or leaves, a dim above one that stays on it: all its pieces are then others.

        For each axis, the pairs, and how many ranks then exchange pieces.
        """
        count, sizes = len(self.now), self.prices.sizes
        result = []
        for a in range(count):
            moved, ranks = np.zeros(self.shape, dtype=bool), sizes[a]
            changes = (self.now[a] != self.then[a]) & (sizes[a] > 1)
            for b in range(a + 1, count):
                if sizes[b] > 1 and changes.any():
                    stays = (self.now[b] == self.then[b]) & (self.now[b] >= 0)
                    here = changes & stays & ((self.then[a] == self.then[b]) | (self.now[a] == self.now[b]))
                    if here.any():
                        moved, ranks = moved | here, ranks * sizes[b]
            result.append((moved, ranks))
        return result

    def _exchange(self) -> None:
        """Every rank's piece is another: it is fetched from whoever has it. Gathers and all-to-alls do so on their way."""
        seconds, sent = np.zeros(self.shape), np.zeros(self.shape)
        for a, (mask, ranks) in enumerate(self.misplaced):
            if mask.any():
                latency, bandwidth = self.prices.speeds[a]
                alone = mask & (self.now[a] < 0)
                lacked = np.where(alone, self.held, 0.0)
                sent += lacked
                messages = np.where(self.now[a] == -2, 1, ranks - 1)
                seconds += lacked / bandwidth + np.where(mask, messages * latency, 0.0)
        self._record("exchange", [mask for mask, _ in self.misplaced], seconds, sent)

    def _all_gather(self) -> None:
        masks = self._masks(lambda n: n >= 0, lambda t: t == -1)
        seconds, sent = np.zeros(self.shape), np.zeros(self.shape)
        held = self.held
        for a in self.prices.slow_first:
            if masks[a].any():
                n, (latency, bandwidth) = self.prices.sizes[a], self.prices.speeds[a]
                moved = np.where(masks[a], held * (n - 1), 0.0)
                sent += moved
                seconds += moved / bandwidth + np.where(masks[a], _rounds(n) * latency, 0.0)
                held = np.where(masks[a], held * n, held)
        self._record("all_gather", masks, seconds, sent)


def _rounds(n: int) -> int:
    return (n - 1).bit_length()


def _local(codes: Array, shape: Sequence[int], sizes: Sequence[int]) -> Array:
    """Elements of the largest piece."""
    total = np.ones(codes.shape[:-1])
    counts = np.asarray(sizes, dtype=float)
    for dim, size in enumerate(shape):
        total = total * np.ceil(size / np.where(codes == dim, counts, 1.0).prod(axis=-1))
    return total
