"""Lint: names the operators that would be better configured, and none of a plan that is well sharded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import shardwright as sw
from shardwright.report.lint import lint

DOUBLE = torch.float64


def weight(*shape):
    return nn.Parameter(torch.randn(*shape, dtype=DOUBLE) / shape[0] ** 0.5)


def findings(target, *inputs, mode="sharding_propagation", **options):
    sw.init(devices=8)
    return lint(sw.AutoParallel(target, mode).compile(*inputs).plan, **options)


def test_a_well_sharded_plan_has_no_finding():
    w, v = weight(32, 64), weight(64, 32)
    matmul = sw.ops.MatMul().shard(((2, 1), (1, 4)))
    assert findings(lambda x: torch.relu(matmul(x, w)) @ v, torch.randn(16, 32, dtype=DOUBLE)) == ()


def test_data_parallel_has_no_finding():
    model = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 8))
    assert findings(lambda x: F.mse_loss(model(x), x[:, :8]), torch.randn(16, 16), mode="data_parallel") == ()


def test_nothing_is_said_of_a_boundary_that_the_user_drew():
    """One operator between two that are configured differently: the redistribution stands before or after it."""
    one, two = sw.ops.ReLU().shard(((8, 1),)), sw.ops.ReLU().shard(((1, 8),))
    assert findings(lambda x: two(torch.tanh(one(x))), torch.randn(16, 16, dtype=DOUBLE)) == ()
    assert findings(lambda x: two(one(x)), torch.randn(16, 16, dtype=DOUBLE)) == ()


def test_a_pointwise_operator_that_leaves_its_inputs_place():
    w = weight(64, 32)
    matmul = sw.ops.MatMul().shard(((1, 4), (4, 2)))
    (found,) = findings(lambda x: torch.softmax(matmul(x, w), -1).exp(), torch.randn(16, 64, dtype=DOUBLE), mode="semi_auto")
    assert (found.kind, found.strategy) == ("boundary", ((8, 1),))
    # (None, a) to (b, None): each rank takes its part of the rows, and lacks half of their columns
    assert found.bytes > 0
    assert "softmax" in found.operator
    assert "sw.shard(F.softmax, in_strategy=((1, 2),))" in found.annotation
    assert "not configured, runs as ((8, 1),)" in str(found)


def test_an_operator_that_changes_dims():
    """The tokens are split, and the view that follows cannot keep that."""
    relu = sw.ops.ReLU().shard(((2, 4, 1),))
    (found,) = findings(lambda x: torch.tanh(relu(x).flatten(0, 1)), torch.randn(4, 8, 6, dtype=DOUBLE))
    assert found.kind == "dimensions"
    assert "aten.relu" in found.why
    assert "nothing costs less there" in found.why
    assert found.annotation == "sw.shard(torch.flatten, in_strategy=((4, 1, 2),))"
    flatten = sw.shard(torch.flatten, ((2, 1, 1),))
    assert findings(lambda x: torch.tanh(flatten(relu(x), 0, 1)), torch.randn(4, 8, 6, dtype=DOUBLE)) == ()


def test_a_fused_operator():
    """Heads and tokens are split; attention needs the keys of all tokens."""
    relu = sw.ops.ReLU().shard(((2, 1, 4, 1),))
    x = torch.randn(2, 3, 8, 4, dtype=DOUBLE)
    found = findings(lambda x: (lambda y: F.scaled_dot_product_attention(y, y, y))(relu(x)), x)
    assert [f.kind for f in found] == ["fusion"]
    assert found[0].bytes == sum(f.bytes for f in found) > 0


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.matmul, self.weight = sw.ops.MatMul().shard(((1, 4), (4, 2))), weight(64, 32)

    def forward(self, x):
        return torch.softmax(self.matmul(x, self.weight), -1).exp()


def test_the_line_is_that_of_the_call():
    (found,) = findings(Net(), torch.randn(16, 64, dtype=DOUBLE), mode="semi_auto")
    assert found.line.startswith("test_lint.py:")
    assert "torch.softmax(" in found.line


def test_a_large_weight_that_is_whole_everywhere():
    model = nn.Linear(64, 128, dtype=DOUBLE)
    x = torch.randn(16, 64, dtype=DOUBLE)
    (found,) = findings(model, x, mode="semi_auto", large=1000)
    assert (found.kind, found.bytes) == ("weights", 0)
    assert "65.5 kB, is whole on every rank" in found.why
    assert found.annotation == "net.shard({'weight': (8, 1)})"
    # and what it says to add can be added
    net = sw.AutoParallel(model, "sharding_propagation").shard({"weight": (8, 1)}).compile(x)
    assert lint(net.plan, large=1000) == ()
    assert sw.verify(net, x).ok


def test_large_work_that_ranks_do_alike():
    w, v = weight(32, 64), weight(64, 64)
    relu = sw.ops.ReLU().shard(((2, 1),))
    found = findings(lambda x: relu(x @ w) @ v, torch.randn(2, 32, dtype=DOUBLE), mode="semi_auto")
    assert [(f.kind, "4 ranks each do the same work" in f.why) for f in found][-1] == ("weights", True)
    assert "(1, 4)" in found[-1].annotation


def test_the_order_is_by_price_and_an_embedding_s_annotation_is_in_the_user_s_order():
    table = weight(64, 16)
    relu = sw.ops.ReLU().shard(((1, 1, 8),))
    ids = torch.randint(64, (8, 4))
    found = findings(lambda ids: relu(torch.sigmoid(F.embedding(ids, table))), ids, mode="semi_auto")
    assert [f.bytes for f in found] == sorted((f.bytes for f in found), reverse=True)
    assert findings(lambda ids: relu(torch.sigmoid(F.embedding(ids, table))), ids) == ()
    (found,) = findings(lambda ids: relu(F.embedding(ids, table)), ids, mode="semi_auto")
    assert found.annotation == "sw.shard(F.embedding, in_strategy=((1, 1), (1, 8)))"
