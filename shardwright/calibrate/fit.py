"""Fit: fits a machine's numbers so that prices match measured times.

A price is a sum of terms, each proportional to one of the machine's numbers: so many operations at a rate, so many launches.
So it is linear in how many times slower each of the numbers is (:data:`TERMS`), up to where a cheaper algorithm or the other
side of a roofline takes over, and a least-squares fit of relative errors finds those factors. Numbers that the measurements
say nothing about stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from shardwright.ir.machine import Machine

Array = np.ndarray[Any, Any]
Price = Callable[[Machine], float]

# Families that are bound by operations; the others are bound by memory.
_WORKING = ("matmul", "attention", "conv")
# Largest factor by which a fit may change each number. Operators and links can be timed separately, and mostly are; only whole
# steps show the time of collectives where ranks wait for each other, and of a step besides its operators.
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys((*_WORKING, "traffic", "optimizer"), (0.5, 2.0)),
    "operator_launch": (0.2, 5.0),
    "optimizer_launch": (0.1, 10.0),
    "step_launch": (0.1, 10.0),
    "exposed": (0.2, 2.0),
    "collective_launch": (0.5, 100.0),
    "latency": (0.5, 20.0),
    "bandwidth": (0.5, 4.0),
}
# Weight of a factor's start value, as a number of measurements that confirm it.
_HELD = 0.02
_SWEEPS, _REWEIGHTINGS, _ROUNDS = 200, 5, 3
_STEP = 0.05  # relative change of a number to see what depends on it


def _scaled(key: str) -> Callable[[Machine, float], Machine]:
    return lambda machine, factor: replace(machine, **{key: getattr(machine, key) * factor})


def _efficiency(kind: str) -> Callable[[Machine, float], Machine]:
    def change(machine: Machine, factor: float) -> Machine:
        shares = {kind: machine.efficiency.get("default", 1.0), **machine.efficiency}
        changed = {name: share / factor for name, share in shares.items() if name == kind or name.startswith(f"{kind}_")}
        return replace(machine, efficiency={**machine.efficiency, **changed})

    return change


def _exposed(machine: Machine, factor: float) -> Machine:
    """Hides more or less of the gradient reductions' time."""
    return replace(machine, overlap=min(1.0, max(0.0, 1 - (1 - machine.overlap) * factor)))


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


# By name of a term: makes the machine on which it takes so many times as long.
TERMS: dict[str, Callable[[Machine, float], Machine]] = {
    **{kind: _efficiency(kind) for kind in _WORKING},
    "traffic": _traffic,
    "optimizer": _optimizer,
    "operator_launch": _scaled("operator_launch"),
    "optimizer_launch": _scaled("optimizer_launch"),
    "step_launch": _scaled("step_launch"),
    "exposed": _exposed,
    "collective_launch": _scaled("collective_launch"),
    "latency": _links("latency", 1.0),
    "bandwidth": _links("bandwidth", -1.0),
}


def scaled(machine: Machine, factors: dict[str, float]) -> Machine:
    """Returns the machine on which some terms take so many times as long.

    >>> from shardwright.cost.machine_files import load_machine
    >>> scaled(load_machine("h100"), {"operator_launch": 2.0, "bandwidth": 4.0}).levels[0].bandwidth / 1e9
    92.5
    """
    for name, factor in factors.items():
        machine = TERMS[name](machine, factor)
    return machine


def terms_of(price: Price, machine: Machine) -> dict[str, float]:
    """Computes each term's share of a price: what the price grows by when the term grows.

    >>> from shardwright.cost.machine_files import load_machine
    >>> terms = terms_of(lambda m: 3 * m.operator_launch + 1e9 / m.levels[0].bandwidth, load_machine("h100"))
    >>> round(terms["operator_launch"] * 1e6, 3), round(terms["bandwidth"] * 1e6, 3)
    (12.0, 2702.703)
    """
    whole = price(machine)
    return {name: (price(change(machine, 1 + _STEP)) - whole) / _STEP for name, change in TERMS.items()}


def fit_steps(machine: Machine, prices: Sequence[Price], seconds: Sequence[float]) -> Machine:
    """Fits a machine so that its prices come nearest to measured times.

    Rates of operators change by a factor of at most two: they can be timed separately. The time of a collective in a step,
    where ranks wait for each other, may be far from its separate time.

    Args:
        machine: where to start. Numbers that the measurements do not determine stay. A launch that is 0 stays 0.
        prices: for each measured step, a function that prices it on a machine.
        seconds: measured seconds of each.

    >>> from shardwright.cost.machine_files import load_machine
    >>> h100 = load_machine("h100")
    >>> prices = [lambda m, n=n: n * m.operator_launch + 1e9 / m.levels[0].bandwidth for n in (0, 1e2, 1e3)]
    >>> fitted = fit_steps(h100, prices, [0.0027, 0.0028, 0.0037])
    >>> 0.98e-6 < fitted.operator_launch < 1.05e-6
    True
    """
    measured = np.asarray(seconds, dtype=float)
    least, most = (np.array([_RANGES[name][end] for name in TERMS]) for end in (0, 1))
    so_far = np.ones(len(TERMS))
    for _ in range(_ROUNDS):  # which algorithm is the cheapest follows the numbers
        found = [terms_of(price, machine) for price in prices]
        table = np.array([[terms[name] for name in TERMS] for terms in found])
        whole = np.array([price(machine) for price in prices])
        rest = whole - table.sum(axis=1)
        factors = solve_factors(table / measured[:, None], 1 - rest / measured, least / so_far, most / so_far)
        so_far *= factors
        machine = scaled(machine, dict(zip(TERMS, factors.tolist())))
    return machine


class Fit(NamedTuple):
    """A machine fitted to measured times. Has the median relative error of prices before and after."""

    machine: Machine
    before: float
    after: float


def fit_terms(machine: Machine, prices: Sequence[float], terms: Sequence[Mapping[str, float]], seconds: Sequence[float]) -> Fit:
    """Fits a machine like :func:`fit_steps`, only from prices on ``machine`` and their :func:`terms_of`.

    If no machine's prices are nearer, the machine stays as it was.

    Args:
        machine: where to start.
        prices: price of each measured step on ``machine``.
        terms: the terms of each price.
        seconds: measured seconds of each.

    >>> from shardwright.cost.machine_files import load_machine
    >>> h100 = load_machine("h100")
    >>> launches = [{"collective_launch": n * h100.collective_launch} for n in (10, 20, 40)]
    >>> prices = [sum(term.values()) for term in launches]
    >>> fitted = fit_terms(h100, prices, launches, [3 * price for price in prices])
    >>> fitted.before > 0.6, fitted.after < 0.01, round(fitted.machine.collective_launch / h100.collective_launch, 2)
    (True, True, 3.0)
    """
    measured, before = np.asarray(seconds, dtype=float), np.asarray(prices, dtype=float)
    table = np.array([[each.get(name, 0.0) for name in TERMS] for each in terms])
    rest = before - table.sum(axis=1)
    least, most = (np.array([_RANGES[name][end] for name in TERMS]) for end in (0, 1))
    factors = np.ones(len(TERMS))
    for _ in range(_ROUNDS):  # each starts from the result of the one before
        scaled_table = table * factors / measured[:, None]
        factors = factors * solve_factors(scaled_table, 1 - rest / measured, least / factors, most / factors)
    off = [float(np.median(np.abs(found / measured - 1))) for found in (before, rest + table @ factors)]
    if off[1] >= off[0]:
        return Fit(machine, off[0], off[0])
    return Fit(scaled(machine, dict(zip(TERMS, factors.tolist()))), *off)


def solve_factors(table: Array, wanted: Array, least: Array | float = 0.1, most: Array | float = 10.0) -> Array:
    """Finds factors for which ``table @ factors`` is nearest ``wanted``. Errors count absolute, not squared.

    It is least squares by coordinate descent, with weights that are lowered for what is far off, so a step that something
    else disturbed has little weight.

    Args:
        table: one row per measurement, one column per factor.
        wanted: one number per measurement.
        least, most: bounds of each factor.
    """
    count = table.shape[1]
    factors, held = np.ones(count), _HELD * len(table) * np.maximum((table**2).mean(axis=0), 1e-3)
    weights = np.ones(len(table))
    low, high = np.broadcast_to(least, count).tolist(), np.broadcast_to(most, count).tolist()
    for _ in range(_REWEIGHTINGS):
        for _ in range(_SWEEPS):
            for at in range(count):
                column = table[:, at]
                without = wanted - table @ factors + column * factors[at]
                value = (weights @ (column * without) + held[at]) / (weights @ column**2 + held[at])
                factors[at] = min(high[at], max(low[at], value))
        off = np.abs(wanted - table @ factors)
        weights = 1 / np.maximum(off, 0.05) * 0.05
    return factors
