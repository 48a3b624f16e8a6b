"""Copies of a batch move running statistics in the order of the copies, however their instructions take turns."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import shardwright as sw

LENGTH, WIDTH = 5, 7


class Net(nn.Module):
    def __init__(self, last, positions, mask):
        super().__init__()
        self.first, self.table, self.norm = nn.Linear(6, WIDTH), nn.Embedding(LENGTH, WIDTH), nn.BatchNorm1d(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.last, self.positions, self.mask = last, positions, mask

    def forward(self, x):
        x = self.first(x)
        if self.positions:
            x = x + self.table(torch.arange(LENGTH))
        a = self.q(x) @ self.k(x).transpose(1, 2) / math.sqrt(WIDTH)
        if self.mask:
            a = a.masked_fill(torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1), float("-inf"))
        x = self.norm((a.softmax(-1) @ self.v(x)).transpose(1, 2)).transpose(1, 2)
        return sw.reshard(x, self.last).square().mean() + 0 * self.norm.running_mean.sum()


@pytest.mark.parametrize("copies", [2, 3])
@pytest.mark.parametrize("sizes", [(2,), (2, 2), (2, 3)])
@pytest.mark.parametrize(("positions", "mask"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("entry", [("None", "None", "a"), ("a", "None", "None"), ("None", "a", "None")])
def test_copies_move_statistics_in_their_order(copies, sizes, positions, mask, entry):
    world = math.prod(sizes)
    sw.init(devices=world)
    layout = sw.Layout(sizes, tuple("ab"[: len(sizes)]))
    torch.manual_seed(0)
    module = sw.MicroBatchInterleaved(Net(layout(*entry), positions, mask).double(), copies)
    reference = copy.deepcopy(module)
    x = torch.randn(12, LENGTH, 6).double()
    net = sw.AutoParallel(module)
    for _ in range(2):
        torch.testing.assert_close(net(x), reference(x))
    for name, value in reference.named_buffers():
        torch.testing.assert_close(module.get_buffer(name), value)
