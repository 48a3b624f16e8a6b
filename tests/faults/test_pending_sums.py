"""Pending sums that become pieces of given sizes: every rank ends with its piece of the sum, or is told why not."""

from __future__ import annotations

import random

import pytest
import torch
from faults.generated import ALL_SIZES
from redistribute.test_steps import check
from torch import nn
from world.test_distributed import run_job

import shardwright as sw
from shardwright import Layout, Mesh
from shardwright.errors import WorldError
from shardwright.redistribute.planner import Options
from shardwright.world.execute.summation import prepare_reduce, reduce
from shardwright.world.simulated.world import SimulatedWorld


def _sizes(draw, count, size):
    cuts = sorted(draw.randint(0, size) for _ in range(count - 1))
    return tuple(b - a for a, b in zip([0, *cuts], [*cuts, size], strict=True))


def random_layouts(draw):
    """A layout with pending sums and one of explicit sizes, over one mesh or two."""
    sizes = draw.choice([(2, 2), (2, 3), (3, 2), (2, 2, 2), (4,), (6,)])
    mesh = Mesh(tuple("abc"[: len(sizes)]), sizes)
    shape = tuple(draw.choice([1, 4, 5, 9, 12]) for _ in range(draw.randint(1, 3)))
    pending = draw.sample(mesh.axes, draw.randint(1, len(mesh.axes)))
    dims = [[] for _ in shape]
    for axis in mesh.axes:
        if axis not in pending and draw.random() < 0.7:
            dims[draw.randrange(len(shape))].append(axis)
    source_sizes = [_sizes(draw, mesh.count(a), n) if a and draw.random() < 0.4 else None for a, n in zip(dims, shape)]
    source = Layout.of(mesh, dims, [(a, "sum") for a in pending], source_sizes)
    goal = [[] for _ in shape]
    for axis in draw.sample(mesh.axes, len(mesh.axes)):
        if draw.random() < 0.8:
            goal[draw.randrange(len(shape))].append(axis)
    target_sizes = [_sizes(draw, mesh.count(a), n) if a and draw.random() < 0.8 else None for a, n in zip(goal, shape)]
    return source, Layout.of(mesh, goal, (), target_sizes), shape


@pytest.mark.parametrize("seed", range(600 if ALL_SIZES else 150))
def test_simulated(seed):
    draw = random.Random(seed)
    source, target, shape = random_layouts(draw)
    check(source, target, shape, Options(enable_alltoall=seed % 4 > 0))


def on_real_ranks(world):
    for seed in range(400 if ALL_SIZES else 100):
        source, target, shape = random_layouts(random.Random(seed))
        if source.mesh.size != world.size:
            continue
        generator = torch.Generator().manual_seed(seed)
        values = [torch.randn(source.local_shape(shape, r), generator=generator) for r in range(world.size)]
        expected = SimulatedWorld(world.size).redistribute(values, source, target, shape)[world.rank]
        got = world.redistribute(values[world.rank].clone(), source, target, shape)
        assert torch.equal(got, expected), f"seed {seed}: {source} -> {target}, {shape}, rank {world.rank}"


def test_on_real_ranks():
    run_job(4, on_real_ranks)


@pytest.mark.parametrize("rows", [8, 9, 10, 13, 14])
@pytest.mark.parametrize(("width", "length"), [(9, 5), (11, 4), (33, 3), (8, 5)])
def test_an_embedding_split_both_ways(rows, width, length):
    sw.init(devices=4)
    grid = sw.Layout((2, 2), ("a", "b"))
    model = nn.Sequential(nn.Embedding(11, width), nn.ReLU())
    ids = torch.randint(11, (rows, length))
    net = sw.AutoParallel(model).shard({"0.weight": grid("b", "a")}).dataset_strategy("data_parallel")
    torch.testing.assert_close(net(ids), model(ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shapes", [((3,), (1,)), ((1,), (3,)), ((2, 3), (3,))])
def test_parts_of_different_shapes_are_refused(shapes, dtype):
    parts = [torch.ones(shape, dtype=dtype) for shape in (*shapes, shapes[0])]
    with pytest.raises(WorldError, match="different shapes"):
        reduce(parts, "sum")
    with pytest.raises(WorldError, match="different shapes"):
        prepare_reduce(dtype, "sum", 3)(parts, torch.ones(shapes[0], dtype=dtype))
    with pytest.raises(WorldError, match="different shapes"):
        prepare_reduce(dtype, "sum", 2)([parts[0], parts[0].clone()], torch.ones(7, dtype=dtype))
