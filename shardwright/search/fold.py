"""Fold: solves a problem with repeats exactly, as long as the tables stay within a budget.

The first and the last copy of a repeat stand in the graph as they are. The copies between them become one factor: the
template is eliminated down to a transfer matrix from its left boundary to its right one, and the matrix is raised to
the number of copies. A boundary between two copies is a cover of the carried edges: for each carried edge, the choice of
`a` in the copy before, or that of `b` in the copy after.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from itertools import product as combinations
from math import log2, prod

import numpy as np

from shardwright.search.elimination import Elimination, Memo, Order, best_order
from shardwright.search.minplus import Factor, Power, slim, slimmed, spread
from shardwright.search.problem import Choices, Edge, Problem, Repeat

Key = tuple[int, int]  # a node and its copy; 0 for a plain node


@dataclass(frozen=True)
class Budget:
    """Limits on the size of a table and of all tables, and on additions. A second is about 5e8 additions."""

    largest: float = 3e7
    entries: float = 1e8  # all are kept until the choices are read back: 800 MB
    operations: float = 1e10

    def allows(self, order: Order) -> bool:
        """Tells whether an elimination stays within the budget."""
        fits = order.largest <= self.largest and order.entries <= self.entries
        return fits and order.operations <= self.operations


def solve_exactly(problem: Problem, budget: Budget | None = None) -> Choices | None:
    """Finds the choices of least cost, whatever their memory. Returns None if that would exceed the budget.

    Args:
        problem: the problem; its limit is ignored.
        budget: limits on tables and additions.

    >>> from shardwright.search.problem import Edge, Node, Problem, Repeat
    >>> layer = Node("layer", np.array([1.0, 1.5]))
    >>> last = Node("last", np.array([9.0, 0.0]))
    >>> switch = Edge(0, 0, 1 - np.eye(2))
    >>> solve_exactly(Problem((layer, last), (Edge(0, 1, 1 - np.eye(2), scope="last"),), (Repeat(0, 1, 5, (switch,)),)))
    [[0, 0, 0, 0, 0], 1]
    """
    budget = budget or Budget()
    memo = Memo()
    for unfold in (False, True):
        if unfold and (not problem.repeats or sum(problem.copies) > 20_000):
            break
        graph = Graph.of(problem, unfold)
        if graph.fits(budget):
            return graph.solve(memo)
    return None


@dataclass
class Segment:
    """All copies of a repeat between its first and last, as one factor. Its variables are the boundaries and the globals."""

    problem: Problem
    repeat: Repeat
    by_source: list[int]  # nodes whose choice in the copy before is part of a boundary
    by_target: list[int]  # nodes whose choice in the copy after is part of a boundary
    globals: list[Key]  # nodes that every copy reads
    sizes: dict[int, int] = field(default_factory=dict)  # sizes of the variables of one copy
    left: list[int] = field(default_factory=list)
    right: list[int] = field(default_factory=list)
    factors: list[Factor] = field(default_factory=list)

    def __post_init__(self) -> None:
        nodes, repeat = self.problem.nodes, self.repeat
        for node in repeat.nodes:
            self._variable(node, node)
            self.factors.append(((node,), nodes[node].cost))
        before = {node: self._fresh(node) for node in self.by_source}
        after = {node: self._fresh(node) for node in self.by_target}
        # A node in both boundaries is itself in the left one, and has an equal double in the right one.
        double = {node: self._fresh(node) for node in self.by_source if node in self.by_target}
        for node, other in double.items():
            equal = np.full((self.sizes[node],) * 2, np.inf)
            np.fill_diagonal(equal, 0.0)
            self.factors.append(((node, other), equal))
        self.left = [*before.values(), *self.by_target]
        self.right = [*(double.get(node, node) for node in self.by_source), *after.values()]
        self.global_variables = [self._fresh(node) for node, _ in self.globals]
        self._add_edges(before, after)
        self.order = best_order(self.sizes, [f[0] for f in self.factors], frozenset(self.kept))

    @property
    def kept(self) -> list[int]:
        """The variables of the factor: globals, left boundary, right boundary."""
        return [*self.global_variables, *self.left, *self.right]

    @property
    def keys(self) -> list[Key]:
        """The nodes of the graph around that the variables of the factor stand for."""
        last = self.repeat.count - 1
        left = [(node, 0) for node in self.by_source] + [(node, 1) for node in self.by_target]
        right = [(node, last - 1) for node in self.by_source] + [(node, last) for node in self.by_target]
        return [*self.globals, *left, *right]

    def _variable(self, variable: int, node: int) -> None:
        self.sizes[variable] = len(self.problem.nodes[node].cost)

    def _fresh(self, node: int) -> int:
        variable = max(len(self.problem.nodes), *self.sizes) + 1
        self._variable(variable, node)
        return variable

    def _add_edges(self, before: dict[int, int], after: dict[int, int]) -> None:
        shared = dict(zip(self.globals, self.global_variables))
        for edge in self.repeat.carried:
            if edge.a in before:
                self.factors.append(edge_factor(edge, before[edge.a], edge.b))
            else:
                self.factors.append(edge_factor(edge, edge.a, after[edge.b]))
        for edge in self.problem.edges:
            ends = edge_keys(self.problem, self.repeat, edge)
            if ends is not None:
                a, b = (shared[end] if isinstance(end, tuple) else end for end in ends)
                self.factors.append(edge_factor(edge, a, b))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Numbers of states of the globals, of the left and of the right boundary."""
        stack, left, right = (prod(self.sizes[v] for v in part) for part in (self.global_variables, self.left, self.right))
        return stack, left, right

    def cost_order(self) -> Order:
        """Returns the cost of building the factor."""
        stack, left, right = self.shape
        table, products = float(stack * left * right), 2 * log2(self.repeat.count)
        return Order(
            self.order.variables,
            max(self.order.largest, table),
            self.order.entries + products * table,
            self.order.operations + products * left * table,
        )

    def build(self, memo: Memo) -> Factor:
        """Builds the factor. Its variables are places in `keys`."""
        self.template = Elimination.of(self.factors, self.order.variables, memo)
        kept = slim(tuple(self.kept), [self.sizes[v] for v in self.kept])
        table = np.full([self.sizes[v] for v in kept], self.template.value)
        for factor in self.template.left:
            own, sums = slimmed(factor)
            table += spread((own, sums), kept) if set(own) <= set(kept) else sums.sum()
        self.power = Power.of(table.reshape(self.shape), self.repeat.count - 2)
        places = [self.kept.index(v) for v in kept]
        return tuple(places), self.power.table.reshape(table.shape)

    def recover(self, chosen: dict[Key, int]) -> np.ndarray:
        """Returns the choices (copy, node) of the copies between, given those of `keys`."""
        at = [chosen[key] for key in self.keys]
        cut, end = len(self.globals), len(self.globals) + len(self.left)
        parts = (self.global_variables, at[:cut]), (self.left, at[cut:end]), (self.right, at[end:])
        stack, first, last = (self._state(*part) for part in parts)
        path = self.power.path(stack, first, last)
        steps = list(pairwise(path))
        rows: dict[tuple[int, int], int] = {}
        for step in steps:
            rows.setdefault(step, len(rows))
        table = []
        for before, after in rows:
            given = dict(zip(self.global_variables, at[:cut]))
            given.update(self._choices(self.left, before) | self._choices(self.right, after))
            known = self.template.assign(given)
            table.append([known[node] for node in self.repeat.nodes])
        return np.array(table)[[rows[step] for step in steps]]

    def _state(self, variables: list[int], choices: list[int]) -> int:
        return int(np.ravel_multi_index(choices, [self.sizes[v] for v in variables])) if variables else 0

    def _choices(self, variables: list[int], state: int) -> dict[int, int]:
        at = np.unravel_index(state, [self.sizes[v] for v in variables]) if variables else ()
        return {v: int(i) for v, i in zip(variables, at)}


def edge_factor(edge: Edge, a: int, b: int) -> Factor:
    """Returns the edge's table as a factor, its variables in rising order."""
    return ((a, b), edge.cost) if a < b else ((b, a), edge.cost.T)


def edge_keys(problem: Problem, repeat: Repeat, edge: Edge) -> tuple[Key | int, Key | int] | None:
    """Returns the ends of an edge that belongs to every copy of a repeat: a template node, or what all copies read."""
    of_a, of_b = problem.repeat_of[edge.a], problem.repeat_of[edge.b]
    if of_a is of_b:
        return (edge.a, edge.b) if of_a is repeat else None
    if edge.scope != "every" or repeat is not (of_b or of_a):
        return None
    if of_b is None:
        return edge.a, (edge.b, 0)
    return (edge.a, of_a.count - 1 if of_a else 0), edge.b


def smallest_cover(repeat: Repeat, sizes: list[int]) -> tuple[list[int], list[int]]:
    """Finds the boundary with the fewest joint states: sources and targets that cover all carried edges."""
    pairs = sorted({(edge.a, edge.b) for edge in repeat.carried})
    sides = combinations((True, False), repeat=len(pairs)) if len(pairs) <= 8 else [(True,) * len(pairs), (False,) * len(pairs)]
    covers = []
    for side in sides:
        sources = {a for (a, _), by_source in zip(pairs, side) if by_source}
        targets = {b for (a, b), by_source in zip(pairs, side) if not by_source and a not in sources}
        states = prod(sizes[node] for node in (*sources, *targets))
        covers.append((states, len(targets), sorted(sources), sorted(targets)))
    return min(covers)[2:]


@dataclass
class Graph:
    """All factors of a problem. A segment stands for many copies."""

    problem: Problem
    variables: dict[Key, int]
    factors: list[Factor]
    segments: list[Segment]
    order: Order

    @staticmethod
    def of(problem: Problem, unfold: bool = False) -> Graph:
        """Builds the graph but not yet the tables of its segments; `unfold` writes every copy out."""
        sizes = [len(node.cost) for node in problem.nodes]
        segments: dict[Repeat, Segment] = {}
        explicit: dict[Repeat | None, list[int]] = {None: [0]}
        for repeat in problem.repeats:
            explicit[repeat] = list(range(repeat.count))
            # With up to three copies a segment saves nothing, and its boundaries would coincide.
            if repeat.count > 3 and not unfold:
                explicit[repeat] = [0, repeat.count - 1]
                ends = [edge_keys(problem, repeat, edge) for edge in problem.edges]
                read = sorted({end for pair in ends if pair for end in pair if isinstance(end, tuple)})
                segments[repeat] = Segment(problem, repeat, *smallest_cover(repeat, sizes), read)
        keys = {key for segment in segments.values() for key in segment.keys}
        for node, own in enumerate(problem.repeat_of):
            keys |= {(node, copy) for copy in explicit[own]}
        # By repeat, then copy, then node: equal copies get variables in the same order, so that the memo knows them.
        starts = [own.start if own else node for node, own in enumerate(problem.repeat_of)]
        ordered = sorted(keys, key=lambda key: (starts[key[0]], key[1], key[0]))
        variables = {key: place for place, key in enumerate(ordered)}
        graph = Graph(problem, variables, [], list(segments.values()), Order([], 0, 0, 0))
        graph._add_factors(segments, explicit)
        scopes = [own for own, _ in graph.factors]
        scopes += [tuple(variables[key] for key in segment.keys) for segment in segments.values()]
        graph.order = best_order({variables[key]: sizes[key[0]] for key in keys}, scopes)
        return graph

    def _add_factors(self, segments: dict[Repeat, Segment], explicit: dict[Repeat | None, list[int]]) -> None:
        problem = self.problem
        for node, own in enumerate(problem.repeat_of):
            for copy in explicit[own]:
                self.factors.append(((self.variables[node, copy],), problem.nodes[node].cost))
        for place, (edge, in_a, in_b) in enumerate(problem.placed_edges):
            own, other = problem.repeat_of[edge.a], problem.repeat_of[edge.b]
            segment = segments.get(own) if own and place >= len(problem.edges) else None
            if segment is not None:
                # The step into the second copy, or out of the last but one: the other one is part of the segment.
                part = slice(-1, None) if edge.a in segment.by_source else slice(1)
                in_a, in_b = in_a[part], in_b[part]
            else:
                written = np.ones(len(in_a), bool)
                for end, copies in ((own, in_a), (other, in_b)):
                    if end is not None and end in segments:
                        written &= (copies == 0) | (copies == end.count - 1)
                in_a, in_b = in_a[written], in_b[written]
            for i, j in zip(in_a.tolist(), in_b.tolist()):
                self.factors.append(edge_factor(edge, self.variables[edge.a, i], self.variables[edge.b, j]))

    def fits(self, budget: Budget) -> bool:
        """Tells whether solving stays within the budget."""
        return all(budget.allows(order) for order in (self.order, *(s.cost_order() for s in self.segments)))

    def solve(self, memo: Memo) -> Choices:
        """Returns the choices of least cost."""
        factors = list(self.factors)
        for segment in self.segments:
            places, table = segment.build(memo)
            own = tuple(self.variables[segment.keys[place]] for place in places)
            factors.append((tuple(sorted(own)), spread((own, table), tuple(sorted(own)))))
        chosen = Elimination.of(factors, self.order.variables, memo).assign({})
        found = {key: chosen[v] for key, v in self.variables.items()}
        between = {segment.repeat: segment.recover(found) for segment in self.segments}
        return [self._choices(node, found, between) for node in range(len(self.problem.nodes))]

    def _choices(self, node: int, found: dict[Key, int], between: dict[Repeat, np.ndarray]) -> int | list[int]:
        own = self.problem.repeat_of[node]
        if own is None:
            return found[node, 0]
        if own not in between:
            return [found[node, copy] for copy in range(own.count)]
        middle = between[own][:, node - own.start].tolist()
        return [found[node, 0], *middle, found[node, own.count - 1]]
