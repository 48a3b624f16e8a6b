"""Prices of redistributions in closed form against the steps that the planner takes."""

from __future__ import annotations

import itertools
import math
import random
import time

import numpy as np
import pytest

from shardwright.cost.communication import Communication
from shardwright.cost.machine_files import load_machine
from shardwright.ir.layout import Layout
from shardwright.ir.machine import Level, Machine
from shardwright.ir.mesh import Mesh
from shardwright.redistribute.links import machine_links
from shardwright.redistribute.planner import Options
from shardwright.redistribute.steps import steps_between
from shardwright.redistribute.volume import lower_bound


def machine_of(*levels: tuple[int, float, float], launch: float = 8e-6) -> Machine:
    found = tuple(Level(f"level {i}", *level) for i, level in enumerate(levels))
    return Machine("test", "", {"float32": 1e12}, {}, 0.0, 1e12, 1e-6, launch, found)


MACHINES = (
    load_machine("h100"),
    machine_of((0, 1e-4, 8e8), launch=1.5e-4),
    machine_of((4, 2e-6, 3e11), (0, 8e-6, 2e10)),
    machine_of((2, 2e-6, 3e11), (4, 4e-6, 1e11), (0, 8e-6, 2e10)),
)
MESHES = tuple(Mesh(tuple("abc"[: len(sizes)]), sizes) for sizes in ((2, 2), (4, 2), (2, 2, 2), (2, 3, 2)))


def layout_of(code, ndim, mesh):
    dims = [[axis for axis, at in zip(mesh.axes, code) if at == d] for d in range(ndim)]
    return Layout.of(mesh, dims, [(axis, "sum") for axis, at in zip(mesh.axes, code) if at == -2])


def pairs(count, seed, even=True):
    """Random machines, meshes, shapes and pairs of layouts; the target makes no sum pending."""
    rng = random.Random(seed)
    for _ in range(count):
        machine, mesh, ndim = rng.choice(MACHINES), rng.choice(MESHES), rng.choice([1, 2, 3])
        shape = tuple(mesh.size * 2 ** rng.randint(0, (0, 14, 8, 5)[ndim]) - (not even) for _ in range(ndim))
        source = [rng.randint(-2, ndim - 1) for _ in mesh.sizes]
        target = [t if t > -2 or s == -2 else -1 for s, t in zip(source, (rng.randint(-2, ndim - 1) for _ in mesh.sizes))]
        yield machine, mesh, shape, source, target


def test_prices_are_those_of_the_planner():
    ratios = []
    for machine, mesh, shape, source, target in pairs(900, seed=1):
        moves = Communication(machine, mesh).moves(shape, 4, np.array([source]), np.array([target]))
        seconds, sent = float(moves.seconds[0, 0]), float(moves.bytes[0, 0])
        links = machine_links(machine, mesh)
        here, there = layout_of(source, len(shape), mesh), layout_of(target, len(shape), mesh)
        planned = sum(links.seconds(step, shape, 4) for step in steps_between(here, there, shape, Options(links, 4)))
        assert (seconds > 0) == (planned > 0), (mesh, source, target)
        assert sent >= lower_bound(here, there, shape) * 4 / mesh.size * (1 - 1e-9)
        if planned:
            ratios.append(seconds / planned)
    ratios.sort()
    assert ratios[len(ratios) // 2] == pytest.approx(1)
    assert np.mean([1 / 1.1 < ratio < 1.1 for ratio in ratios]) > 0.95
    assert np.mean([1 / 1.02 < ratio < 1.02 for ratio in ratios]) > 0.92
    assert ratios[0] > 0.5


def test_described_steps_add_up_to_the_price():
    for machine, mesh, shape, source, target in [*pairs(150, seed=2), *pairs(150, seed=3, even=False)]:
        prices = Communication(machine, mesh)
        moves = prices.moves(shape, 4, np.array([source]), np.array([target]))
        steps = prices.describe(shape, 4, source, target)
        assert sum(s.seconds for s in steps) == pytest.approx(float(moves.seconds[0, 0]), rel=0.02)
        assert all(set(s.axes) <= set(mesh.axes) and s.axes for s in steps)


def test_a_price_does_not_depend_on_which_dim_is_which():
    """Of a table, pairs that differ in the order of dims only have one price; each of them must be worth that alone."""
    mesh = Mesh(("a", "b", "c"), (2, 4, 8))
    codes = np.array(list(itertools.product(range(-2, 2), repeat=3)), dtype=np.int8)
    targets = codes[(codes != -2).all(axis=1)]
    prices = Communication(load_machine("h100"), mesh)
    table = prices.moves((4096, 8192), 2, codes, targets).seconds
    for s, t in itertools.product(range(len(codes)), range(len(targets))):
        if np.isfinite(table[s, t]):
            steps = prices.describe((4096, 8192), 2, codes[s], targets[t])
            assert sum(step.seconds for step in steps) == pytest.approx(table[s, t]), (codes[s], targets[t])


def test_a_table_is_what_its_pairs_are_alone():
    mesh = MESHES[-1]
    codes = np.array(list(itertools.product(range(-2, 2), repeat=3)), dtype=np.int8)
    table = Communication(MACHINES[2], mesh).moves((24, 50), 2, codes, codes[::-1])
    rng = random.Random(4)
    for _ in range(60):
        s, t = rng.randrange(len(codes)), rng.randrange(len(codes))
        alone = Communication(MACHINES[2], mesh).moves((24, 50), 2, codes[s][None], codes[::-1][t][None])
        assert table.seconds[s, t] == pytest.approx(alone.seconds[0, 0])
        assert table.bytes[s, t] == pytest.approx(alone.bytes[0, 0])


def test_what_is_free_and_what_cannot_be():
    prices = Communication(load_machine("h100"), Mesh(("dp", "tp"), (4, 8)))

    def seconds(source, target):
        return float(prices.moves((64, 64), 4, np.array([source]), np.array([target])).seconds[0, 0])

    assert seconds((-1, -1), (0, 1)) == 0.0, "a slice"
    assert seconds((0, -1), (0, 0)) == 0.0, "a slice below a split that stays"
    assert seconds((-1, 0), (0, 0)) > 0.0, "a slice above one: the pieces are others"
    assert seconds((-2, 0), (-2, 0)) == 0.0, "sums may stay pending"
    assert math.isinf(seconds((-1, 0), (-2, 0))), "a sum is never invented"


def test_sums_of_replicas_are_shared_over_the_fast_links():
    prices = Communication(load_machine("h100"), Mesh(("dp", "tp"), (4, 8)))
    steps = prices.describe((4096, 4096), 4, (-2, -1), (-1, -1))
    assert [str(step) for step in steps] == ["all_reduce(dp)", "all_gather(tp)"]
    assert steps[0].bytes == pytest.approx(4096 * 4096 * 4 / 8 * 2 * 3 / 4)


def test_single_collectives():
    prices = Communication(machine_of((0, 1e-6, 1e9), launch=1e-5), Mesh(("a", "b"), (2, 4)))
    assert prices.all_gather(1e8, (1,)) == pytest.approx(1e-5 + 2e-6 + 0.075)
    assert prices.reduce_scatter(1e8, (1,)) == pytest.approx(1e-5 + 2e-6 + 0.075)
    assert prices.all_reduce(1e8, (1,)) == pytest.approx(1e-5 + 4e-6 + 0.15)
    assert prices.all_reduce(1e8, (0, 1)) == pytest.approx(1e-5 + 6e-6 + 0.175)
    assert prices.all_reduce(np.array([0.0, 8.0]), (0,)) == pytest.approx([1.1e-5, 1.1e-5 + 8e-9])
    assert prices.all_reduce(1e8, ()) == 0.0


def test_axes_of_size_one_cost_nothing():
    prices = Communication(load_machine("h100"), Mesh(("a", "b"), (1, 4)))
    moves = prices.moves((8, 8), 4, np.array([[0, 1], [-2, 1]]), np.array([[-1, 1]]))
    assert moves.seconds.tolist() == [[0.0], [0.0]]


def best_of(call, times=5):
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (64, 8, 32)])
def test_whole_tables_are_fast_and_do_not_grow_with_the_ranks(sizes):
    mesh = Mesh(("a", "b", "c"), sizes)
    codes = np.array(list(itertools.product(range(-2, 3), repeat=3)), dtype=np.int8)
    prices = Communication(load_machine("h100"), mesh)
    some, others = codes[::5], codes[2::5]
    small = best_of(lambda: prices.moves((1024, 2048, 512), 2, some, others))
    large = best_of(lambda: prices.moves((1024, 2048, 512), 2, codes, codes))
    first = best_of(lambda: Communication(load_machine("h100"), mesh).moves((1024, 2048, 512), 2, codes, codes), 3)
    assert small < 1e-3, "0.1 ms where nothing else runs"
    assert large < 5e-3, "0.3 ms where nothing else runs"
    assert first < 0.1, "15 ms where nothing else runs"
