"""Bucket elimination: an exact minimum over many variables, one variable at a time.

Invariant: the minimum of the sum of the factors is the same before and after each step. What was eliminated is read
back in the opposite order, from slices of the factors, so no table of arguments is kept.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod

import numpy as np

from shardwright.search.minplus import Factor, minimum_over, slim, slimmed

Sizes = Mapping[int, int]


@dataclass(frozen=True)
class Order:
    """An order of elimination. It has the entries of its largest table and of all tables, and its additions."""

    variables: list[int]
    largest: float
    entries: float
    operations: float


@dataclass
class Memo:
    """A cache of results by the identity of their arrays. So equal layers are computed once.

    The arrays are kept alongside: an array that is gone could give its identity to another.
    """

    tables: dict[tuple, tuple[np.ndarray, list[np.ndarray]]] = field(default_factory=dict)
    slim: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def slimmed(self, factor: Factor) -> Factor:
        """Calls :func:`minplus.slimmed`, with a cache."""
        own, table = factor
        if 1 not in table.shape or len(own) == 1:
            return factor
        if id(table) not in self.slim:
            self.slim[id(table)] = table, slimmed(factor)[1]
        return slim(own, table.shape), self.slim[id(table)][1]

    def minimum_over(self, variable: int, factors: list[Factor]) -> Factor:
        """Calls :func:`minplus.minimum_over`, with a cache."""
        scope = tuple(sorted({v for own, _ in factors for v in own if v != variable}))
        rank = {v: place for place, v in enumerate(scope)} | {variable: -1}
        key = tuple((id(table), *(rank[v] for v in own)) for own, table in factors)
        if key not in self.tables:
            self.tables[key] = minimum_over(variable, factors, scope), [table for _, table in factors]
        return scope, self.tables[key][0]


def best_order(sizes: Sizes, scopes: Iterable[tuple[int, ...]], keep: frozenset[int] = frozenset()) -> Order:
    """Returns the cheaper of two greedy orders: by the size of the table a step makes, and by the pairs it newly joins.

    >>> best_order({0: 2, 1: 3, 2: 2}, [(0, 1), (1, 2)]).variables
    [0, 1, 2]
    """
    scopes = [slim(own, [sizes[v] for v in own]) for own in scopes]
    by_size = _greedy_order(sizes, scopes, keep, by_fill=False)
    # The elimination is cheaper than a better order, or counting fill takes too long on this graph.
    if by_size.operations < 4e6 or len(sizes) > 400:
        return by_size
    by_fill = _greedy_order(sizes, scopes, keep, by_fill=True)
    return min(by_size, by_fill, key=lambda order: order.operations)


def _greedy_order(sizes: Sizes, scopes: list[tuple[int, ...]], keep: frozenset[int], by_fill: bool) -> Order:
    near: dict[int, set[int]] = {v: set() for v in sizes}
    for scope in scopes:
        for v in scope:
            near[v].update(scope)
    for v, others in near.items():
        others.discard(v)

    def weigh(v: int) -> float:
        if by_fill:
            # log sizes break ties, so that a small result wins among equal fills
            joined = sum(len(near[v] - near[u]) - 1 for u in near[v])
            return joined + 1e-3 * float(np.log(prod(float(sizes[u]) for u in near[v])))
        return prod((float(sizes[u]) for u in near[v]), start=float(sizes[v]))

    weights = {v: weigh(v) for v in sizes if v not in keep}
    heap = [(w, v) for v, w in weights.items()]
    heapq.heapify(heap)
    order: list[int] = []
    largest = entries = operations = 0.0
    while heap:
        weight, v = heapq.heappop(heap)
        if weights.get(v) != weight:
            continue
        del weights[v]
        others = near.pop(v)
        order.append(v)
        result = prod(float(sizes[u]) for u in others)
        largest, entries, operations = max(largest, result), entries + result, operations + result * sizes[v]
        touched = set(others)
        for u in others:
            near[u] |= others
            near[u] -= {u, v}
            if by_fill:
                touched |= near[u]
        for u in touched & weights.keys():
            weights[u] = weigh(u)
            heapq.heappush(heap, (weights[u], u))
    return Order(order, largest, entries, operations)


@dataclass
class Elimination:
    """A finished elimination: its buckets, and the factors left over the kept variables.

    >>> pair = np.array([[0.0, 5.0], [5.0, 0.0]])
    >>> done = Elimination.of([((0,), np.array([3.0, 4.0])), ((0, 1), pair)], [0, 1])
    >>> done.value, done.assign({})
    (3.0, {1: 0, 0: 0})
    """

    buckets: list[tuple[int, list[Factor]]]
    left: list[Factor]
    value: float  # the sum of the factors that have no variable any more

    @staticmethod
    def of(factors: list[Factor], order: list[int], memo: Memo | None = None) -> Elimination:
        """Eliminates the variables of `order`. Each of them must be in some factor."""
        memo = memo or Memo()
        place = {v: step for step, v in enumerate(order)}
        waiting: list[list[Factor]] = [[] for _ in order]
        left: list[Factor] = []
        value = 0.0

        def file(factor: Factor) -> None:
            steps = [place[v] for v in factor[0] if v in place]
            (waiting[min(steps)] if steps else left).append(factor)

        for factor in factors:
            file(memo.slimmed(factor))
        buckets = []
        for v, bucket in zip(order, waiting):
            bucket = bucket or [((v,), np.zeros(1))]  # of one choice: its axes have been left out
            # In a fixed order, so that the same bucket in another layer is recognised.
            bucket.sort(key=lambda f: f[0])
            buckets.append((v, bucket))
            scope, table = memo.minimum_over(v, bucket)
            if scope:
                file((scope, table))
            else:
                value += float(table)
        return Elimination(buckets, left, value)

    def assign(self, known: Mapping[int, int]) -> dict[int, int]:
        """Returns a best choice of every eliminated variable, together with the given ones."""
        chosen = dict(known)
        for v, bucket in reversed(self.buckets):
            total: np.ndarray | float = 0.0
            for own, table in bucket:
                total = total + table[tuple(slice(None) if u == v else chosen[u] for u in own)]
            chosen[v] = int(np.argmin(total))
        return chosen
