"""Ordinary torch modules, in train and eval mode, equal the single device on even and odd device counts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import shardwright as sw


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)), inplace=True)
        x = F.relu(x + self.norm2(self.conv2(x)), inplace=True)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        output, (hidden, _) = self.lstm(x)
        return self.head(output[:, -1]), hidden


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)


class Slices(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        y = torch.einsum("bi,ij->bj", x, self.weight)
        self.mean.mul_(0.9).add_(0.1 * y.detach().mean(0))
        z = torch.where(y > 0, y, torch.zeros_like(y))
        z[:, ::2] *= 2
        a, b = z.split([2, 4], 1)
        sorted_b = torch.gather(b, 1, torch.argsort(b, dim=1))
        parts = torch.cat([a.repeat(1, 2), sorted_b, b.cumsum(1)], 1)
        return parts, y.topk(2)[0], y.std(0), y.max(), x.size(0), y.norm()


MODULES = {
    "residual cnn": (Residual, lambda: (torch.randn(6, 3, 8, 8),)),
    "lstm": (Recurrent, lambda: (torch.randn(4, 5, 6),)),
    "attention": (SelfAttention, lambda: (torch.randn(4, 5, 8),)),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True),
        lambda: (torch.randn(4, 5, 8),),
    ),
    "slices": (Slices, lambda: (torch.randn(5, 4),)),
    "decoder": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 4, 2, 2), nn.GroupNorm(2, 4), nn.SiLU(), nn.Upsample(scale_factor=2)),
        lambda: (torch.randn(3, 2, 4, 4),),
    ),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(24, 3)),
        lambda: (torch.randn(5, 4, 10),),
    ),
    "bilinear": (lambda: nn.Bilinear(3, 4, 5), lambda: (torch.randn(6, 3), torch.randn(6, 4))),
}


@pytest.mark.parametrize("devices", [2, 3, 8])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_module(name, train, devices):
    make, inputs = MODULES[name]
    sw.init(devices=devices)
    module = make().double().train(train)
    report = sw.verify(module, *(x.double() for x in inputs()))
    assert report.ok, report


# -- regions: marked functions of several operators, marked modules, pinned layouts -----------------------------------


def kinds(log, phase):
    return [e.kind for e in log.events if e.phase == phase]


class Feedforward(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


def test_column_and_row_pair_costs_one_all_reduce_each_way():
    sw.init(devices=4)
    tp = sw.Layout((4,), ("tp",))
    plan = {"up.weight": tp("tp", "None"), "up.bias": tp("tp"), "down.weight": tp("None", "tp")}

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.mlp = sw.shard(Feedforward(), (tp("None", "None"),), parameter_plan=plan)

        def forward(self, x):
            return self.mlp(self.first(x))

    model = Two().double()
    x = torch.randn(3, 8).double()
    net = sw.AutoParallel(model).dataset_strategy((tp("None", "None"),))
    with sw.record_communication() as log:
        net(x).sum().backward()
    assert kinds(log, "forward") == ["all_reduce"]
    assert kinds(log, "backward") == ["all_reduce"]
    assert log.bytes("all_reduce") == 2 * (2 * 3 * 3 * 8 * 8 // 4)
    assert sw.verify(net, x).ok


def test_a_function_of_several_operators_follows_its_inputs():
    sw.init(devices=4)
    grid = sw.Layout((2, 2), ("a", "b"))

    def block(x, w):
        return torch.tanh(x @ w).softmax(-1) * 2

    marked = sw.shard(block, (grid("a", "None"), grid("None", "b")), out_strategy=(grid("a", "None"),))
    w = nn.Parameter(torch.randn(6, 8).double())
    net = sw.AutoParallel(lambda x: marked(x, w).square().sum(1))
    x = torch.randn(4, 6).double()
    report = sw.verify(net, x)
    assert report.ok, report
    product = next(n for n in net.plan.graph.nodes if n.op.name == "aten.matmul")
    assert net.plan.choices[product.name].outputs[0].short() == "a,b"


def test_reshard_pins_a_layout():
    sw.init(devices=4)
    grid = sw.Layout((2, 2), ("a", "b"))
    layer = nn.Linear(6, 8).double()

    def forward(x):
        return sw.reshard(layer(x), grid("b", "a")).square()

    net = sw.AutoParallel(forward)
    x = torch.randn(4, 6).double()
    assert sw.verify(net, x).ok
    pin = next(n for n in net.plan.graph.nodes if n.op.name == "aten.alias")
    assert net.plan.choices[pin.name].outputs[0].short() == "b,a"
    with pytest.raises(TypeError, match="Layout"):
        sw.reshard(x, (2, 2))
    with pytest.raises(TypeError, match="tensor"):
        sw.reshard(3, grid("a"))


def test_verify_names_the_first_operator_that_differs(monkeypatch):
    import shardwright.rules.registry as registry
    from shardwright.rules.notation import parse

    def wrong(local):
        return (local.call(torch.mul, local.call(torch.relu, local.inputs[0]), 1.5),)

    sw.init(devices=2)
    monkeypatch.setitem(registry._RULES, "aten.relu", lambda op: parse("... -> ...", op, None, (), wrong))
    report = sw.verify(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(4, 4))
    assert not report
    assert "aten.relu" in str(report.first_operator)
    assert "differs from single device" in str(report)
