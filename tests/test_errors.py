"""Every strategy that cannot be followed is refused before anything runs, all problems at once, each with its line."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import shardwright as sw
from shardwright.errors import ShardwrightError, StrategyError


class Matmul(nn.Module):
    def __init__(self, *ops):
        super().__init__()
        self.ops = ops
        self.weight = nn.Parameter(torch.randn(8, 6))

    def forward(self, x):
        for op in self.ops:
            x = op(x, self.weight) if "MatMul" in repr(op) else op(x)
        return x


def refused(*ops, devices=8, shape=(4, 8)):
    sw.init(devices=devices)
    model = Matmul(*ops)
    before = model.weight.clone()
    with pytest.raises(StrategyError) as caught:
        sw.AutoParallel(model)(torch.randn(shape))
    assert torch.equal(model.weight, before)
    assert model.weight.grad is None
    return str(caught.value)


LAYOUT = sw.Layout((2, 4), ("dp", "mp"))

REFUSED = {
    "one strategy too few": (((2, 4),), "1 strategies"),
    "one strategy too many": (((2, 4), (4, 1), (1,)), "3 strategies"),
    "too short": (((2,), (4, 1)), "1 counts for a tensor of 2 dims"),
    "too long": (((2, 4, 1), (4, 1)), "3 counts for a tensor of 2 dims"),
    "zero": (((0, 1), (1, 1)), "holds 0"),
    "negative": (((-2, 1), (1, 1)), "holds -2"),
    "bool": (((True, 1), (1, 1)), "holds True, a bool"),
    "float": (((2.0, 1), (1, 1)), "holds 2.0, a float"),
    "more slices than devices": (((4, 4), (4, 1)), "needs 16 devices, the world has 8"),
    "does not divide": (((3, 1), (1, 1)), "does not divide the 8"),
    "contraction dims disagree": (((2, 4), (2, 1)), "the same dim of the operator"),
    "mixed": (((2, 4), LAYOUT("mp", "None")), "mixes slice counts and Layouts"),
    "contraction axes disagree": ((LAYOUT("dp", "mp"), LAYOUT("None", "None")), "same dim of the operator"),
    "an axis for two dims": ((LAYOUT("dp", "None"), LAYOUT("None", "dp")), "same axis for different dims"),
    "unbound Layout": ((LAYOUT, LAYOUT), "has no dims"),
    "Layout of other dims": ((LAYOUT("dp"), LAYOUT("None", "None")), "has 1 dims, the tensor 2"),
    "Layout over fewer devices": (
        (sw.Layout((2, 2), ("a", "b"))("a", "None"), sw.Layout((2, 2), ("a", "b"))("None", "None")),
        "over 4 devices",
    ),
    "Layout over other devices": (
        tuple(sw.Layout((8,), ("a",), list(range(8, 16)))(*e) for e in (("a", "None"), ("None", "None"))),
        "[8, 9, 10, 11, 12, 13, 14, 15]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    strategy, expected = REFUSED[name]
    text = refused(sw.ops.MatMul().shard(strategy))
    assert expected in text
    assert "MatMul" in text
    assert "test_errors.py:" in text


def test_sum_split_under_a_nonlinear_reduction():
    assert "must stay whole" in refused(sw.ops.ReduceMax(dim=1).shard(((1, 8),)))


@pytest.mark.parametrize(
    "out", [((4, 2),), ((4, 1),), ((1, 1),), ((2, 1), (1, 1))], ids=["rows and columns", "rows", "whole", "two outputs"]
)
def test_unsupported_out_strategy(out):
    assert "out_strategy" in refused(sw.ops.MatMul().shard(((2, 4), (4, 1)), out_strategy=out))


def test_out_strategy_of_another_kind():
    text = refused(sw.ops.MatMul().shard(((2, 4), (4, 1)), out_strategy=(LAYOUT("dp", "None"),)))
    assert "write both the same way" in text


def test_all_problems_at_once():
    text = refused(sw.ops.MatMul().shard(((2, 4),)), sw.ops.ReLU().shard(((3, 1),)), sw.ops.ReduceMax(dim=1).shard(((1, 2),)))
    assert "3 problems" in text
    assert all(name in text for name in ("MatMul", "ReLU", "ReduceMax"))


def test_names_that_match_nothing():
    sw.init(devices=2)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(StrategyError, match="'9.weight'"):
        sw.AutoParallel(model).shard({"9.weight": (2, 1), "nowhere*": ((2, 1),)})(torch.randn(2, 4))
    marked = sw.shard(nn.Linear(4, 4), ((2, 1),), parameter_plan={"wieght": (2, 1)})
    with pytest.raises(StrategyError, match="'wieght'.*it has weight, bias"):
        sw.AutoParallel(marked)(torch.randn(2, 4))


@pytest.mark.parametrize("mode", ["semi-auto", "", None, 3])
def test_unknown_mode(mode):
    with pytest.raises(ShardwrightError, match="semi_auto"):
        sw.AutoParallel(nn.ReLU(), parallel_mode=mode)


def test_wrong_types():
    with pytest.raises(TypeError):
        sw.ops.MatMul().shard([(2, 4), (4, 1)])
    with pytest.raises(TypeError):
        sw.shard(torch.relu, [(2, 1)])
    with pytest.raises(ValueError, match="in_strategy"):
        sw.ops.MatMul().shard(None, ((2, 1),))
    with pytest.raises(TypeError):
        sw.shard(torch.relu, ((2, 1),), parameter_plan={"w": (1,)})
    with pytest.raises(TypeError):
        sw.AutoParallel(3)


@pytest.mark.parametrize(
    ("config", "error"),
    [(None, ValueError), ("half", ValueError), ([(1, 1)], TypeError), ((1,), TypeError), (((1.5, 1),), TypeError)],
)
def test_dataset_strategy(config, error):
    with pytest.raises(error):
        sw.AutoParallel(nn.ReLU()).dataset_strategy(config)


def test_dataset_strategy_for_another_number_of_inputs():
    sw.init(devices=2)
    with pytest.raises(StrategyError, match="2 entries for 1 tensor inputs"):
        sw.AutoParallel(nn.ReLU()).dataset_strategy(((2, 1), (2,)))(torch.randn(2, 2))


@pytest.mark.parametrize("devices", [0, -1, True, 2.0, "4"])
def test_bad_device_count(devices):
    with pytest.raises(ShardwrightError, match="devices="):
        sw.init(devices=devices)


def test_reading_a_number_is_refused():
    class Branches(nn.Module):
        def forward(self, x):
            return x * x.sum().item()

    with pytest.raises(ShardwrightError, match="cannot be captured"):
        sw.AutoParallel(Branches())(torch.randn(2, 2))
