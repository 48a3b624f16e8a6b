"""Alike: makes copies of a repeat choose the same where that costs nothing.

Then a person reads one layer instead of many. Many assignments have the same cost, and a search ends at any of them: one
layer may redistribute before a view and the next behind it. Here the copies between the first and the last of a repeat, and
then those two as well, take over what one of them chose, wherever that costs nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from shardwright.search.problem import Choices, Problem, Repeat, Solution

_MOST = 4  # number of different copies of a repeat that are tried, the most frequent first
_ROUNDING = 1e-12


def alike(problem: Problem, solution: Solution) -> Solution:
    """Makes the copies of each repeat alike where that costs nothing and fits.

    >>> from shardwright.search.problem import Node
    >>> layer = Node("layer", np.array([1.0, 1.0]))
    >>> problem = Problem((layer,), (), (Repeat(0, 1, 4),))
    >>> alike(problem, Solution([[0, 1, 1, 1]], 4.0, 4.0, 0.0, "bounds")).choices
    [[1, 1, 1, 1]]
    """
    for repeat in problem.repeats:
        found = _copies(repeat, solution.choices)
        for chosen, _ in Counter(found).most_common(_MOST) if len(set(found)) > 1 else ():
            for ends in (0, 1):  # with the first and the last copy, or without them
                solution = _if_no_worse(problem, solution, _with_copies(repeat, solution.choices, chosen, ends))
            if len(set(_copies(repeat, solution.choices)[1:-1])) <= 1:
                break
    return solution


def _copies(repeat: Repeat, choices: Choices) -> list[tuple[int, ...]]:
    """Returns the choices of each copy of a repeat."""
    return list(zip(*(_rows(choices[node]) for node in repeat.nodes), strict=True))


def _rows(rows: int | list[int]) -> list[int]:
    assert not isinstance(rows, int)
    return [int(row) for row in rows]


def _with_copies(repeat: Repeat, choices: Choices, chosen: Sequence[int], ends: int) -> Choices:
    """Replaces the choices of all copies, except some at each end, by one of them."""
    changed = list(choices)
    for node, row in zip(repeat.nodes, chosen):
        rows = _rows(choices[node])
        changed[node] = [row if ends <= at < len(rows) - ends else old for at, old in enumerate(rows)]
    return changed


def _if_no_worse(problem: Problem, solution: Solution, choices: Choices) -> Solution:
    """Returns the solution with other choices if they cost and need no more."""
    if choices == solution.choices:
        return solution
    cost, memory = problem.price(choices)
    if not np.isfinite(cost) or cost > solution.cost * (1 + _ROUNDING) or not problem.fits(memory):
        return solution
    return replace(solution, choices=choices, cost=cost, memory=memory, bound=min(solution.bound, cost))
