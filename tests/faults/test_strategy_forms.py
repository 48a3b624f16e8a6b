"""Strategies of modules and functions with more entries than tensors are refused, as those of operators are."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import shardwright as sw


class Pair(nn.Module):
    """Takes two tensors and a number, returns two."""

    def forward(self, a, b, scale=2.0):
        return torch.relu(a @ b) * scale, a + 1


class Holder(nn.Module):
    def __init__(self, inner, inputs):
        super().__init__()
        self.inner, self.inputs = inner, inputs

    def forward(self, *x):
        result = self.inner(*x)
        return result[0] if isinstance(result, tuple) else result


# what is marked, its inputs, and how many tensors it returns
MODULES = {
    "one operator": (lambda: nn.Linear(8, 8), 1, 1),
    "several operators": (lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), 1, 1),
    "two inputs": (Pair, 2, 2),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 1, 1),
}
FORMS = [(name, way, given, out) for name, (way, given, out) in itertools.product(
    MODULES, itertools.product(("by name", "on it"), (1, 2, 3, 4), (0, 1, 2, 3)))]  # fmt: skip


@pytest.mark.parametrize("name, way, given, out", FORMS)
def test_entries_beyond_the_tensors_are_refused(name, way, given, out, monkeypatch):
    monkeypatch.setattr("shardwright.world.current._current", [])
    sw.init(devices=2)
    make, inputs, outputs = MODULES[name]
    ndim = 3 if name == "attention" else 2
    entry = (2, *[1] * (ndim - 1))
    strategy = (entry,) * given
    out_strategy = ((entry,) * out) or None
    inner = make().eval()
    holder = Holder(inner, inputs)
    if way == "on it":
        sw.shard(inner, strategy, out_strategy)
        net = sw.AutoParallel(holder)
    else:
        net = sw.AutoParallel(holder).shard({"inner": {"in_strategy": strategy, "out_strategy": out_strategy}})
    x = [torch.ones(4, 8, 8) if ndim == 3 else torch.ones(8, 8) for _ in range(inputs)]
    wrong = [(n, side) for n, most, side in ((given, inputs, "input"), (out, outputs, "output")) if n > most]
    if not wrong:
        torch.testing.assert_close(net(*x), holder(*x))
        return
    with pytest.raises(sw.errors.StrategyError) as caught:
        net(*x)
    for count, side in wrong:
        assert f"{count} entries {(entry,) * count} in {side[:-3]}_strategy for " in str(caught.value)
        assert f"give one per {side}" in str(caught.value)
    assert "test_strategy_forms.py:" in str(caught.value)


@pytest.mark.parametrize("strategy", [5, "dp", [(2, 1)], {1: 2}, ((2, 1)[0],), ((2, "a"),), ((0, 1),), ((3, 1),), ((2, 1, 1),)])
def test_what_is_no_strategy_is_refused(strategy, monkeypatch):
    monkeypatch.setattr("shardwright.world.current._current", [])
    sw.init(devices=2)
    with pytest.raises((sw.errors.ShardwrightError, TypeError), match="strategy|slice|devices|dims|entry|keys"):
        sw.AutoParallel(Holder(nn.Linear(8, 8), 1)).shard({"inner": strategy})(torch.ones(8, 8))


@pytest.mark.whole
@pytest.mark.parametrize("ranks", [2, 4])
def test_functions_need_an_entry_per_input_all_counts_or_all_layouts(ranks):
    sw.init(devices=ranks)
    layout = sw.Layout((ranks,), ("d",))
    x, w = torch.randn(8, 8), torch.randn(8, 8)
    for function in (lambda a, b: (a @ b).relu(), torch.matmul):
        for strategy, said in (
            (((ranks, 1),), "give one per input"),
            (((1, 1), layout("None", "d")), "mixes slice counts and Layouts"),
        ):
            with pytest.raises(sw.errors.StrategyError, match=said):
                sw.AutoParallel(lambda a, b, f=function, s=strategy: sw.shard(f, s)(a, b))(x, w)
