"""HiGHS and search agree: they share nothing but the statement of the problem."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shardwright.search.integer_program import solve_integer_program
from shardwright.search.problem import Infeasible, Node, Problem
from shardwright.search.solve import solve
from tests.search.layered import transformer
from tests.search.random_problems import random_problem

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("seed", range(15))
def test_medium_random_problems(seed):
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, nodes=14, choices=5, repeats=bool(seed % 2), density=0.25, holes=False)
    solution, referee = solve(problem), solve_integer_program(problem)
    assert solution.gap == 0
    assert solution.cost == pytest.approx(referee.cost)
    assert referee.bound <= referee.cost


def test_layers():
    problem = transformer(5, 4, length=24)
    assert solve(problem).cost == pytest.approx(solve_integer_program(problem).cost)


def test_nothing_is_allowed():
    with pytest.raises(Infeasible):
        solve_integer_program(Problem((Node("a", np.array([np.inf])),), ()))


def test_nothing_is_within_the_limit():
    problem = Problem((Node("a", np.zeros(2), np.array([3.0, 2.0])),), (), limit=1.0)
    with pytest.raises(Infeasible) as raised:
        solve_integer_program(problem)
    assert raised.value.least_memory == 2.0


def test_search_loads_neither_torch_nor_scipy():
    # `shardwright` itself imports torch, so the folder is loaded without it.
    code = (
        "import sys, types, pathlib\n"
        "package = types.ModuleType('shardwright'); package.__path__ = [str(pathlib.Path('shardwright').resolve())]\n"
        "sys.modules['shardwright'] = package\n"
        "import shardwright.search.solve, shardwright.search.integer_program\n"
        "print([name for name in ('torch', 'scipy') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr
