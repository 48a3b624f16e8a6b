"""Fit: what a machine's numbers must be for prices to be the times that were measured.

A price is a sum of terms, each as long as one of the machine's numbers says: so many operations at a rate, so many launches.
So it is linear in how many times slower each of the numbers is (:data:`TERMS`), up to where a cheaper algorithm or the other
side of a roofline takes over, and a least-squares fit of relative errors finds those factors. Numbers that the measurements
say nothing about stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from shardwright.cost.machine import Machine

Array = np.ndarray[Any, Any]
Price = Callable[[Machine], float]

# Families that operations bound; the memory bounds the others.
_WORKING = ("matmul", "attention", "conv")
# How much a factor is held at what it was: as much as so many measurements that say it is right.
_HELD = 0.02
_SWEEPS, _REWEIGHTINGS, _ROUNDS = 200, 5, 3
_STEP = 0.05  # by how much a number is changed to see what depends on it


def _scaled(key: str) -> Callable[[Machine, float], Machine]:
    return lambda machine, factor: replace(machine, **{key: getattr(machine, key) * factor})


def _efficiency(kind: str) -> Callable[[Machine, float], Machine]:
    def change(machine: Machine, factor: float) -> Machine:
        share = machine.efficiency.get(kind, machine.efficiency.get("default", 1.0))
        return replace(machine, efficiency={**machine.efficiency, kind: share / factor})

    return change


def _traffic(machine: Machine, factor: float) -> Machine:
    rates = {kind: rate if kind == "optimizer" else rate / factor for kind, rate in machine.rates.items()}
    rates.setdefault("optimizer", machine.memory_bandwidth)
    return replace(machine, rates=rates, memory_bandwidth=machine.memory_bandwidth / factor)


def _optimizer(machine: Machine, factor: float) -> Machine:
    return replace(machine, rates={**machine.rates, "optimizer": machine.bandwidth_of("optimizer") / factor})


def _links(key: str, power: float) -> Callable[[Machine, float], Machine]:
    def change(machine: Machine, factor: float) -> Machine:
        levels = tuple(replace(level, **{key: getattr(level, key) * factor**power}) for level in machine.levels)
        return replace(machine, levels=levels)

    return change


# What makes a step slower, by name: a machine on which it takes so many times as long.
TERMS: dict[str, Callable[[Machine, float], Machine]] = {
    **{kind: _efficiency(kind) for kind in _WORKING},
    "traffic": _traffic,
    "optimizer": _optimizer,
    "operator_launch": _scaled("operator_launch"),
    "optimizer_launch": _scaled("optimizer_launch"),
    "step_launch": _scaled("step_launch"),
    "collective_launch": _scaled("collective_launch"),
    "latency": _links("latency", 1.0),
    "bandwidth": _links("bandwidth", -1.0),
}


def scaled(machine: Machine, factors: dict[str, float]) -> Machine:
    """The machine on which some terms take so many times as long.

    >>> from shardwright.cost.machine import load_machine
    >>> scaled(load_machine("h100"), {"operator_launch": 2.0, "bandwidth": 4.0}).levels[0].bandwidth / 1e9
    92.5
    """
    for name, factor in factors.items():
        machine = TERMS[name](machine, factor)
    return machine


def terms_of(price: Price, machine: Machine) -> dict[str, float]:
    """How much of a price each term is: what it grows by where the term grows.

    >>> from shardwright.cost.machine import load_machine
    >>> terms = terms_of(lambda m: 3 * m.operator_launch + 1e9 / m.levels[0].bandwidth, load_machine("h100"))
    >>> round(terms["operator_launch"] * 1e6, 3), round(terms["bandwidth"] * 1e6, 3)
    (12.0, 2702.703)
    """
    whole = price(machine)
    return {name: (price(change(machine, 1 + _STEP)) - whole) / _STEP for name, change in TERMS.items()}


def fit_steps(machine: Machine, prices: Sequence[Price], seconds: Sequence[float]) -> Machine:
    """The machine whose prices come nearest to times that were measured.

    Args:
        machine: where to start: what the measurements do not tell is as here. A launch that is 0 stays 0.
        prices: what each measured step costs on a machine.
        seconds: what it took.

    >>> from shardwright.cost.machine import load_machine
    >>> h100 = load_machine("h100")
    >>> prices = [lambda m, n=n: n * m.operator_launch + 1e9 / m.levels[0].bandwidth for n in (0, 1e2, 1e3)]
    >>> fitted = fit_steps(h100, prices, [0.0027, 0.0028, 0.0037])
    >>> 0.98e-6 < fitted.operator_launch < 1.05e-6
    True
    """
    measured = np.asarray(seconds, dtype=float)
    for _ in range(_ROUNDS):  # which algorithm is the cheapest follows the numbers
        found = [terms_of(price, machine) for price in prices]
        table = np.array([[terms[name] for name in TERMS] for terms in found])
        whole = np.array([price(machine) for price in prices])
        rest = whole - table.sum(axis=1)
        factors = solve_factors(table / measured[:, None], 1 - rest / measured)
        machine = scaled(machine, dict(zip(TERMS, factors.tolist())))
    return machine


def solve_factors(table: Array, wanted: Array) -> Array:
    """Positive factors for which ``table @ factors`` is nearest ``wanted``, by absolute rather than squared errors.

    Least squares by coordinate descent, the weights of what is far off lowered from time to time; so a step that something
    else disturbed has little say.
    """
    count = table.shape[1]
    factors, held = np.ones(count), _HELD * len(table) * np.maximum((table**2).mean(axis=0), 1e-3)
    weights = np.ones(len(table))
    for _ in range(_REWEIGHTINGS):
        for _ in range(_SWEEPS):
            for at in range(count):
                column = table[:, at]
                without = wanted - table @ factors + column * factors[at]
                value = (weights @ (column * without) + held[at]) / (weights @ column**2 + held[at])
                factors[at] = min(10.0, max(0.1, value))
        off = np.abs(wanted - table @ factors)
        weights = 1 / np.maximum(off, 0.05) * 0.05
    return factors
