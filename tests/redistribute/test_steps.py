"""Every redistribution, forward and backward, on the simulated world: each rank ends with its piece of the whole."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright import Layout, Mesh
from shardwright.ir import rank_groups
from shardwright.ir.instructions import Move
from shardwright.redistribute.steps import DEFAULT, redistribution, steps_between
from shardwright.redistribute.volume import sent_elements
from shardwright.world.simulated.moves import SimulatedMove
from shardwright.world.simulated.steps import run_steps


def spread(layout, whole, seed=0):
    """What each rank holds: its piece, or, along partial axes, random parts that add up to it."""
    generator = torch.Generator().manual_seed(seed)
    mesh = layout.mesh
    axes = layout.partial_axes
    parts = {}
    keys = [tuple(mesh.coordinates(r)[a] for a in axes) for r in range(mesh.size)]
    for key in sorted(set(keys)):
        parts[key] = torch.randint(-9, 9, whole.shape, generator=generator).to(whole.dtype)
    last = max(parts)
    parts[last] = whole - sum((p for k, p in parts.items() if k != last), torch.zeros_like(whole))
    slices = layout.slices(whole.shape)
    return [parts[keys[r]][slices[r]].clone() for r in range(mesh.size)]


def check(source, target, shape, options=DEFAULT):
    whole = torch.arange(1.0, 1 + torch.tensor(shape).prod()).reshape(shape).double()
    steps = steps_between(source, target, shape, options)
    got = run_steps(spread(source, whole), steps, shape)
    if target.partial:
        target_whole = run_steps(got, steps_between(target, target.without_partial(), shape), shape)
        got, target = target_whole, target.without_partial()
    for rank, piece in target.slices(shape).items():
        assert torch.equal(got[rank], whole[piece]), f"{source} -> {target}: {[str(s) for s in steps]} rank {rank}"


def all_layouts(mesh, ndim=2, partial=True):
    kinds = [*range(ndim), None, *(["sum"] if partial else [])]
    for assignment in itertools.product(kinds, repeat=len(mesh.axes)):
        dims = [tuple(a for a, k in zip(mesh.axes, assignment, strict=True) if k == d) for d in range(ndim)]
        yield Layout.of(mesh, dims, [(a, "sum") for a, k in zip(mesh.axes, assignment, strict=True) if k == "sum"])


@pytest.mark.parametrize("sizes", [(2,), (3,), (5,), (7,), (2, 2), (2, 3), (4, 2), (2, 2, 2), (4, 4)])
@pytest.mark.parametrize("shape", [(8, 12), (5, 7), (1, 9)])
def test_all_pairs(sizes, shape):
    mesh = Mesh(tuple("abc"[: len(sizes)]), sizes)
    sources = list(all_layouts(mesh))
    targets = list(all_layouts(mesh, partial=False))
    pairs = list(itertools.product(sources, targets))
    for source, target in pairs[:: max(1, len(pairs) // 120)]:
        check(source, target, shape)


@st.composite
def on_mesh(draw, mesh, ndim, shape, partial):
    dims = [[] for _ in range(ndim)]
    pending = []
    for axis in draw(st.permutations(mesh.axes)):
        at = draw(st.integers(-2 if partial else -1, ndim - 1))
        if at >= 0:
            dims[at].append(axis)
        elif at == -2:
            pending.append((axis, "sum"))
    sizes = []
    for axes, size in zip(dims, shape, strict=True):
        explicit = None
        if axes and draw(st.booleans()):
            count = mesh.count(axes)
            cuts = sorted(draw(st.lists(st.integers(0, size), min_size=count - 1, max_size=count - 1)))
            explicit = tuple(b - a for a, b in zip([0, *cuts], [*cuts, size], strict=True))
        sizes.append(explicit)
    return Layout.of(mesh, dims, pending, sizes)


@st.composite
def meshes(draw, count=None):
    factors = {1: [(1,)], 2: [(2,)], 3: [(3,)], 4: [(4,), (2, 2)], 6: [(6,), (2, 3), (3, 2)], 8: [(8,), (2, 4), (2, 2, 2)]}
    factors |= {12: [(12,), (2, 3, 2)], 16: [(4, 4), (2, 2, 2, 2)], 15: [(3, 5)], 7: [(7,)]}
    count = count or draw(st.sampled_from(sorted(factors)))
    sizes = draw(st.sampled_from(factors[count]))
    ranks = draw(st.permutations(range(count))) if draw(st.booleans()) else range(count)
    return Mesh(tuple("abcd"[: len(sizes)]), sizes, tuple(ranks))


@settings(max_examples=150)
@given(st.data())
def test_random_pairs_within_and_across_meshes(data):
    mesh = data.draw(meshes())
    other = mesh if data.draw(st.booleans()) else data.draw(meshes(mesh.size))
    ndim = data.draw(st.integers(0, 3))
    shape = tuple(data.draw(st.integers(0, 9)) for _ in range(ndim))
    source = data.draw(on_mesh(mesh, ndim, shape, partial=True))
    check(source, data.draw(on_mesh(other, ndim, shape, partial=False)), shape)


@settings(max_examples=80)
@given(st.data())
def test_gradients(data):
    """The gradient of a sum over all ranks' pieces, weighted at random, equals that of the whole."""
    mesh = data.draw(meshes())
    shape = tuple(data.draw(st.integers(1, 7)) for _ in range(2))
    source = data.draw(on_mesh(mesh, 2, shape, partial=False))
    target = data.draw(on_mesh(mesh, 2, shape, partial=False))
    free = [a for a in mesh.axes if a not in target.split_axes]
    partial = tuple(a for a in free if data.draw(st.booleans()))
    plan = redistribution(source, target, shape, partial)
    whole = torch.randn(shape, dtype=torch.float64)
    weights = {}
    slices = plan.target.slices(shape)
    for rank in range(mesh.size):
        key = tuple(mesh.coordinates(rank)[a] for a in partial)
        weights.setdefault(key, torch.randn(shape, dtype=torch.float64))
    total = sum(weights.values(), torch.zeros(shape, dtype=torch.float64))
    source_lanes = rank_groups.of_layout(plan.source)
    lanes = rank_groups.of_layout(plan.target, plan.partial_gradient)
    first = {own: rank for rank, own in reversed(list(enumerate(source_lanes)))}
    inputs = [whole[plan.source.slices(shape)[first[i]]].clone().requires_grad_() for i in sorted(first)]
    move = SimulatedMove(Move("x", "y", plan, torch.float64, "", "", lanes, True), source_lanes)
    outputs = move(inputs)
    loss = sum(
        (outputs[own] * weights[tuple(mesh.coordinates(rank)[a] for a in partial)][slices[rank]]).sum()
        for own, rank in {own: rank for rank, own in enumerate(lanes)}.items()
    )
    gradients = torch.autograd.grad(loss, inputs)
    for i, gradient in enumerate(gradients):
        piece = plan.source.slices(shape)[first[i]]
        torch.testing.assert_close(gradient, total[piece])


@pytest.mark.parametrize(
    ("source", "target", "sent"),
    [
        (("a", "None"), ("None", "None"), 3 * 16),
        (("None", "None"), ("a", "None"), 0),
        (("a", "None"), ("None", "a"), 3 * 4),
    ],
)
def test_bytes_are_those_of_the_closed_form(source, target, sent):
    base = Layout((4,), ("a",))
    steps = steps_between(base(*source), base(*target), (8, 8))
    assert sum(sent_elements(s, (8, 8)) for s in steps) == sent


def test_all_reduce_and_reduce_scatter_bytes():
    mesh = Mesh(("a",), (4,))
    pending = Layout.of(mesh, ((), ()), [("a", "sum")])
    (reduce,) = steps_between(pending, Layout.replicated(mesh, 2), (8, 8))
    assert (reduce.kind, sent_elements(reduce, (8, 8))) == ("all_reduce", 2 * 3 * 64 // 4)
    (scatter,) = steps_between(pending, Layout.of(mesh, (("a",), ())), (8, 8))
    assert (scatter.kind, sent_elements(scatter, (8, 8))) == ("reduce_scatter", 3 * 64 // 4)
