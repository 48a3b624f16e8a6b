"""Dead-end elimination: drops choices that another choice of the same node beats whatever its neighbours do.

Choice i of a node is dropped if, for some j, cost_i - cost_j + the sum over neighbours of min_k (E[i, k] - E[j, k]) >= 0
(Goldstein 1994). Of equal choices one stays. For a repeated node it must hold in the first copy, in those between and
in the last, whose neighbours differ. The least cost stays as it was; memory is ignored.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from shardwright.search.problem import Choices, Edge, Node, Problem, Repeat

_FORBIDDEN = 1e30  # stands for infinity, so that differences of two forbidden pairs are 0: no reason to drop anything
_CHUNK = 1 << 16


@dataclass
class Reduced:
    """A smaller problem of the same least cost. `original` maps its choices to those of the original.

    >>> from shardwright.search.problem import Node, Problem
    >>> smaller = without_dead_ends(Problem((Node("a", np.array([3.0, 1.0, 2.0])),), ()))
    >>> smaller.problem.nodes[0].cost, smaller.original([0])
    (array([1.]), [1])
    """

    problem: Problem
    kept: list[np.ndarray]

    def original(self, choices: Choices) -> Choices:
        """Returns the choices of the original problem."""
        return [kept[choice].tolist() for kept, choice in zip(self.kept, choices)]


@dataclass
class _Side:
    """One edge as seen from one of its ends: rows are that end's choices."""

    table: np.ndarray
    other: int
    edge: Edge
    times: dict[int, int]  # number of edges to each of the copies that stand for the rest


@dataclass
class _Pruner:
    problem: Problem
    sides: list[list[_Side]]
    alive: list[np.ndarray]
    known: dict[tuple, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def prune(self, node: int) -> bool:
        """Drops dominated choices of a node. Returns whether there were any."""
        alive = self.alive[node]
        if len(alive) == 1:
            return False
        cost = finite(self.problem.nodes[node].cost)[alive]
        copies = kinds_of_copies(self.problem.copies[node])
        gains = [cost[:, None] - cost for _ in copies]
        for side in self.sides[node]:
            term = self._least_difference(side, alive)
            for place, copy in enumerate(copies):
                if side.times[copy]:
                    gains[place] = gains[place] + side.times[copy] * term
        beaten = np.logical_and.reduce([gain >= 0 for gain in gains])
        keep = np.ones(len(alive), bool)
        for i in range(len(alive) - 1, -1, -1):
            beaten[i, i] = False
            keep[i] = not (beaten[i] & keep).any()
        self.alive[node] = alive[keep]
        return not keep.all()

    def _least_difference(self, side: _Side, alive: np.ndarray) -> np.ndarray:
        """Computes the least that choice i costs more than j on this edge."""
        others = self.alive[side.other]
        key = id(side.edge.cost), side.table is side.edge.cost, alive.tobytes(), others.tobytes()
        if key not in self.known:
            table = np.ascontiguousarray(finite(side.table)[np.ix_(alive, others)])
            result = np.empty((len(alive), len(alive)))
            height = max(1, _CHUNK // table.size)
            for top in range(0, len(alive), height):
                result[top : top + height] = (table[top : top + height, None, :] - table).min(axis=2)
            self.known[key] = result, side.edge.cost
        return self.known[key][0]


def without_dead_ends(problem: Problem) -> Reduced:
    """Drops dominated choices until none is left."""
    sides: list[list[_Side]] = [[] for _ in problem.nodes]
    for edge, in_a, in_b in problem.placed_edges:
        for own, other, copies, table in ((edge.a, edge.b, in_a, edge.cost), (edge.b, edge.a, in_b, edge.cost.T)):
            times = {copy: int((copies == copy).sum()) for copy in kinds_of_copies(problem.copies[own])}
            sides[own].append(_Side(table, other, edge, times))
    pruner = _Pruner(problem, sides, [np.arange(len(node.cost)) for node in problem.nodes])
    waiting = deque(range(len(problem.nodes)))
    while waiting:
        node = waiting.popleft()
        if pruner.prune(node):
            waiting.extend({side.other for side in sides[node]} - set(waiting))
    return Reduced(restricted(problem, pruner.alive), pruner.alive)


def kinds_of_copies(count: int) -> list[int]:
    """Returns one copy for each of: the first, those between, the last."""
    return sorted({0, min(1, count - 1), count - 1})


def finite(table: np.ndarray) -> np.ndarray:
    """Replaces infinity in a table by a huge number."""
    return np.where(np.isinf(table), _FORBIDDEN, table)


def restricted(problem: Problem, kept: list[np.ndarray]) -> Problem:
    """Restricts the problem to some of the choices. Shared arrays stay shared."""
    made: dict[tuple, np.ndarray | None] = {}

    def part(table: np.ndarray | None, *nodes: int) -> np.ndarray | None:
        key = (id(table), *(kept[node].tobytes() for node in nodes))
        if key not in made:
            made[key] = None if table is None else table[np.ix_(*(kept[node] for node in nodes))]
        return made[key]

    def edges(those: tuple[Edge, ...]) -> tuple[Edge, ...]:
        return tuple(Edge(e.a, e.b, part(e.cost, e.a, e.b), part(e.memory, e.a, e.b), e.scope) for e in those)  # type: ignore[arg-type]

    nodes = tuple(Node(n.name, part(n.cost, i), part(n.memory, i)) for i, n in enumerate(problem.nodes))  # type: ignore[arg-type]
    repeats = tuple(Repeat(r.start, r.length, r.count, edges(r.carried)) for r in problem.repeats)
    return Problem(nodes, edges(problem.edges), repeats, problem.limit)
