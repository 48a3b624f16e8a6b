"""Problem: one choice per node, prices on nodes and edges, perhaps a limit on memory.

Nodes that repeat (the layers of a transformer) are written down once, as the template of a :class:`Repeat`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from shardwright.errors import ShardwrightError

# The choices of a problem: a number for a plain node, one number per copy for a node that is repeated.
Choices = list[int | list[int]]

SCOPES = ("every", "first", "last")


class Infeasible(ShardwrightError):
    """No assignment is allowed: `least_memory` is more than the limit, or infinite if every assignment is forbidden.

    `choices` is the assignment that needs the least memory; empty where there is none at all.
    """

    def __init__(self, least_memory: float, choices: Choices, limit: float | None = None):
        if np.isinf(least_memory):
            text = "every assignment has an infinite cost: some node or edge forbids each combination of choices"
        else:
            text = f"the least memory that any assignment needs is {least_memory:g}, over the limit of {limit:g}"
        super().__init__(text)
        self.least_memory, self.choices, self.limit = least_memory, choices, limit

    def __reduce__(self) -> Any:  # so that its fields survive pickling
        return type(self), (self.least_memory, self.choices, self.limit)


@dataclass(frozen=True)
class Solution:
    """An assignment, its cost and memory, and its `bound`. No assignment within the limit can be cheaper than the bound.

    >>> Solution(choices=[0], cost=4.0, bound=3.0, memory=0.0, method="dual").gap
    0.25
    """

    choices: Choices
    cost: float
    bound: float
    memory: float
    method: str

    @property
    def gap(self) -> float:
        """The share of its cost by which the assignment may be above the optimum."""
        if self.cost <= self.bound:
            return 0.0
        return (self.cost - self.bound) / abs(self.cost) if self.cost else float("inf")


@dataclass(frozen=True, eq=False)
class Node:
    """A node with the price of each of its choices; an infinite price forbids a choice.

    >>> Node("matmul", np.array([1.0, np.inf])).memory is None
    True
    """

    name: str
    cost: np.ndarray
    memory: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Edge:
    """A price for each pair of choices. `cost[i, j]` is that of node `a` taking i and node `b` taking j.

    `scope` says to which copies an edge into a repeat belongs: every copy, the first, or the last. Between two
    different repeats it leads from the last copy of `a` to the copies of `b` that `scope` names.

    >>> Edge(0, 1, np.zeros((2, 3))).scope
    'every'
    """

    a: int
    b: int
    cost: np.ndarray
    memory: np.ndarray | None = None
    scope: str = "every"


@dataclass(frozen=True, eq=False)
class Repeat:
    """Nodes start … start + length - 1 stand `count` times in sequence.

    A `carried` edge leads from node `a` of each copy to node `b` of the next.

    >>> Repeat(start=0, length=2, count=32, carried=(Edge(1, 0, np.zeros((2, 2))),)).nodes
    range(0, 2)
    """

    start: int
    length: int
    count: int
    carried: tuple[Edge, ...] = ()

    @property
    def nodes(self) -> range:
        """The nodes of the template."""
        return range(self.start, self.start + self.length)


@dataclass(frozen=True, eq=False)
class Problem:
    """A task: choose one choice per node so that the costs are least. They are the sum over nodes and edges.

    `limit` bounds the sum of the memory of nodes and edges. Arrays may be shared: work on an array is done once.

    >>> pair = Problem((Node("a", np.array([0.0, 2.0])), Node("b", np.array([1.0, 0.0]))), (Edge(0, 1, np.eye(2)),))
    >>> pair.price([0, 1])
    (0.0, 0.0)
    """

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    repeats: tuple[Repeat, ...] = ()
    limit: float | None = None

    def __post_init__(self) -> None:
        end = 0
        for repeat in sorted(self.repeats, key=lambda r: r.start):
            assert repeat.start >= end, "repeats overlap"
            assert min(repeat.length, repeat.count) > 0, "an empty repeat"
            end = repeat.start + repeat.length
            for edge in repeat.carried:
                assert {edge.a, edge.b} <= set(repeat.nodes), "a carried edge leaves its template"
        assert end <= len(self.nodes), "a repeat has more nodes than there are"
        for node in self.nodes:
            assert node.cost.shape == (max(1, node.cost.size),), f"{node.name}: costs of shape {node.cost.shape}"
            assert node.memory is None or node.memory.shape == node.cost.shape, f"{node.name}: memory of another shape"
        for edge in (*self.edges, *(e for r in self.repeats for e in r.carried)):
            shape = (len(self.nodes[edge.a].cost), len(self.nodes[edge.b].cost))
            assert edge.cost.shape == shape, f"edge {edge.a}-{edge.b}: costs of shape {edge.cost.shape}, not {shape}"
            assert edge.memory is None or edge.memory.shape == shape, f"edge {edge.a}-{edge.b}: memory of another shape"
            assert edge.scope in SCOPES, f"edge {edge.a}-{edge.b}: scope {edge.scope!r}"
        assert all(edge.a != edge.b for edge in self.edges), "an edge from a node to itself"

    @cached_property
    def repeat_of(self) -> list[Repeat | None]:
        """The repeat, for each node, whose template it belongs to."""
        found: list[Repeat | None] = [None] * len(self.nodes)
        for repeat in self.repeats:
            found[repeat.start : repeat.start + repeat.length] = [repeat] * repeat.length
        return found

    @cached_property
    def copies(self) -> list[int]:
        """Number of copies of each node."""
        return [repeat.count if repeat else 1 for repeat in self.repeat_of]

    @cached_property
    def placed_edges(self) -> list[tuple[Edge, np.ndarray, np.ndarray]]:
        """Every edge, carried ones too, with the copies of `a` and `b` that it joins."""
        placed = [(edge, *self._copies_joined(edge)) for edge in self.edges]
        for repeat in self.repeats:
            steps = np.arange(repeat.count - 1)
            placed += [(edge, steps, steps + 1) for edge in repeat.carried]
        return placed

    def _copies_joined(self, edge: Edge) -> tuple[np.ndarray, np.ndarray]:
        of_a, of_b = self.repeat_of[edge.a], self.repeat_of[edge.b]
        if of_a is of_b:
            copies = np.arange(of_a.count if of_a else 1)
            return copies, copies
        repeat = of_b or of_a  # between two repeats: the last copy of a, and of b what the scope says
        assert repeat is not None
        every = {"every": range(repeat.count), "first": [0], "last": [repeat.count - 1]}
        inside = np.array(every[edge.scope])
        outside = np.full_like(inside, of_a.count - 1 if of_a and of_b else 0)
        return (outside, inside) if of_b else (inside, outside)

    def price(self, choices: Sequence[int | list[int] | np.ndarray]) -> tuple[float, float]:
        """Computes the cost and the memory of an assignment."""
        picked = [np.atleast_1d(np.asarray(choice)) for choice in choices]
        assert [len(p) for p in picked] == self.copies, "one choice per node and copy"
        cost = memory = 0.0
        for node, at in zip(self.nodes, picked):
            cost += float(node.cost[at].sum())
            memory += float(node.memory[at].sum()) if node.memory is not None else 0.0
        for edge, in_a, in_b in self.placed_edges:
            pairs = picked[edge.a][in_a], picked[edge.b][in_b]
            cost += float(edge.cost[pairs].sum())
            memory += float(edge.memory[pairs].sum()) if edge.memory is not None else 0.0
        return cost, memory

    def fits(self, memory: float) -> bool:
        """Tells whether an amount of memory is within the limit. Rounding of a long sum is allowed."""
        return self.limit is None or memory <= self.limit + 1e-12 * abs(self.limit)

    def weighted(self, price: float) -> Problem:
        """Returns the problem without a limit in which a unit of memory costs `price`."""
        return self._changed(lambda cost, memory: cost if memory is None or not price else cost + price * memory)

    def memory_alone(self) -> Problem:
        """Returns the problem without a limit whose cost is the memory. Forbidden choices stay forbidden."""

        def change(cost: np.ndarray, memory: np.ndarray | None) -> np.ndarray:
            return np.where(np.isinf(cost), np.inf, 0.0 if memory is None else memory)

        return self._changed(change)

    def _changed(self, change: Callable[[np.ndarray, np.ndarray | None], np.ndarray]) -> Problem:
        made: dict[tuple[int, int], np.ndarray] = {}  # shared arrays stay shared

        def once(item: Node | Edge) -> np.ndarray:
            key = id(item.cost), id(item.memory)
            if key not in made:
                made[key] = change(item.cost, item.memory)
            return made[key]

        def edges(those: tuple[Edge, ...]) -> tuple[Edge, ...]:
            return tuple(Edge(e.a, e.b, once(e), None, e.scope) for e in those)

        nodes = tuple(Node(node.name, once(node)) for node in self.nodes)
        repeats = tuple(Repeat(r.start, r.length, r.count, edges(r.carried)) for r in self.repeats)
        return Problem(nodes, edges(self.edges), repeats)

    def unfolded(self) -> tuple[Problem, list[list[int]]]:
        """Returns the same problem without repeats. For each node here it adds the places of its copies there.

        >>> layer = Node("layer", np.array([1.0, 2.0]))
        >>> flat, places = Problem((layer,), (), (Repeat(0, 1, 3, (Edge(0, 0, np.eye(2)),)),)).unfolded()
        >>> len(flat.nodes), [(e.a, e.b) for e in flat.edges], places
        (3, [(0, 1), (1, 2)], [[0, 1, 2]])
        """
        nodes: list[Node] = []
        places: list[list[int]] = [[] for _ in self.nodes]
        for index in range(len(self.nodes)):
            repeat = self.repeat_of[index]
            if repeat is not None and index != repeat.start:
                continue
            for copy in range(repeat.count if repeat else 1):
                for member in repeat.nodes if repeat else (index,):
                    places[member].append(len(nodes))
                    name = self.nodes[member].name
                    nodes.append(Node(f"{name}[{copy}]" if repeat else name, *self._prices(member)))
        edges = [
            Edge(places[edge.a][i], places[edge.b][j], edge.cost, edge.memory)
            for edge, in_a, in_b in self.placed_edges
            for i, j in zip(in_a.tolist(), in_b.tolist())
        ]
        return Problem(tuple(nodes), tuple(edges), (), self.limit), places

    def _prices(self, node: int) -> tuple[np.ndarray, np.ndarray | None]:
        return self.nodes[node].cost, self.nodes[node].memory

    def folded(self, flat: Sequence[int], places: list[list[int]]) -> Choices:
        """Converts the choices of the unfolded problem to choices of this one."""
        return [
            [int(flat[place]) for place in at] if self.repeat_of[node] else int(flat[at[0]]) for node, at in enumerate(places)
        ]
