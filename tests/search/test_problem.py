"""A problem says what it is: prices, copies, the form without repeats; and refuses what does not fit together."""

from __future__ import annotations

import numpy as np
import pytest

from shardwright.search.problem import Edge, Infeasible, Node, Problem, Repeat, Solution
from tests.search.random_problems import random_problem


def two(n: int = 2) -> tuple[Node, Node]:
    return Node("a", np.zeros(n)), Node("b", np.zeros(3))


@pytest.mark.parametrize("seed", range(60))
def test_an_unfolded_problem_has_the_same_price(seed):
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, nodes=5, repeats=True, memory=True)
    flat, places = problem.unfolded()
    chosen = [int(rng.integers(len(node.cost))) for node in flat.nodes]
    assert problem.price(problem.folded(chosen, places)) == pytest.approx(flat.price(chosen))


def test_scopes_say_which_copies_an_edge_joins():
    nodes = tuple(Node(name, np.zeros(2)) for name in ("before", "layer", "after"))
    table = np.ones((2, 2))
    edges = (Edge(0, 1, table, scope="first"), Edge(0, 1, table), Edge(1, 2, table, scope="last"))
    flat, places = Problem(nodes, edges, (Repeat(1, 1, 3, (Edge(1, 1, table),)),)).unfolded()
    assert places == [[0], [1, 2, 3], [4]]
    assert [(e.a, e.b) for e in flat.edges] == [(0, 1), (0, 1), (0, 2), (0, 3), (3, 4), (1, 2), (2, 3)]


def test_between_repeats_an_edge_leaves_the_last_copy():
    nodes = tuple(Node(name, np.zeros(2)) for name in ("encoder", "decoder"))
    flat, _ = Problem(nodes, (Edge(0, 1, np.zeros((2, 2))),), (Repeat(0, 1, 2), Repeat(1, 1, 3))).unfolded()
    assert [(e.a, e.b) for e in flat.edges] == [(1, 2), (1, 3), (1, 4)]


def test_shapes_are_checked():
    with pytest.raises(AssertionError, match=r"edge 0-1: costs of shape \(2, 2\), not \(2, 3\)"):
        Problem(two(), (Edge(0, 1, np.zeros((2, 2))),))
    with pytest.raises(AssertionError, match="memory of another shape"):
        Problem((Node("a", np.zeros(2), np.zeros(3)),), ())
    with pytest.raises(AssertionError, match="leaves its template"):
        Problem(two(), (), (Repeat(0, 1, 2, (Edge(0, 1, np.zeros((2, 3))),)),))
    with pytest.raises(AssertionError, match="overlap"):
        Problem(two(), (), (Repeat(0, 2, 2), Repeat(1, 1, 2)))


def test_the_gap_of_a_solution():
    assert Solution([0], 0.0, 0.0, 0.0, "").gap == 0.0
    assert Solution([0], 2.0, 1.0, 0.0, "").gap == 0.5


def test_what_infeasible_says():
    assert "5" in str(Infeasible(5.0, [0], 3.0))
    assert "3" in str(Infeasible(5.0, [0], 3.0))
    assert "forbids" in str(Infeasible(np.inf, []))
