"""Repeats: the folded problem has the answer of the unfolded one, in a time that the number of copies hardly changes."""

from __future__ import annotations

import time

import numpy as np
import pytest

from shardwright.search import dead_ends
from shardwright.search.fold import Graph, solve_exactly
from shardwright.search.problem import Edge, Node, Problem, Repeat
from shardwright.search.solve import solve
from tests.search.layered import transformer


def chain_cost(cost: np.ndarray, table: np.ndarray, count: int) -> float:
    """The least cost of `count` equal nodes in a row."""
    total = cost
    for _ in range(count - 1):
        total = (total[:, None] + table).min(axis=0) + cost
    return float(total.min())


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 8, 13, 100, 255, 1000])
def test_a_chain_of_any_length(count):
    rng = np.random.default_rng(count)
    cost, table = rng.random(7), rng.random((7, 7))
    solution = solve(Problem((Node("layer", cost),), (), (Repeat(0, 1, count, (Edge(0, 0, table),)),)))
    assert solution.cost == pytest.approx(chain_cost(cost, table, count))
    assert len(solution.choices[0]) == count


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9, 24])
@pytest.mark.parametrize("read", [0, 1, 2])
def test_layers_folded_and_unfolded(count, read):
    problem = transformer(4, count, length=24, read=read, seed=count)
    flat, _ = problem.unfolded()
    assert solve(problem).cost == pytest.approx(solve(flat).cost)


@pytest.mark.parametrize("seed", range(40))
def test_boundaries_of_several_carried_edges(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 4, 4)
    nodes = tuple(Node(f"n{i}", rng.random(n)) for i, n in enumerate(sizes))
    pairs = [(a, b) for a in range(4) for b in range(4)]
    carried = tuple(Edge(a, b, rng.random((sizes[a], sizes[b]))) for a, b in pairs if rng.random() < 0.4)
    edges = tuple(Edge(a, b, rng.random((sizes[a], sizes[b]))) for a, b in pairs if a < b and rng.random() < 0.5)
    problem = Problem(nodes, edges, (Repeat(0, 4, int(rng.integers(4, 12)), carried),))
    flat, _ = problem.unfolded()
    assert solve(problem).cost == pytest.approx(solve(flat).cost)


def test_two_repeats_joined_directly():
    rng = np.random.default_rng(0)
    nodes = tuple(Node(f"n{i}", rng.random(3)) for i in range(5))

    def edge(a: int, b: int, scope: str = "every") -> Edge:
        return Edge(a, b, rng.random((3, 3)), scope=scope)

    repeats = Repeat(0, 2, 6, (edge(1, 0),)), Repeat(2, 2, 9, (edge(3, 2), edge(3, 3)))
    edges = (edge(0, 1), edge(2, 3), edge(1, 2, "first"), edge(1, 3), edge(3, 4, "last"), edge(4, 0))
    problem = Problem(nodes, edges, repeats)
    assert len(Graph.of(problem).segments) == 2
    flat, _ = problem.unfolded()
    assert solve(problem).cost == pytest.approx(solve(flat).cost)


def fastest(problem: Problem) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        assert solve_exactly(problem) is not None
        times.append(time.perf_counter() - start)
    return min(times)


def test_time_hardly_depends_on_the_number_of_copies():
    few, many = (fastest(transformer(40, count)) for count in (32, 1000))
    assert many < 2 * few  # 1.2 to 1.4 on a quiet machine: the choices of 60,000 nodes have to be written down


def test_arrays_shared_by_layers_are_worked_on_once(monkeypatch):
    pruners = []

    class Pruner(dead_ends._Pruner):
        def __init__(self, *args):
            super().__init__(*args)
            pruners.append(self)

    monkeypatch.setattr(dead_ends, "_Pruner", Pruner)
    for count in (5, 50):
        dead_ends.without_dead_ends(transformer(25, count).unfolded()[0])
    few, many = (len(pruner.known) for pruner in pruners)
    assert few == many
