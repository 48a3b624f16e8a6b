"""Solve: solves a problem by the method that fits it."""

from __future__ import annotations

import time

import numpy as np

from shardwright.search.alike import alike
from shardwright.search.integer_program import solve_integer_program
from shardwright.search.memory_limit import solve_with_limit
from shardwright.search.problem import Infeasible, Problem, Solution
from shardwright.search.unlimited import minimise

_REFEREE_PAIRS = 100_000  # number of pairs of choices up to which HiGHS is useful


def solve(problem: Problem, gap: float = 0.0, seconds: float = 30.0) -> Solution:
    """Chooses one choice per node at the least cost within the limit.

    Stops as soon as the certified gap is at most `gap`, and no later than about `seconds`. `bound` is a proof: nothing
    within the limit costs less. Without a limit, and where the graph is not too wide, the gap is 0. Copies of a repeat
    choose alike where that costs nothing.

    Raises:
        Infeasible: nothing is within the limit, or everything is forbidden.

    >>> from shardwright.search.problem import Edge, Node, Problem, Repeat
    >>> import numpy as np
    >>> layer = Node("layer", np.array([1.0, 1.5]), memory=np.array([4.0, 1.0]))
    >>> problem = Problem((layer,), (), (Repeat(0, 1, 3, (Edge(0, 0, np.zeros((2, 2))),)),), limit=9.0)
    >>> solution = solve(problem)
    >>> solution.cost, solution.memory, solution.gap
    (3.5, 9.0, 0.0)
    """
    return alike(problem, _solve(problem, gap, seconds))


def _solve(problem: Problem, gap: float, seconds: float) -> Solution:
    now = time.monotonic()
    until = now + seconds
    # Under a limit the solution without it is only the first of many steps.
    free = minimise(problem, gap, until if problem.limit is None else now + seconds / 4)
    if not np.isfinite(free.cost):
        if free.method == "bounds" and _pairs(problem) <= _REFEREE_PAIRS:  # rounding found nothing, but that proves nothing
            return solve_integer_program(problem, max(1.0, until - time.monotonic()), gap)
        raise Infeasible(np.inf, [])
    if problem.fits(free.memory):
        return free
    found = solve_with_limit(problem, free, gap, until)
    left = until - time.monotonic()
    if found.gap > gap and left > 1.0 and _pairs(problem) <= _REFEREE_PAIRS:
        found = _second_opinion(problem, found, gap, left)
    return found


def _pairs(problem: Problem) -> int:
    return sum(edge.cost.size * len(places) for edge, places, _ in problem.placed_edges)


def _second_opinion(problem: Problem, found: Solution, gap: float, seconds: float) -> Solution:
    """Combines a second solution, of HiGHS, with the first: the better assignment and the better bound."""
    try:
        other = solve_integer_program(problem, seconds, gap)
    except (TimeoutError, Infeasible):
        return found
    best = min(found, other, key=lambda solution: solution.cost)
    bound = min(max(found.bound, other.bound), best.cost)
    return Solution(best.choices, best.cost, bound, best.memory, f"{found.method}, integer program")
