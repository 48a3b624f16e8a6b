"""Plans that are searched for: sums on what every rank has, many neighbours, several meshes, forward functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import shardwright as sw
from shardwright.api.plan_for import planning
from shardwright.search.elimination import Elimination, best_order
from shardwright.search.minplus import slimmed

SEARCHES = ("auto", "dynamic_programming", "recursive_programming")


# -- sums that meet what every rank has -----------------------------------------------------------------------------------


class Sums(nn.Module):
    """A sum over the batch, or over hidden features, that meets an input, a constant or what is made of these."""

    def __init__(self, what):
        super().__init__()
        self.up, self.down, self.what = nn.Linear(64, 256, bias=False), nn.Linear(256, 64, bias=False), what
        self.register_buffer("kept", torch.ones(64))

    def forward(self, x):
        h = self.down(self.up(x).relu())
        meets = {
            "input": lambda: x + h,
            "input times two": lambda: x * 2 - h,
            "zeros": lambda: torch.zeros(64) + h.sum(0),
            "buffer": lambda: self.kept - h.sum(0),
            "positions": lambda: torch.arange(64.0) + h.sum(0),
            "stack": lambda: torch.stack([x, h]),
        }
        return meets[self.what]().sum()


@pytest.mark.parametrize("machine", ["h100", "cpu-gloo"])
@pytest.mark.parametrize("mode", SEARCHES)
@pytest.mark.parametrize("what", ["input", "input times two", "zeros", "buffer", "positions", "stack"])
def test_sums_that_meet_what_every_rank_has(what, mode, machine):
    sw.init(devices=4)
    model, x = Sums(what), torch.randn(16, 64)
    net = sw.AutoParallel(model, mode).search(machine=machine)
    loss, expected = net(x), model(x)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-3)
    (a,), (b,) = (torch.autograd.grad(each, [model.up.weight]) for each in (expected, loss))
    torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-3)


# -- many neighbours ------------------------------------------------------------------------------------------------------


def test_an_elimination_of_more_variables_than_an_array_has_axes():
    count = 90
    draw = np.random.default_rng(0)
    sizes = {v: 1 if v % 3 else 2 for v in range(count)} | {count: 3}
    factors = [((v,), draw.random(n)) for v, n in sizes.items()]
    factors += [((v, count), draw.random((n, 3))) for v, n in sizes.items() if v != count]
    factors += [((0, v), draw.random((2, n))) for v, n in sizes.items() if n == 1]
    order = best_order(sizes, [own for own, _ in factors])
    done = Elimination.of(factors, order.variables)
    chosen = done.assign({})
    total = sum(float(table[tuple(chosen[v] for v in own)]) for own, table in factors)
    assert total == pytest.approx(done.value)
    assert slimmed(((3, 4, 5), np.ones((1, 1, 1))))[0] == (3,)


class Many(nn.Module):
    def __init__(self, count, recurrent):
        super().__init__()
        self.a, self.count, self.recurrent = nn.Linear(16, 16), count, recurrent

    def forward(self, x):
        h = self.a(x)
        if not self.recurrent:
            return torch.stack([h * i for i in range(self.count)]).sum()
        t, out = torch.zeros(x.shape[0], 16), []
        for i in range(self.count):
            t = t * torch.sigmoid(h[:, i % 16, None]) + h
            out.append(t)
        return torch.stack(out, 1).sum()


@pytest.mark.parametrize("mode", ["semi_auto", "recursive_programming"])
@pytest.mark.parametrize(("count", "recurrent"), [(70, False), (66, True)])
def test_more_than_64_neighbours(count, recurrent, mode):
    sw.init(devices=4)
    net = sw.AutoParallel(Many(count, recurrent), mode).compile(torch.randn(64, 16))
    assert net.plan.summary()
    assert net.plan.price.seconds > 0


# -- several meshes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["semi_auto", *SEARCHES])
@pytest.mark.parametrize("ranks", [[0, 2, 1, 3], [3, 2, 1, 0], None])
@pytest.mark.parametrize("size", [2, 4])
def test_hsdp_with_a_rank_list(size, ranks, mode):
    sw.init(devices=4)
    layout = sw.Layout((4,), ("a",), ranks)
    model = nn.Sequential(nn.Linear(24, 24, bias=False), nn.Tanh(), nn.Linear(24, 24, bias=False))
    net = sw.AutoParallel(model, mode).hsdp(shard_size=size, threshold=0).shard({"0.weight": layout("None", "None")})
    x = torch.randn(24, 24)
    got, expected = net(x), model(x)
    torch.testing.assert_close(got, expected)
    for a, b in zip(*(torch.autograd.grad(t.square().sum(), list(model.parameters())) for t in (expected, got)), strict=True):
        torch.testing.assert_close(b, a)


# -- recompute ------------------------------------------------------------------------------------------------------------


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.Embedding(50, 32)

    def forward(self, ids):
        return self.e(ids) + self.e(torch.arange(ids.shape[1])[None, :])


def test_recompute_auto_with_operators_that_have_no_price():
    sw.init(devices=4)
    blocks = (nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 32)) for _ in range(4))
    model, ids = nn.Sequential(Positions(), *blocks), torch.randint(0, 50, (64, 32))
    enough = sw.AutoParallel(model).compile(ids).plan.memory.peak
    net = sw.AutoParallel(model).recompute("auto", memory=enough - 1).compile(ids)
    torch.testing.assert_close(net(ids), model(ids))


# -- forward functions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["search", "recompute", "planned"])
def test_a_forward_function_under_a_memory_limit_is_no_train_step(how):
    sw.init(devices=4)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 1024))
    x, y = torch.randn(64, 64), torch.randint(0, 1024, (64,))

    def forward(x, y):
        return F.cross_entropy(model(x), y)

    if how == "planned":
        with planning(4, None, False, {"memory": "1GB"}) as plans:
            sw.AutoParallel(forward, "auto")(x, y)
        names = [n.name for n in plans[0].graph.nodes]
    else:
        net = sw.AutoParallel(forward, "auto")
        net = net.search(memory="1GB") if how == "search" else net.recompute("auto", memory="1GB")
        names = [n.name for n in net.compile(x, y).plan.graph.nodes]
        torch.testing.assert_close(net(x, y), forward(x, y))
    assert names[-1] == "cross_entropy_loss"


def test_a_train_step_is_still_found_by_its_backward():
    sw.init(devices=2)
    model, x = nn.Linear(4, 4), torch.randn(6, 4)

    def step(x):
        loss = model(x).sum()
        loss.backward()
        return loss

    with planning(2, None, False, {}) as plans:
        sw.AutoParallel(step, "auto")(x)
    assert [n.name for n in plans[0].graph.nodes] == ["linear"]


def test_plans_of_keyword_calls_have_the_names_of_the_run():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(8, 8)

        def forward(self, x=None, scale=None):
            return self.l(x).mul(scale).sum()

    model = Model()
    with planning(4, None, False, {}) as plans:
        net = sw.AutoParallel(model, "auto").shard({"l.weight": (4, 1)})
        net(x=torch.randn(8, 8), scale=torch.ones(8))
    assert {str(i.target) for i in plans[0].graph.inputs if i.kind == "parameter"} == {"l.weight", "l.bias"}
    assert plans[0].graph.nodes[0].module == "l"


# -- tied weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["emb.weight", "head.weight", "*.weight", "head*weight"])
def test_a_tied_weight_by_any_of_its_names(name):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
            self.head.weight = self.emb.weight

        def forward(self, i):
            return self.head(self.emb(i)).sum()

    sw.init(devices=4)
    model, ids = Tied(), torch.arange(8)
    net = sw.AutoParallel(model).shard({name: (4, 1)})
    torch.testing.assert_close(net(ids), model(ids))
    (weight,) = [i.value for i in net.plan.graph.inputs if i.kind == "parameter"]
    assert net.plan.input_layouts[weight].split_axes
