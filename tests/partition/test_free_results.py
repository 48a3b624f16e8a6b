"""Gradients that nobody else holds: what torch's own backward makes of every operator that is taken to make new memory."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import shardwright as sw
from shardwright.partition.free_results import values_with_free_gradients

torch.manual_seed(0)
READERS = {
    "linear": lambda w, x: F.linear(x, w),
    "linear of one row": lambda w, x: F.linear(x[:1], w),
    "linear of a vector": lambda w, x: F.linear(x[0], w),
    "linear of more dims": lambda w, x: F.linear(x.view(2, 1, 3, 4), w, x[0, 0] * torch.ones(4)),
    "linear of an identity": lambda w, x: F.linear(torch.eye(4), w),
    "matmul": lambda w, x: x @ w,
    "matmul of a vector": lambda w, x: x[0] @ w,
    "matmul from the left": lambda w, x: w @ x.t(),
    "batches": lambda w, x: x.view(3, 2, 4) @ w,
    "mm": lambda w, x: torch.mm(w, x.t()),
    "embedding": lambda w, x: F.embedding(torch.tensor([[0, 1], [1, 3]]), w),
    "conv1d": lambda w, x: F.conv1d(x.view(2, 4, 3), w.view(4, 4)[:, :, None]),
    "conv2d": lambda w, x: F.conv2d(x.view(1, 1, 4, 6), w[None, None]),
}


@pytest.mark.parametrize("name", READERS)
def test_gradients_are_in_memory_of_their_own(name):
    """Overwriting what a hook is given changes nobody else's gradient: neither the result's nor the other operand's."""
    x = torch.randn(6, 4, requires_grad=True)

    def gradients(overwrite):
        w = torch.nn.Parameter(torch.arange(16.0).view(4, 4) / 7)
        read = w.view_as(w)
        if overwrite:
            read.register_hook(lambda gradient: gradient.fill_(0.0))
        out = READERS[name](read, x)
        out.retain_grad()
        loss = (out * 2).sum() + (out * out).sum()
        x.grad = None
        loss.backward()
        return w.grad, x.grad, out.grad

    whole, changed = gradients(False), gradients(True)
    assert whole[0].any()
    assert not changed[0].any()
    for a, b in zip(whole[1:], changed[1:]):
        assert (a is None and b is None) or torch.equal(a, b)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.one, self.two = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        self.scale = nn.Parameter(torch.ones(8))
        self.two.weight = self.table.weight

    def forward(self, ids):
        return self.two(torch.tanh(self.one(self.table(ids)) * self.scale)).square().mean()


def test_of_a_program():
    """The tied table is read twice, the scale by a product of elements, the bias as one."""
    sw.init(devices=2)
    net = sw.AutoParallel(Net(), "data_parallel")
    net.compile(torch.arange(12).view(4, 3))
    found = values_with_free_gradients(net.program)
    assert any("one_weight" in name for name in found)
    assert not any(part in name for name in found for part in ("table", "scale", "bias"))
