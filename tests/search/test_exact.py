"""Small problems have the answer that trying everything gives."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from shardwright.search.dead_ends import without_dead_ends
from shardwright.search.fold import solve_exactly
from shardwright.search.problem import Edge, Infeasible, Node, Problem
from shardwright.search.solve import solve
from tests.search.random_problems import brute_force, random_problem

TOO_MANY = 30_000  # assignments to try


def small(rng, repeats, memory=False):
    """A random problem with few enough assignments."""
    while True:
        problem = random_problem(rng, nodes=int(rng.integers(1, 7)), repeats=repeats, memory=memory)
        flat, _ = problem.unfolded()
        if np.prod([len(node.cost) for node in flat.nodes], dtype=float) <= TOO_MANY:
            return problem, flat


def check(problem, least):
    if np.isinf(least):
        with pytest.raises(Infeasible):
            solve(problem)
        return
    solution = solve(problem)
    assert solution.cost == pytest.approx(least, abs=1e-9)
    assert solution.gap == 0
    assert problem.price(solution.choices) == (solution.cost, solution.memory)


@pytest.mark.parametrize("repeats", [False, True])
def test_without_a_limit(repeats):
    rng = np.random.default_rng(repeats)
    for _ in range(500):
        problem, flat = small(rng, repeats)
        least, _, _ = brute_force(problem)
        check(problem, least)
        if repeats:
            check(flat, least)


@pytest.mark.parametrize("repeats", [False, True])
def test_dead_ends_leave_the_least_cost(repeats):
    rng = np.random.default_rng(10 + repeats)
    dropped = 0
    for _ in range(200):
        problem, _ = small(rng, repeats)
        smaller = without_dead_ends(problem)
        dropped += sum(len(a.cost) - len(b.cost) for a, b in zip(problem.nodes, smaller.problem.nodes))
        choices = smaller.original(solve_exactly(smaller.problem))
        least, _, _ = brute_force(problem)
        assert problem.price(choices)[0] == pytest.approx(least, abs=1e-9)
    assert dropped > 100


@pytest.mark.parametrize("repeats", [False, True])
def test_under_a_limit(repeats):
    rng = np.random.default_rng(20 + repeats)
    binding = infeasible = 0
    for _ in range(500):
        problem, flat = small(rng, repeats, memory=True)
        _, least, best = brute_force(problem)
        if np.isinf(least):
            continue
        free = flat.price(best)[1]
        limit = least + (free - least) * float(rng.choice([0.0, 0.3, 0.6, 0.9])) - float(rng.random() < 0.1) * 0.5
        problem = replace(problem, limit=limit)
        cost, _, _ = brute_force(problem)
        binding += free > limit >= least
        if limit < least:
            infeasible += 1
            with pytest.raises(Infeasible) as raised:
                solve(problem)
            assert raised.value.least_memory == pytest.approx(least, abs=1e-9)
            assert problem.price(raised.value.choices)[1] == pytest.approx(least, abs=1e-9)
        else:
            check(problem, cost)
            assert solve(problem).memory <= limit + 1e-9
    assert binding > 100
    assert infeasible > 10


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.booleans())
def test_shifting_every_price_shifts_the_answer(seed, repeats):
    problem, flat = small(np.random.default_rng(seed), repeats)
    least, _, _ = brute_force(problem)
    dearer = replace(problem, nodes=tuple(Node(n.name, n.cost + 1) for n in problem.nodes))
    check(dearer, least + len(flat.nodes))


def test_everything_forbidden():
    never = np.full((2, 2), np.inf)
    with pytest.raises(Infeasible) as raised:
        solve(Problem((Node("a", np.zeros(2)), Node("b", np.zeros(2))), (Edge(0, 1, never),)))
    assert raised.value.least_memory == np.inf


def test_nodes_without_edges_and_without_a_choice():
    problem = Problem((Node("a", np.array([2.0])), Node("b", np.array([3.0, 1.0]))), ())
    assert solve(problem).choices == [0, 1]
    assert solve(Problem((), ())).cost == 0
