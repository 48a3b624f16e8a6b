"""Communication: prices redistributions, in closed form, for whole tables of layouts.

A redistribution is priced as the steps that the planner of :mod:`shardwright.redistribute` would take (``paths.py``). Their
price is the lowest of a few straight lines over the bytes of the tensor: the lines follow from which axes
split what before and after, not from the tensor's shape. They are found once for every pair of layouts that differs in more
than the names of dims; after that a table of prices is looked up. Nothing here grows with the number of ranks.

Layouts are codes, one int per axis: -2 a sum is pending, -1 replicated, ``d >= 0`` the axis splits dim ``d``; axes that split
one dim do so in the mesh's order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from shardwright.ir.machine import Machine
from shardwright.ir.mesh import Mesh
from shardwright.redistribute.paths import KINDS, Network, Paths, paths_between

Array = np.ndarray[Any, Any]
# Result for tables of pairs: rows of lines, the row of each pair, and which pairs are impossible.
Classes = tuple[Array, Array, "Array | None"]

# Sizes, in bytes, at which the lowest line is searched; a line that is lowest only between two of them is hardly lower.
_GRID = 2.0 ** np.arange(4, 46, 3)
# Sizes of caches: pairs of tables with known classes, and single pairs with known steps.
_MOST_TABLES = 512


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


@dataclass
class _Lines:
    """Cheapest lines of each class of redistributions, ``(N, K)``.

    Seconds are ``fixed + bytes * (source * unevenness of the source + target * that of the target)``, where ``bytes`` are those
    of the whole tensor, and the busiest rank sends ``bytes`` times ``sent``.
    """

    fixed: Array
    source: Array
    target: Array
    sent: Array

    def lowest(self, rows: Array, nbytes: float) -> tuple[Array, Array, Array, Array]:
        """Returns the numbers of the lowest lines for a tensor of so many bytes."""
        fixed, source, target = self.fixed[rows], self.source[rows], self.target[rows]
        best = np.argmin(fixed + nbytes * (source + target), axis=1)
        at = np.arange(len(rows)), best
        return fixed[at], source[at], target[at], self.sent[rows][at]


class _Step(NamedTuple):
    """One step for a tensor of any size. Numbers are as in :class:`~shardwright.redistribute.paths.PathStep`."""

    kind: str
    axes: tuple[str, ...]
    fixed: float
    rate: float
    sent: float
    of_source: bool


class Communication:
    """Prices on one machine and mesh.

    >>> from shardwright.cost.machine_files import load_machine
    >>> prices = Communication(load_machine("h100"), Mesh(("dp", "tp"), (4, 8)))
    >>> split, whole = np.array([[0, -1]]), np.array([[-1, -1]])
    >>> float(prices.moves((64, 32), 4, split, whole).bytes[0, 0])
    6144.0
    >>> [str(step) for step in prices.describe((64, 32), 4, (0, 1), (1, -1))]
    ['exchange(dp,tp)']
    """

    def __init__(self, machine: Machine, mesh: Mesh):
        self.mesh = mesh
        self._network = Network(machine.collective_launch, mesh.sizes, machine.axis_speeds(mesh))
        self._row_of: dict[int, int] = {}
        self._lines: _Lines | None = None
        self._described: dict[tuple[bytes, bytes, int], tuple[tuple[_Step, ...], ...]] = {}
        self._tables: dict[tuple[bytes, bytes, int], Classes] = {}

    # -- redistributions --------------------------------------------------------------------------------------------

    def moves(self, shape: Sequence[int], itemsize: int, source: Array, target: Array) -> Moves:
        """Prices every redistribution from a source code ``(S, A)`` to a target code ``(T, A)``.

        A pair that would make a sum pending that is not costs infinitely much.

        Args:
            shape: global shape.
            itemsize: bytes per element.
            source, target: codes of layouts.
        """
        source, target = np.asarray(source, dtype=np.int8), np.asarray(target, dtype=np.int8)
        rows, where, invented = self._classes(len(shape), source, target)
        assert self._lines is not None
        nbytes = float(math.prod(shape) * itemsize)
        fixed, of_source, of_target, sent = self._lines.lowest(rows, nbytes)
        uneven_source, uneven_target = self._unevenness(shape, source), self._unevenness(shape, target)
        if uneven_source is None and uneven_target is None:
            seconds, moved = (fixed + nbytes * (of_source + of_target))[where], (nbytes * sent)[where]
        else:
            before = np.ones(len(source)) if uneven_source is None else uneven_source
            after = np.ones(len(target)) if uneven_target is None else uneven_target
            parts = (nbytes * of_source)[where] * before[:, None] + (nbytes * of_target)[where] * after[None, :]
            seconds = fixed[where] + parts
            moved = (nbytes * sent)[where] * np.maximum(before[:, None], after[None, :])
        if invented is not None:
            seconds, moved = np.where(invented, np.inf, seconds), np.where(invented, 0.0, moved)
        return Moves(seconds, moved)

    def describe(
        self, shape: Sequence[int], itemsize: int, source: Sequence[int], target: Sequence[int]
    ) -> tuple[CollectivePrice, ...]:
        """Lists the collectives of one redistribution, in order, without local slices. Prices add up to those of `moves`.

        Args:
            shape: global shape.
            itemsize: bytes per element.
            source, target: code of one layout each.
        """
        here, there = (np.asarray(codes, dtype=np.int8).reshape(1, -1) for codes in (source, target))
        nbytes = float(math.prod(shape) * itemsize)
        sequences = self._sequences(len(shape), here, there)
        if not sequences:
            return ()
        before, after = self._unevenness(shape, here), self._unevenness(shape, there)
        of_source, of_target = 1.0 if before is None else float(before[0]), 1.0 if after is None else float(after[0])
        chosen = min(sequences, key=lambda steps: sum(step.fixed + nbytes * step.rate for step in steps))
        found = []
        for step in chosen:
            seconds = step.fixed + nbytes * step.rate * (of_source if step.of_source else of_target)
            found.append(CollectivePrice(step.kind, step.axes, nbytes * step.sent * max(of_source, of_target), seconds))
        return tuple(found)

    def _sequences(self, ndim: int, source: Array, target: Array) -> tuple[tuple[_Step, ...], ...]:
        """Returns the sequences of steps of one pair that are the cheapest for some size; none if it costs nothing."""
        key = source.tobytes(), target.tobytes(), ndim
        if key not in self._described:
            if len(self._described) >= _MOST_TABLES:
                self._described.clear()
            found: list[tuple[Array, tuple[_Step, ...]]] = []
            for paths in paths_between(self._network, *self._masks(ndim, source, target)):
                fixed, of_source, of_target, _ = paths.totals()
                prices = fixed[:, None] + (of_source + of_target)[:, None] * _GRID
                found += [(price, self._steps(paths, row)) for row, price in enumerate(prices)]
            best = {int(at) for at in np.argmin([price for price, _ in found], axis=0)}
            self._described[key] = tuple(found[at][1] for at in sorted(best) if found[at][1])
        return self._described[key]

    def _steps(self, paths: Paths, row: int) -> tuple[_Step, ...]:
        found = []
        for step in paths.steps:
            if step.fixed[row] > 0 or step.rate[row] > 0:
                axes = tuple(name for a, name in enumerate(self.mesh.axes) if int(step.mask[row]) >> a & 1)
                numbers = float(step.fixed[row]), float(step.rate[row]), float(step.sent[row])
                found.append(_Step(KINDS[int(step.kind[row])], axes, *numbers, bool(step.of_source[row])))
        return tuple(found)

    # -- single collectives -----------------------------------------------------------------------------------------

    def all_reduce(self, nbytes: Any, axes: Sequence[int]) -> Any:
        """Prices the sum of tensors of ``nbytes``, over axes given by position, in seconds."""
        return self._collective(nbytes, axes, -2, -1)

    def all_gather(self, nbytes: Any, axes: Sequence[int]) -> Any:
        """Prices the gather of tensors that are ``nbytes`` after it, in seconds."""
        return self._collective(nbytes, axes, 0, -1)

    def reduce_scatter(self, nbytes: Any, axes: Sequence[int]) -> Any:
        """Prices the sum of tensors of ``nbytes``, in seconds. Every rank keeps its piece of it."""
        return self._collective(nbytes, axes, -2, 0)

    def _collective(self, nbytes: Any, axes: Sequence[int], before: int, after: int) -> Any:
        # the other axes count as split, so that they do not share the work
        source, target = (np.ones((1, len(self.mesh.sizes)), dtype=np.int8) for _ in range(2))
        source[0, list(axes)], target[0, list(axes)] = before, after
        rows, _, _ = self._classes(2, source, target)
        assert self._lines is not None
        rest = math.prod(size for a, size in enumerate(self.mesh.sizes) if a not in axes)
        given = np.asarray(nbytes, dtype=float)
        lines, row = self._lines, rows[0]
        # every rank holds such a tensor, so all ranks together hold `rest` times as much
        rate = (lines.source[row] + lines.target[row]) * rest
        seconds = np.min(lines.fixed[row] + given[..., None] * rate, axis=-1)
        return float(seconds) if seconds.ndim == 0 else seconds

    # -- classes of pairs -------------------------------------------------------------------------------------------

    def _classes(self, ndim: int, source: Array, target: Array) -> Classes:
        """Finds the classes of all pairs: their rows among the lines, the row of each pair, and which are impossible."""
        key = source.tobytes(), target.tobytes(), ndim
        found = self._tables.get(key)
        if found is None:
            if len(self._tables) >= _MOST_TABLES:
                self._tables.clear()
            found = self._tables[key] = self._classify(ndim, source, target)
        return found

    def _classify(self, ndim: int, source: Array, target: Array) -> Classes:
        before, after, pending, kept = self._masks(ndim, source, target)
        numbers = _random_numbers(len(self.mesh.sizes))
        ways = 1 << len(self.mesh.sizes)
        # dims in any order give the same hash; the pending sums have separate numbers
        pairs = pending[:, None] * ways + (kept[None, :] & pending[:, None]) + ways * ways
        hashed = numbers[pairs]
        for dim in range(ndim):
            hashed = hashed + numbers[before[:, None, dim] * ways + after[None, :, dim]]
        classes, first, where = np.unique(hashed.reshape(-1), return_index=True, return_inverse=True)
        self._price(classes, *np.divmod(first, len(target)), (before, after, pending, kept))
        rows = np.array([self._row_of[each] for each in classes.tolist()])
        invented = (kept[None, :] & ~pending[:, None]) != 0
        return rows, where.reshape(len(source), len(target)), invented if invented.any() else None

    def _price(self, classes: Array, of_source: Array, of_target: Array, masks: tuple[Array, ...]) -> None:
        """Computes the lines of the classes that are new."""
        fresh = np.array([each not in self._row_of for each in classes.tolist()], dtype=bool)
        if not fresh.any():
            return
        before, after, pending, kept = masks
        here, there = of_source[fresh], of_target[fresh]
        found = self._lines_between(before[here], after[there], pending[here], kept[there] & pending[here])
        start = len(self._row_of)
        self._row_of.update((each, start + i) for i, each in enumerate(classes[fresh].tolist()))
        if self._lines is not None:
            old = self._lines
            found = _Lines(
                *(np.concatenate([getattr(old, n), getattr(found, n)]) for n in ("fixed", "source", "target", "sent"))
            )
        self._lines = found

    def _lines_between(self, before: Array, after: Array, pending: Array, kept: Array) -> _Lines:
        count = len(pending)
        lowest = np.full((count, len(_GRID)), np.inf)
        lines = [np.full((count, len(_GRID)), fill) for fill in (np.inf, 0.0, 0.0, 0.0)]
        for paths in paths_between(self._network, before, after, pending, kept):
            totals = paths.totals()
            prices = totals[0][:, None] + (totals[1] + totals[2])[:, None] * _GRID
            np.minimum.at(lowest, paths.pair, prices)
            rows, columns = np.nonzero(prices == lowest[paths.pair])
            for line, total in zip(lines, totals):
                line[paths.pair[rows], columns] = total[rows]
        return _Lines(*lines)

    def _masks(self, ndim: int, source: Array, target: Array) -> tuple[Array, Array, Array, Array]:
        """Returns axes as bits, the outermost the lowest.

        They are those that split each dim before and after, that are pending, and stay so.
        """
        bits = np.array([1 << a if size > 1 else 0 for a, size in enumerate(self.mesh.sizes)], dtype=np.int64)
        dims = np.arange(ndim)[None, :, None]
        before, after = (((codes[:, None, :] == dims) * bits).sum(axis=-1) for codes in (source, target))
        pending, kept = (((codes == -2) * bits).sum(axis=-1) for codes in (source, target))
        return before, after, pending, kept

    def _unevenness(self, shape: Sequence[int], codes: Array) -> Array | None:
        """Computes how many times larger the largest piece is than an even one. None if all are even."""
        sizes = np.asarray(self.mesh.sizes, dtype=float)
        result = None
        for dim, size in enumerate(shape):
            ways = np.where(codes == dim, sizes, 1.0).prod(axis=1)
            pieces = size / ways
            rounded = np.ceil(pieces)
            if size and (rounded != pieces).any():
                result = rounded / pieces * (1.0 if result is None else result)
        return result


@lru_cache(maxsize=16)
def _random_numbers(axes: int) -> Array:
    """Returns a random number per mask before and after, 0 for none. As many for the pending sums follow."""
    numbers = np.random.default_rng(axes).integers(1, 1 << 63, size=2 << (2 * axes), dtype=np.uint64)
    numbers[0] = 0
    return numbers
