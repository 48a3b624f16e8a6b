"""Readers of one value share redistributions: the same ones, and those that others contain."""

from __future__ import annotations

import itertools

import pytest
import torch

import shardwright as sw
from shardwright import Layout, Mesh
from shardwright.partition.sharing import _EXHAUSTIVE, sharing
from shardwright.redistribute.planner import Options
from shardwright.redistribute.steps import redistribution

BASE = Layout((2, 2), ("a", "b"))


@pytest.fixture(autouse=True)
def four_ranks():
    sw.init(devices=4)


def run(function, *shapes):
    """Value and gradients as on one device, and the record of both directions."""
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    net = sw.AutoParallel(function)
    with sw.record_communication() as log:
        gradients = torch.autograd.grad(net(*inputs), inputs)
    for a, b in zip(gradients, torch.autograd.grad(function(*inputs), inputs), strict=True):
        torch.testing.assert_close(a, b)
    return net, log


def test_a_gather_that_another_contains_is_not_done_twice():
    """One reader wants the whole, another a half: the half is gathered first, and the whole from the halves."""
    rows, half, whole = BASE(("a", "b"), "None"), BASE("a", "None"), BASE("None", "None")
    double = sw.shard(torch.mul, (rows, rows))
    sine, cosine = sw.shard(torch.sin, (half,)), sw.shard(torch.cos, (whole,))

    def function(x):
        y = double(x, x)
        return (cosine(y) + 1).square().sum() + sine(y).sum()

    net, log = run(function, (512, 512))
    gathers = [e for e in log.events if e.kind == "all_gather" and e.phase == "forward" and e.edge.startswith("mul")]
    assert [e.axes for e in gathers] == [("b",), ("a",)], str(net.program)


def test_the_tree_is_the_cheapest_of_all():
    mesh = Mesh(("a", "b"), (2, 4))
    layouts = [Layout.of(mesh, d) for d in (("", ""), ("a", ""), ("", "b"), ("ab", ""), ("b", "a"))]
    options = Options()

    def cost(parent, need):
        plan = redistribution(parent[0], need[0], (64, 64), need[1], options)
        return sum(options.links.seconds(s, (64, 64), 4) for s in (*plan.forward, *plan.backward))

    for source in [*layouts, Layout.of(mesh, ("", "a"), [("b", "sum")])]:
        for chosen in itertools.combinations(layouts, 3):
            needs = tuple((layout, ("b",) if layout == layouts[0] else ()) for layout in chosen if layout != source)
            tree = sharing(source, needs, (64, 64), True, options)
            price = sum(cost(parent, need) for need, parent in tree.items())
            apart = sum(cost((source, ()), need) for need in needs)
            assert price <= apart + 1e-12
            assert set(needs) <= set(tree)
            for need in tree:  # every chain ends at the source, and no partial gradient has descendants
                seen = [need]
                while seen[-1] != (source, ()):
                    seen.append(tree[seen[-1]])
                    assert len(seen) < 6
                assert not any(gradient for _, gradient in seen[1:])


def test_many_needs_are_shared_too():
    mesh = Mesh(("a", "b", "c"), (2, 2, 2))
    source = Layout.of(mesh, ("abc", ""))
    needs = tuple((Layout.of(mesh, d), ()) for d in (("", ""), ("a", ""), ("ab", ""), ("", "a"), ("a", "b"), ("", "abc")))
    assert len(needs) > _EXHAUSTIVE
    tree = sharing(source, needs, (64, 64), True, Options())
    assert set(tree) == set(needs)


def test_one_reduction_serves_readers_that_want_it_in_two_layouts():
    product = sw.shard(torch.matmul, (BASE("None", "a"), BASE("a", "None")))
    sine, cosine = sw.shard(torch.sin, (BASE("a", "None"),)), sw.shard(torch.cos, (BASE("None", "None"),))

    def function(x, y):
        z = product(x, y)
        return sine(z).sum() + cosine(z).sum()

    _, log = run(function, (64, 64), (64, 64))
    reduces = [e for e in log.events if e.phase == "forward" and e.shape == (64, 64) and "reduce" in e.kind]
    assert len(reduces) == 1


def test_without_all_to_all_a_model_gathers_and_slices():
    sine, cosine = sw.shard(torch.sin, (BASE(("a", "b"), "None"),)), sw.shard(torch.cos, (BASE("None", ("a", "b")),))
    x = torch.randn(8, 8, dtype=torch.float64)
    counts = {}
    for enable in (True, False):
        net = sw.AutoParallel(lambda x: cosine(sine(x)).sum()).enable_alltoall(enable)
        with sw.record_communication() as log:
            net(x)
        counts[enable] = (log.count("all_to_all"), log.count("all_gather"))
    # there, and back to rows for the sum, which is data parallel
    assert counts == {True: (2, 0), False: (0, 2)}
    with pytest.raises(TypeError, match="give True or False"):
        net.enable_alltoall("yes")
