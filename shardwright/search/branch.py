"""Branch and bound over the choices of plain nodes. It raises the bound where a relaxation leaves a gap.

A part of the problem is a set of choices for each node. Its bound comes from a relaxation that starts with the prices of
the part it was split from; choices too dear to matter are dropped, and what is small enough is solved by elimination.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from shardwright.search.bounds import Relaxation
from shardwright.search.dead_ends import restricted
from shardwright.search.fold import Budget, solve_exactly
from shardwright.search.rounding import Picked, as_arrays, decode

_EXACT = Budget(operations=2e7)


@dataclass(order=True)
class _Part:
    bound: float
    number: int
    kept: list[np.ndarray] = field(compare=False)
    relaxation: Relaxation = field(compare=False)


class Branching:
    """Open parts that may still hold something cheaper than `cost`. `offer` takes each assignment that is found."""

    def __init__(self, relaxation: Relaxation, cost: float, offer: Callable[[Picked], float], until: float):
        self.cost, self.offer, self.until = cost, offer, until
        self.open: list[_Part] = []
        self.stuck = np.inf  # the least bound of a part that cannot be split
        self.numbers = count()
        # Values with the most readers are decided first: one that every layer reads makes a graph wide.
        self.degrees = [sum(len(link.in_a) for link, _ in at) for at in relaxation.at]
        everything = [np.arange(prices.shape[1]) for prices in relaxation.prices]
        self._add(relaxation, everything, relaxation.bound())

    def run(self, gap: float) -> float:
        """Splits the part with the least bound until the gap or the time is reached. Returns the bound."""
        while self.open and self.cost - self.bound() > gap * abs(self.cost) and time.monotonic() < self.until:
            part = heapq.heappop(self.open)
            sizes = [len(kept) for kept in part.kept]
            plain = [n for n, c in enumerate(part.relaxation.problem.copies) if c == 1 and sizes[n] > 1]
            if not plain:
                self.stuck = min(self.stuck, part.bound)
                continue
            node = max(plain, key=lambda n: (self.degrees[n], sizes[n]))
            for place in range(sizes[node]):
                chosen = [np.array([place]) if n == node else np.arange(s) for n, s in enumerate(sizes)]
                self._add(*_narrowed(part.relaxation, part.kept, chosen), part.bound)
        return self.bound()

    def bound(self) -> float:
        """Returns the bound proved for the whole problem."""
        return min(self.cost, self.stuck, self.open[0].bound if self.open else np.inf)

    def _add(self, relaxation: Relaxation, kept: list[np.ndarray], bound: float) -> None:
        """Bounds a part, and keeps it open unless it is solved or too expensive."""
        for _ in range(4):
            if time.monotonic() > self.until:
                break
            for _ in range(2):
                relaxation.sweep()
            bound = max(bound, relaxation.bound())
            if bound >= self.cost:
                return
            chosen = relaxation.worthwhile(self.cost)
            if sum(map(len, chosen)) == sum(map(len, kept)):
                break
            relaxation, kept = _narrowed(relaxation, kept, chosen)
        self._take(kept, decode(relaxation))
        found = solve_exactly(relaxation.problem, _EXACT)
        if found is not None:
            self._take(kept, as_arrays(found))
        else:
            heapq.heappush(self.open, _Part(bound, next(self.numbers), kept, relaxation))

    def _take(self, kept: list[np.ndarray], picked: Picked) -> None:
        self.cost = min(self.cost, self.offer([own[at] for own, at in zip(kept, picked)]))


def _narrowed(relaxation: Relaxation, kept: list[np.ndarray], chosen: list[np.ndarray]) -> tuple[Relaxation, list[np.ndarray]]:
    """Restricts a relaxation to some choices, with its prices as they are. Returns their original numbers too."""
    smaller = Relaxation(restricted(relaxation.problem, chosen))
    smaller.prices = [price[:, at] for price, at in zip(relaxation.prices, chosen)]
    for link, old in zip(smaller.links, relaxation.links):
        link.to_a, link.to_b = old.to_a[:, chosen[link.edge.a]], old.to_b[:, chosen[link.edge.b]]
        link.table = old.table[np.ix_(chosen[link.edge.a], chosen[link.edge.b])]
    return smaller, [own[at] for own, at in zip(kept, chosen)]
