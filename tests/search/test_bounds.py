"""Where the graph is too wide the bound holds, and HiGHS finds the optimum between bound and cost."""

from __future__ import annotations

import time

import numpy as np
import pytest

from shardwright.search.bounds import Relaxation
from shardwright.search.branch import Branching
from shardwright.search.integer_program import solve_integer_program
from shardwright.search.rounding import Moves, as_arrays, as_choices, decode
from shardwright.search.solve import solve
from shardwright.search.unlimited import _Search
from tests.search.layered import transformer
from tests.search.random_problems import brute_force, complete, grid, random_problem


def test_a_relaxation_proves_no_more_than_is_true():
    rng = np.random.default_rng(0)
    tight = tried = 0
    for n in range(200):
        problem = random_problem(rng, nodes=4, repeats=bool(n % 2))
        if sum(problem.copies) > 9:
            continue
        least, _, _ = brute_force(problem)
        relaxation = Relaxation(problem)
        bound = -np.inf
        for _ in range(6):
            relaxation.sweep()
            bound = max(bound, relaxation.bound())
        assert bound <= least + 1e-9 * max(1.0, abs(least))
        tried, tight = tried + np.isfinite(least), tight + (bound > least - 1e-6)
    assert tight > 0.8 * tried


@pytest.mark.parametrize("seed", range(20))
def test_searching_by_bounds_ends_at_the_optimum_of_small_problems(seed):
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, nodes=5, repeats=bool(seed % 2), density=1.0, holes=False)
    choices, bound = _Search(problem, 0.0, time.monotonic() + 10).run()
    least = solve_integer_program(problem).cost
    assert problem.price(choices)[0] == pytest.approx(least)
    assert bound == pytest.approx(least)


@pytest.mark.parametrize("seed", range(5))
def test_single_moves_never_make_it_dearer(seed):
    problem = random_problem(np.random.default_rng(seed), nodes=8, repeats=True, holes=False)
    picked = decode(Relaxation(problem))
    before, _ = problem.price(as_choices(problem, picked))
    moves = Moves(problem)
    moves.descend(picked)
    after, _ = problem.price(as_choices(problem, picked))
    assert after <= before + 1e-12
    for node in range(8):
        cost, _ = moves.local(node, picked)
        if not moves.touches_itself[node]:
            assert (cost.min(axis=1) >= cost[np.arange(len(cost)), picked[node]] - 1e-9).all()


def test_a_grid():
    problem = grid(np.random.default_rng(0), side=8, choices=10)
    solution = solve(problem, gap=0.02, seconds=6)
    assert solution.method == "bounds"
    assert 0 < solution.gap <= 0.02
    referee = solve_integer_program(problem, seconds=15)
    assert solution.bound <= referee.cost + 1e-6
    assert referee.bound <= solution.cost + 1e-6


def test_a_complete_graph():
    problem = complete(np.random.default_rng(1), nodes=12, choices=10)
    solution = solve(problem, seconds=2)
    assert 0 < solution.gap < 0.5
    assert solution.cost == pytest.approx(problem.price(solution.choices)[0])
    referee = solve_integer_program(problem, seconds=3)  # no optimum in minutes, but what it proves must agree
    assert solution.bound <= referee.cost + 1e-6
    assert referee.bound <= solution.cost + 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_a_smaller_complete_graph_against_highs(seed):
    problem = complete(np.random.default_rng(seed), nodes=8, choices=4)
    referee = solve_integer_program(problem)
    choices, bound = _Search(problem, 0.3, time.monotonic() + 5).run()
    cost, _ = problem.price(choices)
    assert bound <= referee.cost + 1e-9
    assert referee.cost <= cost + 1e-9


def test_branching_on_a_complete_graph():
    problem = complete(np.random.default_rng(7), nodes=7, choices=6)
    best = solve_integer_program(problem)

    def offer(picked):
        return problem.price(picked)[0]

    start = offer(as_arrays([0] * 7))
    assert Branching(Relaxation(problem), start, offer, time.monotonic() + 10).run(0.0) == pytest.approx(best.cost)


@pytest.mark.parametrize("seed", range(30))
def test_forbidden_pairs(seed):
    problem = random_problem(np.random.default_rng(seed), nodes=6, repeats=bool(seed % 2), density=0.8, holes=True)
    if sum(problem.copies) > 9:
        return
    least, _, _ = brute_force(problem)
    choices, bound = _Search(problem, 0.0, time.monotonic() + 5).run()
    assert problem.price(choices)[0] >= least - 1e-9
    assert bound <= least + 1e-9


def test_values_that_all_layers_read():
    problem = transformer(8, 12, length=24, read=3)
    choices, bound = _Search(problem, 0.0, time.monotonic() + 10).run()
    optimum = solve(problem).cost
    assert bound <= optimum + 1e-9
    assert problem.price(choices)[0] <= 1.01 * optimum
