"""Rounding: assignments of low cost, without proof, read off a relaxation, then improved move by move."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from shardwright.search.bounds import Relaxation
from shardwright.search.elimination import Elimination, best_order
from shardwright.search.fold import edge_factor
from shardwright.search.minplus import Factor
from shardwright.search.problem import Choices, Problem

Picked = list[np.ndarray]  # for each node the choices of its copies


def as_arrays(choices: Sequence[int | list[int]]) -> Picked:
    """Converts choices to one array per node."""
    return [np.atleast_1d(np.array(choice)) for choice in choices]


def as_choices(problem: Problem, picked: Picked) -> Choices:
    """Converts arrays to choices as a problem states them."""
    return [p.tolist() if own else int(p[0]) for p, own in zip(picked, problem.repeat_of)]


def decode(relaxation: Relaxation, backward: bool = False) -> Picked:
    """Chooses node by node, by the prices of the relaxation, given the choices before."""
    picked: list[np.ndarray | None] = [None] * len(relaxation.prices)
    for node in reversed(range(len(picked))) if backward else range(len(picked)):
        score = relaxation.prices[node].copy()
        for link, as_a in relaxation.at[node]:
            own, there = (link.in_a, link.in_b) if as_a else (link.in_b, link.in_a)
            table, mine, lent = (link.table, link.to_a, link.to_b) if as_a else (link.table.T, link.to_b, link.to_a)
            chosen = picked[link.edge.b if as_a else link.edge.a]
            if chosen is not None:
                at = chosen[there]
                np.add.at(score, own, table[:, at].T - mine - lent[np.arange(len(at)), at][:, None])
        picked[node] = score.argmin(axis=1)
    return [p for p in picked if p is not None]


class Moves:
    """Costs, and memory, of changing one node in one copy while all else stays.

    >>> from shardwright.search.problem import Edge, Node, Problem
    >>> a, b = Node("a", np.array([0.0, 2.0])), Node("b", np.array([1.0, 0.0]))
    >>> Moves(Problem((a, b), (Edge(0, 1, np.eye(2)),))).local(0, as_arrays([0, 0]))[0]
    array([[1., 2.]])
    """

    def __init__(self, problem: Problem):
        self.problem = problem
        self.at: list[list[tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray, int]]] = [[] for _ in problem.nodes]
        self.touches_itself = [False] * len(problem.nodes)
        for edge, in_a, in_b in problem.placed_edges:
            memory = edge.memory
            self.at[edge.a].append((edge.cost, memory, in_a, in_b, edge.b))
            self.at[edge.b].append((edge.cost.T, None if memory is None else memory.T, in_b, in_a, edge.a))
            self.touches_itself[edge.a] |= edge.a == edge.b

    def local(self, node: int, picked: Picked) -> tuple[np.ndarray, np.ndarray]:
        """Computes cost and memory, (copies, choices), of the node with its edges."""
        item, count = self.problem.nodes[node], self.problem.copies[node]
        cost = np.tile(item.cost, (count, 1))
        memory = np.tile(np.zeros_like(item.cost) if item.memory is None else item.memory, (count, 1))
        for table, bytes_, own, there, other in self.at[node]:
            at = picked[other][there]
            np.add.at(cost, own, table[:, at].T)
            if bytes_ is not None:
                np.add.at(memory, own, bytes_[:, at].T)
        return cost, memory

    def descend(self, picked: Picked) -> None:
        """Changes single nodes to cheaper choices until none is left (iterated conditional modes)."""
        improved = True
        while improved:
            improved = False
            for node in range(len(picked)):
                for parity in (0, 1) if self.touches_itself[node] else (None,):
                    cost, _ = self.local(node, picked)
                    rows = np.arange(len(cost))
                    best = cost.argmin(axis=1)
                    # The gain must exceed rounding, or two equal choices could alternate for ever.
                    least = cost[rows, best]
                    better = least + 1e-12 * np.abs(least) < cost[rows, picked[node]]
                    if parity is not None:
                        better &= rows % 2 == parity
                    if better.any():
                        picked[node] = np.where(better, best, picked[node])
                        improved = True


class Neighbourhoods:
    """Solves random connected parts of a flat problem exactly, with all else fixed."""

    def __init__(self, flat: Problem, seed: int = 0):
        self.flat, self.moves, self.rng = flat, Moves(flat), np.random.default_rng(seed)
        self.near: list[set[int]] = [set() for _ in flat.nodes]
        for edge in flat.edges:
            self.near[edge.a].add(edge.b)
            self.near[edge.b].add(edge.a)

    def improve(self, chosen: list[int], until: float, patience: int = 60) -> list[int]:
        """Repeats until the clock passes `until`, or nothing was gained `patience` times in a row."""
        picked = as_arrays(chosen)
        cost = self.flat.price(chosen)[0]
        size, idle = 8, 0
        while idle < patience and time.monotonic() < until:
            part = self._grow(size)
            idle += 1
            found = self._solve(part, picked)
            if found is None:
                size = max(2, size * 3 // 4)
                continue
            size += 1
            trial = list(picked)
            for node, choice in found.items():
                trial[node] = np.array([choice])
            new = self.flat.price([int(p[0]) for p in trial])[0]
            if new <= cost:
                idle = 0 if new < cost - 1e-12 * abs(cost) else idle
                picked, cost = trial, new
            if len(part) == len(self.flat.nodes):
                break
        return [int(p[0]) for p in picked]

    def _grow(self, size: int) -> set[int]:
        part = {int(self.rng.integers(len(self.near)))}
        while len(part) < min(size, len(self.near)):
            edge = sorted({n for node in part for n in self.near[node]} - part)
            part.add(int(self.rng.choice(edge)) if edge else int(self.rng.choice(sorted(set(range(len(self.near))) - part))))
        return part

    def _solve(self, part: set[int], picked: Picked) -> dict[int, int] | None:
        factors: list[Factor] = []
        inside = [edge for edge in self.flat.edges if edge.a in part and edge.b in part]
        sizes = {node: len(self.flat.nodes[node].cost) for node in part}
        order = best_order(sizes, [(edge.a, edge.b) for edge in inside])
        if order.operations > 2e6:
            return None
        for node in sorted(part):
            cost = self.flat.nodes[node].cost.copy()
            for table, _, _, _, other in self.moves.at[node]:
                if other not in part:
                    cost += table[:, picked[other][0]]
            factors.append(((node,), cost))
        factors += [edge_factor(edge, edge.a, edge.b) for edge in inside]
        return Elimination.of(factors, order.variables).assign({})
