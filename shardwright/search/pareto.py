"""Pareto elimination: keeps every pair of cost and memory that no other pair beats, instead of the least cost.

It is exact while the fronts are kept whole. With `cap` they are thinned, and the result is an assignment without proof.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from shardwright.search.elimination import best_order
from shardwright.search.minplus import slimmed, spread

Table = tuple[tuple[int, ...], np.ndarray, np.ndarray]  # variables, cost, memory

_MOST_OPERATIONS = 3e6  # fronts to add up, each of which takes tens of microseconds
_MOST_SUMS = 4_000_000  # entries of the sum of two fronts that fit in memory


@dataclass(frozen=True)
class Front:
    """Pairs of cost and memory, by rising memory. Each has its choice and the entries it is the sum of."""

    cost: np.ndarray
    memory: np.ndarray
    parts: np.ndarray  # (entries, 1 + fronts it was made of)


@dataclass
class Frontier:
    """Fronts that an elimination left at each variable.

    >>> cost, memory = np.array([0.0, 1.0, 5.0]), np.array([4.0, 2.0, 3.0])
    >>> Frontier.of([((0,), cost, memory)], {0: 3}, 9.0).best(3.0)
    {0: 1}
    """

    steps: list[tuple[int, tuple[int, ...], list[int]]]  # variable, scope, and the steps whose fronts it reads
    fronts: list[np.ndarray]  # for each step, by the choices of its scope
    exact: bool

    @staticmethod
    def of(tables: list[Table], sizes: dict[int, int], limit: float, cap: int | None = None, until: float = np.inf) -> Frontier:
        """Eliminates all variables.

        Args:
            tables: (variables, cost, memory) of each factor.
            sizes: number of choices of each variable.
            limit: most memory.
            cap: most entries of a front; None: any number.
            until: time of ``time.monotonic`` at which to stop.

        Raises:
            TimeoutError: the clock passes `until`, or surely would.
        """
        order = best_order(sizes, [own for own, _, _ in tables])
        if order.operations > _MOST_OPERATIONS:
            raise TimeoutError
        # Pruning by the limit assumes that what is still to be added is not negative.
        limit = limit if all((memory >= 0).all() for _, _, memory in tables) else np.inf
        frontier, waiting = Frontier([], [], True), [_slimmed(table) for table in tables]
        for step, v in enumerate(order.variables):
            mine = [t for t in waiting if v in t[0]]
            waiting = [t for t in waiting if v not in t[0]]
            read = [s for s, (_, scope, _) in enumerate(frontier.steps) if v in scope and not frontier._used(s)]
            scopes = [own for own, _, _ in mine] + [frontier.steps[s][1] for s in read]
            scope = tuple(sorted({u for own in scopes for u in own} - {v}))
            frontier.steps.append((v, scope, read))
            frontier.fronts.append(frontier._eliminate(mine, sizes, limit, cap, until))
            assert len(frontier.fronts) == step + 1
        return frontier

    def _used(self, step: int) -> bool:
        return any(step in read for _, _, read in self.steps)

    def _eliminate(self, tables: list[Table], sizes: dict[int, int], limit: float, cap: int | None, until: float) -> np.ndarray:
        v, scope, read = self.steps[-1]
        axes = (*scope, v)
        shape = [sizes[u] for u in axes]
        cost, memory = np.zeros(shape), np.zeros(shape)
        for own, c, m in tables:
            cost, memory = cost + spread((own, c), axes), memory + spread((own, m), axes)
        result = np.empty(shape[:-1], dtype=object)
        for cell in np.ndindex(*shape[:-1]):
            if time.monotonic() > until:
                raise TimeoutError
            chosen = dict(zip(scope, cell))
            options = []
            for k in range(sizes[v]):
                chosen[v] = k
                if np.isfinite(cost[cell + (k,)]):
                    fronts = [self._front(s, chosen) for s in read]
                    options.append(_sum(float(cost[cell + (k,)]), float(memory[cell + (k,)]), k, fronts, limit))
            result[cell], whole = _union(options, 1 + len(read), limit, cap)
            self.exact &= whole
        return result

    def _front(self, step: int, chosen: dict[int, int]) -> Front:
        front: Front = self.fronts[step][tuple(chosen[u] for u in self.steps[step][1])]
        return front

    def best(self, limit: float) -> dict[int, int] | None:
        """Returns the cheapest assignment within the limit."""
        roots = [s for s, (_, scope, _) in enumerate(self.steps) if not scope]
        total = _sum(0.0, 0.0, 0, [self._front(s, {}) for s in roots], np.inf)
        within = np.flatnonzero(total.memory <= limit)
        if not len(within):
            return None
        entry = total.parts[within[np.argmin(total.cost[within])]]
        wanted = dict(zip(roots, entry[1:].tolist()))
        chosen: dict[int, int] = {}
        for step in range(len(self.steps) - 1, -1, -1):
            v, _, read = self.steps[step]
            parts = self._front(step, chosen).parts[wanted[step]].tolist()
            chosen[v] = parts[0]
            wanted.update(zip(read, parts[1:]))
        return chosen


def _slimmed(table: Table) -> Table:
    own, cost, memory = table
    kept, slim_cost = slimmed((own, cost))
    return kept, slim_cost, slimmed((own, memory))[1]


def _sum(cost: float, memory: float, choice: int, fronts: list[Front], limit: float) -> Front:
    """Computes all sums of one entry of each front."""
    total = Front(np.array([cost]), np.array([memory]), np.array([[choice]]))
    for front in fronts:
        n, m = len(total.cost), len(front.cost)
        if n * m > _MOST_SUMS:
            raise TimeoutError
        parts = np.column_stack([np.repeat(total.parts, m, axis=0), np.tile(np.arange(m), n)])
        sums = (total.cost[:, None] + front.cost).ravel(), (total.memory[:, None] + front.memory).ravel()
        total = _undominated(Front(*sums, parts), limit)
    return total


def _undominated(front: Front, limit: float) -> Front:
    order = np.lexsort((front.cost, front.memory))
    cost = front.cost[order]
    least = np.minimum.accumulate(cost)
    better = np.ones(len(order), bool)
    better[1:] = cost[1:] < least[:-1]
    better &= front.memory[order] <= limit
    keep = order[better]
    return Front(front.cost[keep], front.memory[keep], front.parts[keep])


def _union(options: list[Front], width: int, limit: float, cap: int | None) -> tuple[Front, bool]:
    """Merges the fronts of all options. Returns whether none was thinned."""
    if not options:
        return Front(np.empty(0), np.empty(0), np.empty((0, width), int)), True
    parts = (np.concatenate([getattr(front, name) for front in options]) for name in ("cost", "memory", "parts"))
    front = _undominated(Front(*parts), limit)
    if cap is None or len(front.cost) <= cap:
        return front, True
    # The cheapest entry of each of `cap` equal stretches of memory, and the one that takes the least.
    steps = np.linspace(front.memory[0], front.memory[-1], cap)
    keep = np.unique(np.concatenate([[0], np.searchsorted(front.memory, steps, side="right") - 1]))
    return Front(front.cost[keep], front.memory[keep], front.parts[keep]), False
