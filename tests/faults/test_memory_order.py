"""Masks and other draws follow the memory order of the single device, whatever makes what they are drawn for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import shardwright as sw
from shardwright.rules.pointwise import BINARY, UNARY

ORDERS = {"transposed": (0, 2, 1), "reversed": (2, 1, 0), "batch inside": (1, 0, 2), "plain": (0, 1, 2)}


def _in_order(order, shape=(4, 5, 6)):
    made = torch.rand([shape[i] for i in order]) + 0.5
    return made.permute([order.index(i) for i in range(3)])


def _check(function, *tensors, devices=(1, 2)):
    for draw in (lambda h: F.dropout(h, 0.3), torch.rand_like):

        def run(*tensors, draw=draw):
            h = function(*tensors)
            h = h if h.is_floating_point() else h.float()
            return draw(h) + draw(h.transpose(-1, -2)).transpose(-1, -2)

        torch.manual_seed(3)
        expected = run(*tensors)
        for count in devices:
            sw.init(devices=count)
            torch.manual_seed(3)
            torch.testing.assert_close(sw.AutoParallel(run)(*tensors), expected, equal_nan=True)


NORMS = {
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "batch_norm, eval": lambda x: F.batch_norm(x, torch.zeros(5), torch.ones(5)),
    "batch_norm, relu": lambda x: F.batch_norm(x, None, None, training=True).relu().transpose(1, 2),
    "instance_norm": F.instance_norm,
    "group_norm": lambda x: F.group_norm(x, 5),
    "layer_norm": lambda x: F.layer_norm(x, (6,)),
    "conv": lambda x: F.conv1d(x, torch.ones(3, 5, 1)),
    "max_pool1d": lambda x: F.max_pool1d(x, 2),
    "avg_pool1d": lambda x: F.avg_pool1d(x, 2),
    "softmax": lambda x: x.softmax(1),
    "linear": lambda x: F.linear(x, torch.ones(3, 6)),
    "cumsum": lambda x: x.cumsum(1),
    "sort": lambda x: x.sort(1)[0],
    "sum": lambda x: x.sum(0, keepdim=True),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", NORMS)
def test_norms_and_the_like(name, order):
    _check(NORMS[name], _in_order(ORDERS[order]))


@pytest.mark.parametrize("name", [n for n in UNARY if not n.endswith(("_like", "lift_fresh_copy"))])
def test_every_pointwise_operator_of_one_tensor(name):
    function = getattr(torch.ops.aten, name.removeprefix("aten."))
    x = _in_order((2, 1, 0))
    try:
        assert isinstance(function(x), torch.Tensor)
    except (RuntimeError, NotImplementedError):
        pytest.skip("it does not take one tensor of floats")
    if function(x).is_complex():
        pytest.skip("complex")
    _check(function, x, devices=(1,))


@pytest.mark.parametrize("name", [n for n in BINARY if not n.endswith(("complex", "polar", "masked_fill", "ldexp", "fill"))])
def test_every_pointwise_operator_of_two_tensors(name):
    function = getattr(torch.ops.aten, name.removeprefix("aten."))
    for first, second in (("transposed", "plain"), ("plain", "reversed"), ("reversed", "transposed")):
        x, y = _in_order(ORDERS[first]), _in_order(ORDERS[second])[0]
        try:
            assert isinstance(function(x, y), torch.Tensor)
        except (RuntimeError, NotImplementedError):
            x, y = x.long(), y.long()
        _check(function, x, y, devices=(1,))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.n, self.d = nn.BatchNorm1d(5), nn.Dropout(0.3)

    def forward(self, x):
        return self.d(self.n(x.transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_dropout_after_a_batch_norm_of_a_transposed_tensor(devices, train):
    sw.init(devices=devices)
    module, x = Block(), torch.randn(4, 6, 5)
    module.n.train(train)
    torch.manual_seed(3)
    expected = module(x)
    torch.manual_seed(3)
    torch.testing.assert_close(sw.AutoParallel(module)(x), expected, atol=1e-5, rtol=1e-4)
