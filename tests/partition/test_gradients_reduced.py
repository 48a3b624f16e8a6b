"""The proof that no reduction of a gradient is forgotten, also of what a rule's local program makes in between."""

import pytest
import torch
from torch import nn

import shardwright as sw
from shardwright.partition.builder import NodeBuilder


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return sw.shard(torch.softmax, in_strategy=((1, 2),))(x * self.scale, -1).square().sum()


def test_a_sum_whose_gradient_is_not_reduced_is_found(monkeypatch):
    """Each rank divides by the sum over all: its gradient there is a part of the whole, which the move must reduce."""
    sw.init(devices=2)
    sw.AutoParallel(Net())(torch.randn(4, 8)).backward()
    plain = NodeBuilder.move

    def forgetful(self, value, shape, source, target, partial_gradient=(), dtype=None):
        return plain(self, value, shape, source, target, (), dtype)

    monkeypatch.setattr(NodeBuilder, "move", forgetful)
    with pytest.raises(AssertionError, match="is shared along axes where the operator's work differs"):
        sw.AutoParallel(Net())(torch.randn(4, 8))
