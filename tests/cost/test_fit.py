"""Machines fitted to whole steps: what is found, how far it may go, and what is left alone."""

from __future__ import annotations

import numpy as np
import pytest

from shardwright.calibrate.fit import TERMS, fit_steps, fit_terms, scaled, terms_of
from shardwright.cost.machine_files import load_machine
from shardwright.ir.machine import Machine

BASE = load_machine("a100")


def steps(count: int = 12):
    """Prices of made-up steps: so many launches, so much work, so many bytes."""
    draw = np.random.default_rng(0)

    def step(launches: float, work: float, sent: float):
        def price(machine: Machine) -> float:
            level = machine.levels[0]
            moving = launches * machine.collective_launch + sent / level.bandwidth
            return float(moving + work / machine.rate("matmul", "float32"))

        return price

    return [step(*row) for row in draw.uniform((10, 1e9, 1e7), (100, 1e10, 1e8), (count, 3))]


def fit(machine, prices, truth):
    seconds = [price(truth) for price in prices]
    return fit_terms(machine, [p(machine) for p in prices], [terms_of(p, machine) for p in prices], seconds)


def test_what_steps_tell_is_found_by_either_way():
    truth = scaled(BASE, {"collective_launch": 8.0, "matmul": 1.5, "bandwidth": 2.0})
    prices = steps()
    found = fit(BASE, prices, truth)
    assert found.before > 0.3
    assert found.after < 0.02
    for machine in (found.machine, fit_steps(BASE, prices, [price(truth) for price in prices])):
        assert machine.collective_launch == pytest.approx(truth.collective_launch, rel=0.1)
        assert machine.rate("matmul", "float32") == pytest.approx(truth.rate("matmul", "float32"), rel=0.1)
        assert machine.memory_bandwidth == BASE.memory_bandwidth, "no step depends on it"


def test_rates_that_can_be_timed_alone_move_by_a_factor_of_two_at_most():
    found = fit(BASE, steps(), scaled(BASE, {"matmul": 9.0}))
    assert found.machine.rate("matmul", "float32") == pytest.approx(BASE.rate("matmul", "float32") / 2)


def test_a_machine_that_is_right_is_left_alone():
    prices = steps()
    found = fit_terms(BASE, [p(BASE) for p in prices], [dict.fromkeys(TERMS, 0.0)] * len(prices), [p(BASE) for p in prices])
    assert found == (BASE, 0.0, 0.0)


def test_the_efficiencies_of_all_dtypes_of_a_family_are_moved():
    base = load_machine("cpu-gloo")
    slower = scaled(base, {"conv": 2.0})
    for dtype in ("float32", "bfloat16"):
        assert slower.rate("conv", dtype) == pytest.approx(base.rate("conv", dtype) / 2)
    assert slower.rate("matmul", "float32") == base.rate("matmul", "float32")
    assert scaled(BASE, {"attention": 2.0}).rate("attention", "float16") == pytest.approx(BASE.rate("attention", "float16") / 2)
