"""Prices of the collectives that operators run themselves are those of the collectives that they do run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import shardwright as sw
from shardwright.cost.communication import Communication
from shardwright.cost.machine_files import PRESETS, load_machine

MACHINE = load_machine(PRESETS / "cpu-gloo.toml")


class Classifier(nn.Module):
    def __init__(self, scores, samples):
        super().__init__()
        self.out = nn.Linear(8, 12, bias=False)
        self.loss = sw.shard(F.cross_entropy, in_strategy=(scores, samples))

    def forward(self, x, target):
        return self.loss(self.out(x), target)


@pytest.mark.parametrize("split, count", [((4, 1), 1), ((1, 4), 2), ((2, 2), 3)], ids=["samples", "classes", "both"])
def test_a_mean_over_samples_is_one_collective_and_over_classes_two_more(split, count):
    sw.init(devices=4)
    layout = sw.Layout(split, ("b", "c"))
    net = sw.AutoParallel(Classifier(layout("b", "c"), layout("b"))).search(machine=MACHINE)
    inputs = torch.randn(16, 8), torch.randint(0, 12, (16,))
    net.compile(*inputs)
    with sw.record_communication() as log:
        net(*inputs)
    name = next(node.name for node in net.plan.graph.nodes if "cross_entropy" in node.name)
    runs = [event for event in log.events if event.cause == name and event.kind == "all_reduce"]
    assert len(runs) == count
    prices, axes = Communication(MACHINE, net.plan.mesh), net.plan.mesh.axes
    # a few numbers: what a call takes without its bytes
    expected = sum(float(prices.all_reduce(64.0, [axes.index(a) for a in event.axes])) for event in runs)
    assert net.plan.price.operators[name].collectives == pytest.approx(expected, rel=0.01)
