"""Searches two mesh axes after the other, each level an exact problem of a few choices.

At each level an operator picks roles for two neighbouring axes, all other axes staying as they are; the innermost,
whose links are the fastest and carry most, come first. On more than two axes a last level decides all of them at once,
with no other ways to split an operator than the levels before it found: which axis does what may change, so that nothing
depends on the order of the levels. The work grows with the number of axes, not with the number of devices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from shardwright.plan.choose.tables import IDLE, REPLICATED, Symbol
from shardwright.plan.modes.attempt import Attempt, MeshProblem
from shardwright.plan.problem.formulation import Formulation
from shardwright.search.problem import Infeasible, Problem, Solution

# Tries of a price for memory.
_PRICES = 12
# How far from its optimum a level may end; splitting the problem into levels loses more.
_GAP = 0.005


@dataclass
class _State:
    """Roles of the axes so far, of every operator and parameter."""

    symbols: dict[int, tuple[Symbol, ...]]
    stored: dict[str, tuple[int, ...]]
    cost: float = np.inf
    memory: float = np.inf
    formulation: Formulation | None = None
    answer: Any = None


class Recursion:
    """One run of the recursive search on a planner's mesh."""

    def __init__(self, planner: MeshProblem, limit: float | None, gradients: float):
        self.planner, self.limit, self.gradients = planner, limit, gradients
        self.axes = [a for a, size in enumerate(planner.mesh.sizes) if size > 1] or [0]

    def run(self) -> Attempt:
        """Searches the best plan; under a limit, with the least price of memory that makes it fit."""
        best = self._descend(0.0)
        if self.limit is not None and best.memory > self.limit:
            best = self._with_price_of_memory(best)
        assert best.formulation is not None
        solution = Solution(best.answer, best.cost, 0.0, best.memory, "recursion")
        return Attempt(self.planner.mesh, best.formulation, solution)

    def _with_price_of_memory(self, free: _State) -> _State:
        assert self.limit is not None
        low, high = 0.0, free.cost / max(free.memory, 1.0)
        best: _State | None = None
        for _ in range(_PRICES):
            state = self._descend(high if best is None else (low * high) ** 0.5 if low else high / 4)
            price = high if best is None else (low * high) ** 0.5 if low else high / 4
            if state.memory <= self.limit:
                best, high = (state if best is None or state.cost < best.cost else best), price
            else:
                low = price
                if best is None:
                    high *= 8
        if best is None:
            least = self._descend(1e6)
            if least.memory > self.limit:
                assert least.formulation is not None
                self.planner.latest = least.formulation
                raise Infeasible(least.memory, least.answer, self.limit)
            best = least
        return best

    def _descend(self, price: float) -> _State:
        planner = self.planner
        count = len(planner.mesh.axes)
        state = _State(
            {site: (IDLE,) * count for site in planner.folded.sites},
            {value: (REPLICATED,) * count for value in planner.read_parameters()},
        )
        if len(self.axes) <= 2:
            return self._level(state, tuple(self.axes), price)
        met = {site: set(symbols) for site, symbols in state.symbols.items()}
        for axes in reversed(list(pairwise(self.axes))):
            state = self._level(state, axes, price)
            for site, symbols in state.symbols.items():
                met[site].update(symbols)
        together = self._level(state, tuple(self.axes), price, met)
        return min(state, together, key=lambda found: found.cost + price * found.memory)

    def _level(self, state: _State, axes: tuple[int, ...], price: float, among: dict[int, set[Symbol]] | None = None) -> _State:
        """Searches the best roles of some axes while the others stay as they are.

        Args:
            state: the roles so far.
            axes: those to decide.
            price: of memory, in seconds per byte.
            among: some of a site's symbols; default: all.
        """
        planner = self.planner
        tables = {
            site: planner.table(site, state.symbols[site], axes, None if among is None else frozenset(among[site]))
            for site in planner.folded.sites
        }
        stored = {value: planner.stored(value, code, axes) for value, code in state.stored.items()}
        form = planner.formulate(tables, stored, self.gradients)
        problem = _priced(form.problem, price) if price else form.problem
        answer = [self._one(rows) for rows in self.planner.find(problem, _GAP).choices]
        cost, memory = form.problem.price(_spread(form.problem, answer))
        symbols = dict(state.symbols)
        for site, variable in form.at_site.items():
            table = tables[site]
            if table.fixed is None:
                symbols[site] = tuple(table.symbols[s] for s in table.rows[answer[variable]])
        codes = {value: tuple(stored[value][answer[at]].tolist()) for value, at in form.at_parameter.items()}
        return _State(symbols, codes, cost, memory, form, _spread(form.problem, answer))

    def _one(self, rows: Any) -> int:
        """Returns the choice of all copies of a repeated node: that of the middle one."""
        return int(rows if isinstance(rows, (int, np.integer)) else rows[len(rows) // 2])


def _spread(problem: Problem, answer: list[int]) -> list[Any]:
    """Copies the choice of a repeated node to all its copies."""
    result: list[Any] = list(answer)
    for repeat in problem.repeats:
        for at in range(repeat.start, repeat.start + repeat.length):
            result[at] = [answer[at]] * repeat.count
    return result


def _priced(problem: Problem, price: float) -> Problem:
    """Adds the price of memory, in seconds, to a problem."""

    def edges(given: Any) -> Any:
        return tuple(e if e.memory is None else replace(e, cost=e.cost + price * e.memory, memory=None) for e in given)

    nodes = tuple(n if n.memory is None else replace(n, cost=n.cost + price * n.memory, memory=None) for n in problem.nodes)
    repeats = tuple(replace(r, carried=edges(r.carried)) for r in problem.repeats)
    return replace(problem, nodes=nodes, edges=edges(problem.edges), repeats=repeats, limit=None)
