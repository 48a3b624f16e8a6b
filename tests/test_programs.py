"""Whole programs: what a PyTorch user writes, in parallel equal to the single device."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import shardwright as sw

DEVICES = (1, 2, 3, 4, 6, 8)


def grads(module):
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def check(module, *inputs, net=None, **kwargs):
    """One call forward and backward: outputs and gradients equal the plain module's to float64 rounding."""
    plain = copy.deepcopy(module)
    torch.manual_seed(3)
    expected = plain(*inputs, **kwargs)
    net = net or sw.AutoParallel(module)
    torch.manual_seed(3)
    got = net(*inputs, **kwargs)
    flat_expected, spec = torch.utils._pytree.tree_flatten(expected)
    flat, got_spec = torch.utils._pytree.tree_flatten(got)
    assert spec == got_spec
    loss = other = 0.0
    for a, b in zip(flat_expected, flat, strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)
            if a.requires_grad:
                loss, other = loss + a.square().sum(), other + b.square().sum()
        else:
            assert a == b
    if isinstance(loss, torch.Tensor):
        loss.backward()
        other.backward()
        left, right = grads(plain), grads(module)
        assert left.keys() == right.keys()
        for name, value in left.items():
            torch.testing.assert_close(right[name], value, rtol=1e-9, atol=1e-11, msg=name)
    for (name, a), (_, b) in zip(plain.named_buffers(), module.named_buffers(), strict=True):
        torch.testing.assert_close(b, a, msg=name)
    return net


class Everything(nn.Module):
    """Tied weights, a buffer that counts, in-place operators, views that are written, nested inputs and outputs."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.LayerNorm(6)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mask", torch.ones(5, 5).tril())

    def forward(self, batch, *, scale=2.0, extras=()):
        self.calls += 1
        x = self.embed(batch["ids"])
        x = self.norm(x)
        x.mul_(scale)
        view = x.view(-1, 6)
        view[0] = 1.0
        x[:, 1:].add_(0.5)
        a, b = x.chunk(2, dim=-1)
        weights = (a @ b.transpose(-1, -2)).masked_fill(self.mask == 0, -1e9).softmax(-1)
        y = weights @ x
        for extra in extras:
            y = y + extra
        return {"logits": self.head(y), "parts": (a.sum(), [weights]), "name": "everything", "none": None}


@pytest.mark.parametrize("devices", DEVICES)
def test_everything(devices):
    sw.init(devices=devices)
    model = Everything().double()
    ids = torch.randint(0, 11, (5, 5))
    net = check(model, {"ids": ids}, scale=3.0, extras=(torch.randn(6).double(), torch.randn(5, 1, 6).double()))
    assert int(model.calls) == 1
    net({"ids": ids}, scale=3.0, extras=(torch.zeros(6).double(), torch.zeros(5, 1, 6).double()))
    assert int(model.calls) == 2


class Net(nn.Module):
    def __init__(self, p=0.5):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(4 * 16, 10), nn.Linear(10, 3)
        self.drop = nn.Dropout(p)

    def forward(self, x):
        x = F.max_pool2d(torch.relu(self.conv(x)), 2).flatten(1)
        return self.fc2(self.drop(F.gelu(self.fc1(x))))


@pytest.mark.parametrize("devices", (2, 3, 4))
def test_cnn_with_dropout_has_the_single_devices_masks(devices):
    sw.init(devices=devices)
    model = Net().double()
    net = check(model, torch.randn(7, 1, 8, 8).double())
    layout = sw.Layout((devices,), ("tp",))
    other = sw.AutoParallel(model).shard(
        {"fc1": {"in_strategy": (layout("None", "None"),), "parameter_plan": {"weight": layout("tp", "None")}}}
    )
    model.zero_grad()
    check(model, torch.randn(7, 1, 8, 8).double(), net=other)
    assert "drop" in str(net.plan)


def test_eval_and_train_are_different_programs():
    sw.init(devices=2)
    model = Net().double()
    net = sw.AutoParallel(model)
    x = torch.randn(4, 1, 8, 8).double()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(net(x), model(x))
        torch.testing.assert_close(net(x), net(x))
    model.train()
    assert not torch.equal(net(x), net(x))


def test_a_new_shape_plans_again_and_says_so(caplog):
    sw.init(devices=2)
    model = Net().double()
    net = sw.AutoParallel(model)
    net(torch.randn(4, 1, 8, 8).double())
    first = net.plan
    with caplog.at_level(logging.WARNING, logger="shardwright"):
        net(torch.randn(6, 1, 8, 8).double())
    assert "planning again" in caplog.text
    assert net.plan is not first
    net(torch.randn(4, 1, 8, 8).double())
    assert net.plan is first


def test_bf16_autocast():
    sw.init(devices=4)
    model = Net(p=0.0)
    x = torch.randn(8, 1, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(x)
        got = sw.AutoParallel(model)(x)
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
    plain = sw.AutoParallel(model)(x)
    torch.testing.assert_close(plain, model(x))


class AutocastInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.a(x)
        with torch.no_grad():
            shift = self.b(x.float()).mean(0, keepdim=True)
        return self.b(x.float()) + shift


def test_autocast_and_no_grad_regions():
    sw.init(devices=2)
    model = AutocastInside()
    x = torch.randn(4, 8)
    expected = model(x)
    expected.sum().backward()
    left = grads(model)
    model.zero_grad()
    got = sw.AutoParallel(model)(x)
    got.sum().backward()
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)
    for name, value in grads(model).items():
        torch.testing.assert_close(value, left[name], rtol=2e-2, atol=2e-2)


def test_function_that_closes_over_modules_and_parameters():
    sw.init(devices=4)
    layer = nn.Linear(6, 3).double()
    scale = nn.Parameter(torch.randn(3).double())

    def forward(x, y):
        return F.mse_loss(layer(x) * scale, y)

    x, y = torch.randn(8, 6).double(), torch.randn(8, 3).double()
    forward(x, y).backward()
    expected = [p.grad.clone() for p in (layer.weight, layer.bias, scale)]
    for p in (layer.weight, layer.bias, scale):
        p.grad = None
    net = sw.AutoParallel(forward)
    net(x, y).backward()
    assert len(list(net.parameters())) == 3
    for p, e in zip((layer.weight, layer.bias, scale), expected, strict=True):
        torch.testing.assert_close(p.grad, e)


def train(parallel, style, devices=4):
    sw.init(devices=devices)
    torch.manual_seed(0)
    model = Net(p=0.2).double()
    loss_fn = nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    clip = torch.nn.utils.clip_grad_norm_

    def plain_step(x, y):
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        clip(model.parameters(), 0.5)
        optimizer.step()
        return loss.detach()

    def forward_fn(x, y):
        logits = model(x)
        return loss_fn(logits, y), logits

    grad_fn = sw.value_and_grad(forward_fn, None, model.parameters(), has_aux=True)

    def functional_step(x, y):
        (loss, _), gradients = grad_fn(x, y)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        clip(model.parameters(), 0.5)
        optimizer.step()
        return loss

    step = plain_step if style == "plain" else functional_step
    if parallel:
        step = sw.AutoParallel(step)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(3):
        x = torch.randn(6, 1, 8, 8, generator=generator).double()
        losses.append(float(step(x, torch.randint(0, 3, (6,), generator=generator))))
    return losses, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("style", ["plain", "functional"])
def test_train_step(style):
    expected, weights = train(False, style)
    got, parallel_weights = train(True, style)
    assert got == pytest.approx(expected, rel=1e-10)
    for a, b in zip(weights, parallel_weights, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-10)


def test_inputs_that_require_grad():
    sw.init(devices=3)
    layer = nn.Linear(4, 4).double()
    x = torch.randn(6, 4).double().requires_grad_()
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    (got,) = torch.autograd.grad(sw.AutoParallel(layer)(x).square().sum(), x)
    torch.testing.assert_close(got, expected)


def test_strategies_outside_auto_parallel_are_plain_operators():
    x, w = torch.randn(4, 8), torch.randn(8, 2)
    assert torch.equal(sw.ops.MatMul().shard(((2, 4), (4, 1)))(x, w), x @ w)
    assert torch.equal(sw.shard(torch.matmul, ((2, 4), (4, 1)))(x, w), x @ w)
    layer = nn.Linear(8, 2)
    expected = layer(x)
    assert torch.equal(sw.shard(layer, ((2, 1),), parameter_plan={"weight": (2, 1)})(x), expected)


def seed_groups(events, phase, shape):
    return [e.groups for e in events if e.phase == phase and e.kind == "all_reduce" and e.shape == shape]


def test_the_seeds_groups():
    """matmul1 ((2,4),(4,1)) reduces over {0..3},{4..7}, its weight's gradient over {0,4},{1,5},{2,6},{3,7}."""
    sw.init(devices=8)

    class Seed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(784, 512))
            self.matmul1 = sw.ops.MatMul().shard(((2, 4), (4, 1)))

        def forward(self, x):
            return self.matmul1(x, self.weight)

    net = sw.AutoParallel(Seed())
    with sw.record_communication() as log:
        net(torch.randn(32, 784)).sum().backward()
    assert seed_groups(log.events, "forward", (32, 512)) == [((0, 1, 2, 3), (4, 5, 6, 7))]
    assert seed_groups(log.events, "backward", (784, 512)) == [((0, 4), (1, 5), (2, 6), (3, 7))]


def test_out_strategy_turns_the_all_reduce_into_a_reduce_scatter():
    sw.init(devices=8)
    x, w = torch.randn(8, 16).double(), nn.Parameter(torch.randn(16, 4).double())
    for out, kinds in ((None, ["all_reduce"]), (((8, 1),), ["reduce_scatter"]), (((2, 1),), ["all_reduce"])):
        matmul = sw.ops.MatMul().shard(((2, 4), (4, 1)), out)
        net = sw.AutoParallel(lambda x, m=matmul: m(x, w))
        with sw.record_communication() as log:
            got = net(x)
        torch.testing.assert_close(got, x @ w)
        assert [e.kind for e in log.events if e.edge.endswith("-> out")] == kinds


def test_shared_edges_are_reduced_once():
    """Q, K and V read one activation: its gradient is one all-reduce."""
    sw.init(devices=2)
    layout = sw.Layout((2,), ("tp",))

    class Qkv(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            x = self.first(x)
            return self.q(x) * self.k(x) + self.v(x)

    model = Qkv()
    sw.shard(
        model,
        (layout("None", "None"),),
        parameter_plan={f"{n}.weight": layout("tp", "None") for n in "qkv"},
    )
    net = sw.AutoParallel(model).dataset_strategy((layout("None", "None"),))
    with sw.record_communication() as log:
        net(torch.randn(3, 4)).sum().backward()
    backward = [e for e in log.events if e.phase == "backward" and e.kind == "all_reduce"]
    assert len(backward) == 1
    assert backward[0].shape == (3, 4)


def test_an_operator_without_a_rule_runs_whole_and_is_named():
    sw.init(devices=2)

    class Odd(nn.Module):
        def forward(self, x):
            return torch.linalg.inv(x @ x.transpose(-1, -2) + torch.eye(3).double())

    model = Odd()
    net = check(model, torch.randn(2, 3, 3).double())
    assert any("inv" in note for note in net.plan.notes)
    assert "has no rule" in str(net.plan)


def test_programs_are_readable():
    sw.init(devices=2)
    net = sw.AutoParallel(nn.Linear(4, 2)).compile(torch.randn(4, 4))
    text = str(net.program)
    assert "def rank_0(" in text
    assert "aten.linear(" in text
    assert net.program.text(1) != text or "linear" in text


def test_delayed_initialisation_equals_eager():
    def build():
        torch.manual_seed(5)
        return Net(p=0.0)

    sw.init(devices=4)
    eager = build()
    with sw.no_init_parameters():
        delayed = build()
        optimizer = torch.optim.SGD(delayed.parameters(), 0.1)
    assert all(p.is_meta for p in delayed.parameters())
    x = torch.randn(4, 1, 8, 8)
    sw.AutoParallel(delayed)(x).sum().backward()
    for a, b in zip(eager.parameters(), delayed.parameters(), strict=True):
        assert torch.equal(a, b)
    optimizer.step()
    assert not torch.equal(eager.fc1.weight, delayed.fc1.weight)
