"""Redistributions on real gloo ranks: bit for bit what the simulated world computes, forward and gradient."""

from __future__ import annotations

import random

import pytest
import torch
from world.test_distributed import run_job

from shardwright import Layout, Mesh
from shardwright.errors import StrategyError, WorldError
from shardwright.world.simulated.world import SimulatedWorld


def random_mesh(draw, size, everyone):
    """A mesh over all ranks or some, factored and ordered at random."""
    count = size if everyone else draw.randint(1, size)
    sizes = draw.choice([(count,), *((d, count // d) for d in range(2, count) if count % d == 0)])
    return Mesh(("a", "b")[: len(sizes)], sizes, tuple(draw.sample(range(size), count)))


def random_layout(draw, mesh, shape, pending):
    dims, partial = [[] for _ in shape], []
    op = draw.choice(["sum", "sum", "max", "min"])
    for axis in draw.sample(mesh.axes, len(mesh.axes)):
        at = draw.randint(-2 if pending else -1, len(shape) - 1)
        if at >= 0:
            dims[at].append(axis)
        elif at == -2:
            partial.append((axis, op))
    sizes = []
    for axes, size in zip(dims, shape, strict=True):
        count = mesh.count(axes)
        cuts = sorted(draw.randint(0, size) for _ in range(count - 1))
        explicit = tuple(b - a for a, b in zip([0, *cuts], [*cuts, size], strict=True))
        sizes.append(explicit if axes and draw.random() < 0.3 else None)
    return Layout.of(mesh, dims, partial, sizes)


def pieces(layout, shape, size, seed, dtype):
    """What every rank holds: replicas the same, parts of a pending sum each their own."""
    values = [None] * size
    for rank in layout.mesh.ranks:
        coordinates = layout.mesh.coordinates(rank)
        part = sum(7**i * coordinates[a] for i, a in enumerate(layout.partial_axes))
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(seed + part)).to(dtype)
        values[rank] = whole[layout.slices(shape)[rank]].clone()
    return values


def random_redistributions(world):
    for seed in range(60):
        draw = random.Random(seed)
        everyone = seed % 3 > 0
        shape = tuple(draw.choice([1, 3, 8, 24, 33]) for _ in range(draw.randint(1, 3)))
        dtype = draw.choice([torch.float32, torch.float32, torch.bfloat16, torch.float64])
        source = random_layout(draw, random_mesh(draw, world.size, everyone), shape, pending=True)
        target = random_layout(draw, random_mesh(draw, world.size, everyone), shape, pending=False)
        free = [a for a in target.mesh.axes if a not in target.split_axes]
        reduced = tuple(a for a in free if draw.random() < 0.5) if everyone else ()
        values = pieces(source, shape, world.size, seed, dtype)
        with_gradient = everyone and all(op == "sum" for _, op in source.partial)
        expected = [None if v is None else v.clone().requires_grad_(with_gradient) for v in values]
        after = SimulatedWorld(world.size).redistribute(expected, source, target, shape, reduced)
        mine = values[world.rank]
        if mine is not None:
            mine.requires_grad_(with_gradient)
        got = world.redistribute(mine, source, target, shape, reduced, dtype=dtype)
        what = f"seed {seed}: {source} -> {target}, {shape} {dtype}, rank {world.rank}"
        if after[world.rank] is None:
            assert got is None, what
        else:
            assert torch.equal(got, after[world.rank]), what
        if with_gradient:
            gradients = pieces(target.with_partial(reduced), shape, world.size, seed + 1000, dtype)
            torch.autograd.backward(after, gradients)
            got.backward(gradients[world.rank])
            assert torch.equal(mine.grad, expected[world.rank].grad), f"gradient, {what}"


def what_is_refused(world):
    rows = Layout((world.size,), ("x",))("x", "None")
    with pytest.raises(WorldError, match=r"rank \d hands in a tensor of shape \[3, 3\], but its piece of \[8, 4\]"):
        world.redistribute(torch.ones(3, 3), rows, rows.replicated(rows.mesh, 2), (8, 4))
    beyond = Layout((world.size,), ("x",), list(range(1, world.size + 1)))("x")
    with pytest.raises(StrategyError, match=rf"ranks \[{world.size}\], this world has ranks 0 to {world.size - 1}"):
        world.redistribute(torch.ones(1), beyond, beyond, (world.size,))
    with pytest.raises(StrategyError, match="leaves a reduction pending that the source"):
        world.redistribute(
            torch.ones(8), Layout.replicated(rows.mesh, 1), Layout.replicated(rows.mesh, 1).with_partial(("x",)), (8,)
        )
    largest = Layout.replicated(rows.mesh, 1).with_partial(("x",), "max")
    with pytest.raises(WorldError, match="no gradient through the pending max"):
        world.redistribute(torch.ones(8, requires_grad=True), largest, largest.without_partial(), (8,))
    first = Layout.replicated(Mesh(("one",), (1,), (0,)), 1)
    everyone = Layout.replicated(rows.mesh, 1)
    if world.rank:
        with pytest.raises(WorldError, match="give the tensor's dtype"):
            world.redistribute(None, first, everyone, (4,))
    else:
        with pytest.raises(WorldError, match="has no backward"):
            world.redistribute(torch.ones(4, requires_grad=True), first, everyone, (4,))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_real_ranks_equal_simulated_ones(size):
    run_job(size, random_redistributions, what_is_refused)
