"""Bounds: computes a lower bound for problems too wide for elimination, by moving prices along edges.

Every edge may lend part of its price to the nodes at its ends. The sum stays the same for each assignment, and
the sum of the least price of each node and of each edge is a lower bound, whatever was lent. Sequential passes in the
manner of TRW-S and SRMP (Kolmogorov 2006, 2015) raise it. All copies of a repeated node are worked on at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shardwright.search.problem import Edge, Node, Problem


@dataclass
class Link:
    """One edge in all its places: row r joins copy `in_a[r]` of node a with copy `in_b[r]` of node b."""

    edge: Edge
    in_a: np.ndarray
    in_b: np.ndarray
    table: np.ndarray
    to_a: np.ndarray  # price lent to a: (places, choices of a)
    to_b: np.ndarray


class Relaxation:
    """Prices lent in a problem, and the bound they prove.

    >>> from shardwright.search.problem import Edge, Node, Problem
    >>> a, b = Node("a", np.array([0.0, 1.0])), Node("b", np.array([1.0, 0.0]))
    >>> relaxation = Relaxation(Problem((a, b), (Edge(0, 1, 3 * np.eye(2)[::-1]),)))
    >>> for _ in range(3):
    ...     relaxation.sweep()
    >>> round(relaxation.bound(), 6)
    1.0
    """

    def __init__(self, problem: Problem):
        self.problem = problem
        # Any price above that of every allowed assignment forbids a choice; a huge one would lose digits.
        items: list[Node | Edge] = [*problem.nodes, *(edge for edge, _, _ in problem.placed_edges)]
        largest = max(float(np.abs(i.cost[np.isfinite(i.cost)]).max(initial=0.0)) for i in items)
        self.forbidden = 2 * largest * (sum(problem.copies) + sum(len(at) for _, at, _ in problem.placed_edges)) + 1e-300

        def finite(table: np.ndarray) -> np.ndarray:
            return np.where(np.isinf(table), self.forbidden, table)

        self.prices = [np.tile(finite(n.cost), (count, 1)) for n, count in zip(problem.nodes, problem.copies)]
        tables: dict[int, np.ndarray] = {}
        self.links = []
        self.at: list[list[tuple[Link, bool]]] = [[] for _ in problem.nodes]
        for edge, in_a, in_b in problem.placed_edges:
            if not len(in_a):
                continue
            table = tables.setdefault(id(edge.cost), finite(edge.cost))
            height, width = table.shape
            link = Link(edge, in_a, in_b, table, np.zeros((len(in_a), height)), np.zeros((len(in_a), width)))
            self.links.append(link)
            self.at[edge.a].append((link, True))
            self.at[edge.b].append((link, False))

    def sweep(self) -> None:
        """Updates all nodes forward, then backward."""
        order = list(range(len(self.prices)))
        for forward in (True, False):
            for node in order if forward else reversed(order):
                self._update(node, forward)

    def _update(self, node: int, forward: bool) -> None:
        """Collects what a node's edges can lend it. It is then distributed to the edges not visited yet."""
        if any(link.edge.a == link.edge.b for link, _ in self.at[node]):
            # A node with edges to its own copies: the even copies are independent of each other, and so are the odd ones.
            for parity in (0, 1):
                self._update_copies(node, forward, np.arange(len(self.prices[node])) % 2 == parity)
        else:
            self._update_copies(node, forward, None)

    def _update_copies(self, node: int, forward: bool, chosen: np.ndarray | None) -> None:
        price = self.prices[node]
        later, incoming = np.zeros(len(price)), np.zeros(len(price))
        used = []
        for link, as_a in self.at[node]:
            own, other = (link.in_a, link.edge.b) if as_a else (link.in_b, link.edge.a)
            rows = np.arange(len(own)) if chosen is None else np.flatnonzero(chosen[own])
            if not len(rows):
                continue
            gain = self._gain(link, as_a, rows)
            (link.to_a if as_a else link.to_b)[rows] += gain
            np.add.at(price, own[rows], gain)
            ahead = other == node or (other > node if forward else other < node)
            np.add.at(later if ahead else incoming, own[rows], 1.0)
            used.append((link, as_a, rows, own[rows], ahead))
        # SRMP's weights: the share of each edge ahead is 1 / max(number of edges ahead, number of edges behind).
        share = 1.0 / np.maximum(np.maximum(later, incoming), 1.0)
        handed = price.copy()
        for link, as_a, rows, own, ahead in used:
            if ahead:
                part = handed[own] * share[own][:, None]
                (link.to_a if as_a else link.to_b)[rows] -= part
                np.subtract.at(price, own, part)

    def _gain(self, link: Link, as_a: bool, rows: np.ndarray) -> np.ndarray:
        """Computes the least that is left of the edge's price, per row and choice."""
        table, lent, mine = (link.table, link.to_b, link.to_a) if as_a else (link.table.T, link.to_a, link.to_b)
        lent, result = lent[rows], np.empty((len(rows), len(table)))
        step = max(1, (1 << 16) // table.size)
        for top in range(0, len(rows), step):
            result[top : top + step] = (table - lent[top : top + step, None, :]).min(axis=2)
        return result - mine[rows]

    def worthwhile(self, cost: float) -> list[np.ndarray]:
        """Returns each node's choices that some assignment not above `cost` may have, in any copy."""
        bound = self.bound()
        found = []
        for node, price in enumerate(self.prices):
            least = price - price.min(axis=1, keepdims=True)
            for link, as_a in self.at[node]:
                own = link.in_a if as_a else link.in_b
                gain = self._gain(link, as_a, np.arange(len(own)))
                np.add.at(least, own, gain - gain.min(axis=1, keepdims=True))
            keep = (bound + least.min(axis=0)) <= cost + 1e-9 * abs(cost)
            found.append(np.flatnonzero(keep) if keep.any() else np.array([0]))
        return found

    def bound(self) -> float:
        """Computes the bound that the prices lent so far prove."""
        total = sum(float(price.min(axis=1).sum()) for price in self.prices)
        for link in self.links:
            total += float(self._gain(link, True, np.arange(len(link.in_a))).min(axis=1).sum())
        return total
