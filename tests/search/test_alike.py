"""Alike: copies of a repeat choose the same where that costs nothing, and only there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shardwright.search.alike import alike
from shardwright.search.problem import Edge, Node, Problem, Repeat, Solution
from shardwright.search.solve import solve
from tests.search.random_problems import random_problem


def solution(problem: Problem, choices: list[int | list[int]]) -> Solution:
    cost, memory = problem.price(choices)
    return Solution(choices, cost, cost, memory, "test")


def test_ties_between_copies_end():
    problem = Problem((Node("a", np.zeros(3)), Node("b", np.zeros(3))), (), (Repeat(0, 2, 5),))
    assert alike(problem, solution(problem, [[0, 2, 1, 2, 2], [1, 1, 0, 1, 1]])).choices == [[2] * 5, [1] * 5]


def test_ends_that_have_to_differ_stay():
    problem = Problem((Node("a", np.zeros(2)), Node("before", np.array([0.0, 9.0]))),
                      (Edge(1, 0, 3 * np.array([[0.0, 1.0], [0.0, 0.0]]), scope="first"),), (Repeat(0, 1, 6),))  # fmt: skip
    assert alike(problem, solution(problem, [[0, 1, 1, 0, 1, 1], 0])).choices == [[0, 1, 1, 1, 1, 1], 0]


def test_what_costs_more_is_left_alone():
    layer = Node("a", np.array([0.0, 1.0]), memory=np.array([4.0, 1.0]))
    problem = Problem((layer,), (), (Repeat(0, 1, 4),), limit=10.0)
    found = solution(problem, [[0, 0, 1, 1]])
    assert alike(problem, found) is found
    free = replace(problem, limit=None)
    assert alike(free, found).choices == [[0, 0, 0, 0]]


@pytest.mark.parametrize("seed", range(200))
def test_no_assignment_gets_worse(seed):
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, nodes=5, repeats=True, memory=True, holes=False)
    any_choices: list[int | list[int]] = [
        [int(rng.integers(len(node.cost))) for _ in range(count)] if repeat else int(rng.integers(len(node.cost)))
        for node, count, repeat in zip(problem.nodes, problem.copies, problem.repeat_of)
    ]
    before = solution(problem, any_choices)
    problem = replace(problem, limit=before.memory)
    after = alike(problem, before)
    assert after.cost <= before.cost * (1 + 1e-9)
    assert problem.fits(after.memory)
    assert problem.price(after.choices) == pytest.approx((after.cost, after.memory))


def test_the_search_leaves_no_ties():
    layer = Node("a", np.zeros(4))
    table = np.where(np.eye(4)[[1, 0, 3, 2]] > 0, 1.0, 0.0)  # many cheapest chains
    found = solve(Problem((layer, layer), (Edge(0, 1, table),), (Repeat(0, 2, 9, (Edge(1, 0, table),)),)))
    assert len(set(zip(*found.choices))) == 1  # type: ignore[arg-type]
