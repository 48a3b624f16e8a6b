"""Unlimited: finds the least cost without a limit on memory, exactly if the width allows, else by bounds and rounding."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from shardwright.search.bounds import Relaxation
from shardwright.search.branch import Branching
from shardwright.search.dead_ends import Reduced, restricted, without_dead_ends
from shardwright.search.fold import Budget, solve_exactly
from shardwright.search.problem import Choices, Problem, Solution
from shardwright.search.rounding import Moves, Neighbourhoods, Picked, as_arrays, as_choices, decode

_PER_SECOND = 2.5e8  # additions, for tables that do not fit in a cache
_FLAT = 4_000  # nodes up to which parts of the unfolded problem are solved again


def minimise(problem: Problem, gap: float, until: float) -> Solution:
    """Finds a solution whatever its memory. Its cost is infinite only if every assignment met is forbidden.

    >>> from shardwright.search.problem import Node, Problem
    >>> minimise(Problem((Node("a", np.array([2.0, 1.0])),), ()), 0.0, time.monotonic() + 1).method
    'elimination'
    """
    seconds = max(until - time.monotonic(), 0.1)
    # Dead ends cost more to find than a small elimination; a large one they make small.
    choices = solve_exactly(problem, Budget(operations=min(1e9, seconds * _PER_SECOND)))
    if choices is None:
        smaller = without_dead_ends(problem)
        found = solve_exactly(smaller.problem, Budget(operations=seconds * _PER_SECOND))
        if found is None:
            return _approximate(problem, smaller, gap, until)
        choices = smaller.original(found)
    cost, memory = problem.price(choices)
    return Solution(choices, cost, cost, memory, "elimination")


def _approximate(problem: Problem, smaller: Reduced, gap: float, until: float) -> Solution:
    found, bound = _Search(smaller.problem, gap, until).run()
    choices = smaller.original(found)
    cost, memory = problem.price(choices)
    return Solution(choices, cost, min(bound, cost), memory, "bounds")


class _Search:
    """Raises the bound and lowers the cost in turns."""

    def __init__(self, problem: Problem, gap: float, until: float):
        self.problem, self.gap, self.until = problem, gap, until
        self.relaxation, self.moves = Relaxation(problem), Moves(problem)
        self.bound, self.cost = -np.inf, np.inf
        self.best: Picked = [np.zeros(count, int) for count in problem.copies]

    def run(self) -> tuple[Choices, float]:
        """Returns the choices and the bound."""
        stalled = 0
        for round_ in range(1_000):
            before = self.bound
            for _ in range(3):
                self.relaxation.sweep()
            self.bound = max(self.bound, self.relaxation.bound())
            if round_ % 4 == 0:
                self._round()
            stalled = stalled + 1 if self.bound - before <= 1e-5 * abs(self.bound) else 0
            if self._done() or stalled >= 3:
                break
        self._round()
        if not self._done():
            self._finish()
        return as_choices(self.problem, self.best), self.bound

    def _done(self) -> bool:
        return time.monotonic() > self.until or self.cost - self.bound <= self.gap * abs(self.cost)

    def _offer(self, picked: Picked) -> float:
        cost, _ = self.problem.price(picked)
        if cost < self.cost:
            self.best, self.cost = [p.copy() for p in picked], cost
        return cost

    def _round(self) -> None:
        for backward in (False, True):
            picked = decode(self.relaxation, backward)
            self.moves.descend(picked)
            self._offer(picked)

    def _finish(self) -> None:
        """Improves the assignment by solving parts again. Branch and bound then looks for what can still be cheaper."""
        self._solve_around_shared()
        flat, places = self.problem.unfolded() if sum(self.problem.copies) <= _FLAT else (None, [])
        if flat is not None and not self._done():
            start = [0] * len(flat.nodes)
            for at, picked in zip(places, self.best):
                for place, choice in zip(at, picked.tolist()):
                    start[place] = choice
            better = Neighbourhoods(flat).improve(start, time.monotonic() + self._left() / 4)
            self._offer(as_arrays(self.problem.folded(better, places)))
        if not np.isfinite(self.cost) or self._done():
            return
        if self._solve_restricted(self.relaxation.worthwhile(self.cost)):
            self.bound = self.cost
            return
        self._branch(self.relaxation, self._offer)
        if flat is not None and self.problem.repeats and not self._done():
            # Copies that may differ from each other can be branched on only one by one.
            self._branch(Relaxation(flat), lambda p: self._offer(as_arrays(self._folded(p, places))))

    def _left(self) -> float:
        return max(0.0, self.until - time.monotonic())

    def _branch(self, relaxation: Relaxation, offer: Callable[[Picked], float]) -> None:
        self.bound = max(self.bound, Branching(relaxation, self.cost, offer, self.until).run(self.gap))

    def _solve_restricted(self, kept: list[np.ndarray]) -> bool:
        """Offers the best assignment with these choices only. It takes no more than half the time left."""
        found = solve_exactly(restricted(self.problem, kept), Budget(operations=self._left() / 2 * _PER_SECOND))
        if found is not None:
            self._offer([k[picked] for k, picked in zip(kept, as_arrays(found))])
        return found is not None

    def _solve_around_shared(self) -> None:
        """Solves exactly for one value that all copies read and everything that is not shared; then for the next."""
        shared = sorted({end for link in self.relaxation.links if len(link.in_a) > 1 for end in (link.edge.a, link.edge.b)})
        shared = [node for node in shared if self.problem.repeat_of[node] is None]
        improved = True
        while improved and not self._done():
            improved = False
            for node in shared:
                before = self.cost
                kept = [np.arange(len(n.cost)) for n in self.problem.nodes]
                kept = [self.best[n] if n in shared and n != node else k for n, k in enumerate(kept)]
                if self._done() or not self._solve_restricted(kept):
                    return
                improved |= self.cost < before - 1e-12 * abs(before)

    def _folded(self, picked: Picked, places: list[list[int]]) -> Choices:
        return self.problem.folded([int(p[0]) for p in picked], places)
