"""Memory limit: finds the least cost under a limit on memory.

With a price on memory the limit goes away, and the least cost less price times limit is a lower bound. The best price
is found where the lines of two known assignments cross (Kelley). Assignments that keep the limit at that price are then
improved: copies take choices from different assignments, and the memory that is left is spent on single nodes. Small
problems are solved exactly by fronts of cost and memory.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from shardwright.search.pareto import Frontier, Table
from shardwright.search.problem import Infeasible, Problem, Solution
from shardwright.search.rounding import Moves, Picked, as_arrays, as_choices
from shardwright.search.unlimited import minimise


@dataclass
class LimitedSearch:
    """A search under a limit: its best assignment, its bound, and every assignment met."""

    problem: Problem
    gap: float
    until: float
    bound: float = -np.inf
    cost: float = np.inf
    best: Picked | None = None
    met: list[tuple[float, float, Picked]] = field(default_factory=list)  # cost, memory, choices
    exact: bool = False

    def done(self) -> bool:
        """Tells whether the gap is reached or the time is up."""
        return self.exact or self.cost - self.bound <= self.gap * abs(self.cost) or time.monotonic() > self.until

    def offer(self, picked: Picked) -> tuple[float, float]:
        """Records an assignment, which may be the best within the limit. Returns its cost and memory."""
        cost, memory = self.problem.price(picked)
        if self.problem.fits(memory) and cost < self.cost:
            self.best, self.cost = [p.copy() for p in picked], cost
        return cost, memory

    def solution(self, method: str) -> Solution:
        """Returns the best assignment within the limit."""
        assert self.best is not None
        cost, memory = self.problem.price(self.best)
        bound = cost if self.exact else min(self.bound, cost)
        return Solution(as_choices(self.problem, self.best), cost, bound, memory, method)


def solve_with_limit(problem: Problem, free: Solution, gap: float, until: float) -> Solution:
    """Solves under the limit, given the solution `free` without it, which exceeds it.

    Args:
        problem: the problem, with a limit.
        free: the solution without the limit.
        gap: relative gap at which to stop.
        until: time of ``time.monotonic`` at which to stop.

    Raises:
        Infeasible: nothing is within the limit.
    """
    assert problem.limit is not None
    search = LimitedSearch(problem, gap, until, bound=free.bound)
    now = time.monotonic()
    least = minimise(problem.memory_alone(), 0.0, now + (until - now) / 4)
    if not problem.fits(least.cost):
        raise Infeasible(least.cost, least.choices, problem.limit)
    prices = _find_price(search, free, least)
    for improve in (_mix_copies, _spend, _combine, _spend):
        if not search.done():
            improve(search)
    if not search.done() and _solve_by_fronts(search):
        return search.solution("fronts of cost and memory")
    return search.solution(f"Lagrangian, {prices} prices")


def _find_price(search: LimitedSearch, free: Solution, least: Solution) -> int:
    """Raises the bound as far as a price on memory can. Returns the number of prices tried."""
    limit = search.problem.limit
    assert limit is not None
    over = (free.cost, free.memory)
    within = search.offer(as_arrays(least.choices))
    search.met += [(*over, as_arrays(free.choices)), (*within, as_arrays(least.choices))]
    for tried in range(60):
        if search.done() or within[0] <= over[0] or over[1] <= within[1]:
            return tried
        price = (within[0] - over[0]) / (over[1] - within[1])
        # Half the time that is left, so that some remains for assignments.
        now = time.monotonic()
        at = minimise(search.problem.weighted(price), search.gap / 2, now + (search.until - now) / 2)
        search.bound = max(search.bound, at.bound - price * limit)
        picked = as_arrays(at.choices)
        cost, memory = search.offer(picked)
        search.met.append((cost, memory, picked))
        crossing = over[0] + price * over[1]
        if at.cost >= crossing - 1e-9 * abs(crossing):
            return tried + 1
        if search.problem.fits(memory):
            within = cost, memory
        else:
            over = cost, memory
    return 60


def _nearest(search: LimitedSearch, count: int) -> list[Picked]:
    """Returns the cheapest assignments met at the last price, on both sides of the limit."""
    within = [m for m in search.met if search.problem.fits(m[1])]
    over = [m for m in search.met if not search.problem.fits(m[1])]
    chosen = sorted(within, key=lambda m: -m[1])[:count] + sorted(over, key=lambda m: m[1])[:count]
    return [picked for _, _, picked in sorted(chosen, key=lambda m: m[1])]


def _mix_copies(search: LimitedSearch) -> None:
    """Combines two assignments: the first copies as in one, the others as in the other."""
    if not search.problem.repeats:
        return
    near = _nearest(search, 1)
    lean, rich = near[0], near[-1]
    most = max(repeat.count for repeat in search.problem.repeats)
    for first, second in ((rich, lean), (lean, rich)):
        for outside in (rich, lean):

            def mixed(cut: int, first: Picked = first, second: Picked = second, outside: Picked = outside) -> Picked:
                return [
                    np.where(np.arange(len(p)) < cut * len(p) / most, p, q) if own else o
                    for p, q, o, own in zip(first, second, outside, search.problem.repeat_of)
                ]

            # Memory grows with the number of copies from the larger assignment: bisection finds the largest number that fits.
            low, high = 0, most
            while low < high:
                middle = (low + high + (first is rich)) // 2
                fits = search.problem.fits(search.offer(mixed(middle))[1])
                if first is rich:
                    low, high = (middle, high) if fits else (low, middle - 1)
                else:
                    low, high = (low, middle) if fits else (middle + 1, high)
            search.offer(mixed(low))


def _spend(search: LimitedSearch) -> None:
    """Changes single nodes of single copies to cheaper choices as long as the memory suffices."""
    assert search.best is not None
    assert search.problem.limit is not None
    moves = Moves(search.problem)
    picked = [p.copy() for p in search.best]
    memory = search.problem.price(picked)[1]
    improved = True
    while improved and time.monotonic() < search.until:
        improved = False
        for node in range(len(picked)):
            for _ in range(3 * len(picked[node])):
                cost, bytes_ = moves.local(node, picked)
                rows = np.arange(len(cost))
                gain = cost[rows, picked[node]][:, None] - cost
                more = bytes_ - bytes_[rows, picked[node]][:, None]
                gain = np.where((more <= search.problem.limit - memory) & np.isfinite(cost), gain, -np.inf)
                copy, choice = np.unravel_index(int(gain.argmax()), gain.shape)
                if gain[copy, choice] <= 1e-12 * abs(cost[copy, choice]):
                    break
                memory += more[copy, choice]
                picked[node] = picked[node].copy()
                picked[node][copy] = choice
                improved = True
    search.offer(picked)


def _combine(search: LimitedSearch) -> None:
    """Finds the best combination of the assignments met near the limit. It is made node by node and copy by copy."""
    near = [*_nearest(search, 2), *([search.best] if search.best else [])]
    kept = [np.unique(np.concatenate([picked[node] for picked in near])) for node in range(len(search.problem.nodes))]
    budget = time.monotonic() + max(0.0, min(search.until - time.monotonic(), 5.0)) / 2
    _fronts(search, kept, 48, budget)


def _solve_by_fronts(search: LimitedSearch) -> bool:
    """Solves with all choices and whole fronts, which is exact if it ends in time."""
    sizes = [len(node.cost) for node in search.problem.nodes]
    if sum(search.problem.copies) > 400:
        return False
    now = time.monotonic()
    found = _fronts(search, [np.arange(n) for n in sizes], None, now + (search.until - now) / 2)
    search.exact = found
    return found


def _fronts(search: LimitedSearch, kept: list[np.ndarray], cap: int | None, until: float) -> bool:
    """Offers the best assignment with these choices only. Returns whether it is proved to be the best of them."""
    problem = search.problem
    assert problem.limit is not None
    assert search.best is not None
    flat, places = problem.unfolded()
    kept_flat: dict[int, np.ndarray] = {place: kept[node] for node, at in enumerate(places) for place in at}
    tables: list[Table] = []
    fixed_cost = fixed_memory = 0.0
    sizes = {place: len(k) for place, k in kept_flat.items() if len(k) > 1}
    for place, node in enumerate(flat.nodes):
        tables.append(_table((place,), node.cost, node.memory, kept_flat))
    for edge in flat.edges:
        tables.append(_table((edge.a, edge.b), edge.cost, edge.memory, kept_flat))
    left = []
    for own, cost, memory in tables:
        if own:
            left.append((own, cost, memory))
        else:
            fixed_cost, fixed_memory = fixed_cost + float(cost), fixed_memory + float(memory)
    limit = problem.limit + 1e-12 * abs(problem.limit) - fixed_memory
    try:
        frontier = Frontier.of(left, sizes, limit, cap, until)
    except TimeoutError:
        return False
    chosen = frontier.best(limit)
    if chosen is not None:
        full = [int(kept_flat[place][chosen.get(place, 0)]) for place in range(len(flat.nodes))]
        search.offer(as_arrays(problem.folded(full, places)))
    return frontier.exact


def _table(ends: tuple[int, ...], cost: np.ndarray, memory: np.ndarray | None, kept: dict[int, np.ndarray]) -> Table:
    """Builds a table over the choices kept, without the ends that have one choice only."""
    at = np.ix_(*(kept[end] for end in ends))
    free = tuple(end for end in ends if len(kept[end]) > 1)
    shape = [len(kept[end]) for end in free]
    return free, cost[at].reshape(shape), (np.zeros(shape) if memory is None else memory[at].reshape(shape))
