"""Limits on memory: the bound holds, the gap is small, copies differ where that pays."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shardwright.search.integer_program import solve_integer_program
from shardwright.search.problem import Infeasible, Node, Problem, Repeat
from shardwright.search.solve import solve
from tests.search.layered import transformer
from tests.search.random_problems import random_problem


def limited(problem: Problem, part: float) -> Problem:
    """With a limit between the least memory and what the cheapest assignment takes."""
    least, free = solve(problem.memory_alone()).cost, solve(problem).memory
    return replace(problem, limit=least + part * (free - least))


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("count", [32, 1000])
def test_layers(part, count):
    problem = limited(transformer(12, count, length=30, memory=True), part)
    solution = solve(problem, gap=0.01, seconds=20)
    assert solution.gap <= 0.01
    assert solution.memory <= problem.limit
    assert problem.price(solution.choices) == pytest.approx((solution.cost, solution.memory))


def test_copies_take_different_choices():
    layer = Node("layer", np.array([1.0, 2.0]), np.array([5.0, 2.0]))
    solution = solve(Problem((layer,), (), (Repeat(0, 1, 32, ()),), limit=20 * 5 + 12 * 2))
    assert solution.cost == 20 * 1 + 12 * 2
    assert solution.gap == 0
    assert sorted(solution.choices[0]) == [0] * 20 + [1] * 12


@pytest.mark.parametrize("seed", range(12))
def test_against_highs(seed):
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, nodes=9, choices=5, repeats=bool(seed % 2), memory=True, density=0.3, holes=False)
    problem = limited(problem, 0.5)
    referee = solve_integer_program(problem, seconds=20)
    solution = solve(problem, gap=0.02, seconds=5)
    assert solution.bound <= referee.cost + 1e-6 * abs(referee.cost)
    assert referee.bound <= solution.cost + 1e-6 * abs(referee.cost)
    assert solution.gap <= 0.02


def test_the_least_memory_is_just_enough():
    problem = transformer(6, 8, length=24, memory=True)
    least = solve(problem.memory_alone()).cost
    assert solve(replace(problem, limit=least), gap=0.01).memory == pytest.approx(least)
    with pytest.raises(Infeasible) as raised:
        solve(replace(problem, limit=0.999 * least))
    assert raised.value.least_memory == pytest.approx(least)


def test_a_limit_that_does_not_bind():
    problem = transformer(6, 8, length=24, memory=True)
    assert solve(replace(problem, limit=1e9)).cost == solve(problem).cost
