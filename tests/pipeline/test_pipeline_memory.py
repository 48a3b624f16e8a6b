"""Memory of pipelines: what a stage holds counted by hand, every network simulated, and real ranks measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pipeline_memory
import pytest
import torch
from pipeline_models import ORDERS
from staged_networks import CASES
from torch import nn

import shardwright as sw
from shardwright.pipeline.cell import SEARCHED

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "faults"))
import jobs


@pytest.mark.whole
@pytest.mark.parametrize("width", [8, 24])
def test_bytes_held_by_hand(width):
    """Backwards of layers read their arguments, those of ReLU results, so that each layer holds one tensor."""
    sw.init(devices=2)
    layers = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(4)]
    for n, layer in enumerate(layers):
        layer.pipeline_stage = int(n > 0)
    net = sw.AutoParallel(sw.PipelineCell(nn.Sequential(*layers), 3)).pipeline(stages=2, scheduler="gpipe")
    net.compile(torch.randn(12, width))
    piece = 4 * width * 4  # samples of a micro-batch, features, bytes
    assert net.plan.times.memory == (2 * piece, 4 * piece)  # with its piece of the batch, and what it received
    assert net.plan.timeline.peak_memory == (6 * piece, 12 * piece)


@pytest.mark.parametrize("name", CASES)
def test_every_network(name):
    """Nothing is guessed, and a rank needs its parameters, their gradients and what is in flight at least."""
    sw.init(devices=2)
    for scheduler in ("1f1b", SEARCHED):
        make, batch = CASES[name][:2]
        args, kwargs = batch(8)
        net = (
            sw.AutoParallel(sw.PipelineCell(make().double(), 4))
            .pipeline(stages=2, scheduler=scheduler)
            .compile(*args, **kwargs)
        )
        for row, found in enumerate(net.plan.memory):
            held = sum(size for _, size in found.by_parameter)
            assert not found.guessed
            assert found.peak >= 2 * held + net.plan.timeline.peak_memory[row] * 0.5


def measured(rank, folder):
    world = sw.init()
    pipeline_memory.watch_this_thread()
    for name in ("1f1b", "zero bubble h1"):
        needed, predicted = pipeline_memory.measure("mlp", ORDERS[name], world)
        print(f"case {name}: {abs(predicted / needed - 1) < 0.02}", f"{needed} {predicted}", flush=True)


@pytest.mark.long
def test_real_ranks(tmp_path):
    found = jobs.run(tmp_path, 2, measured, str(tmp_path), seconds=300)
    for each in found:
        assert each.code == 0, each.text[-3000:]
        for name in ("1f1b", "zero bubble h1"):
            assert f"case {name}: True" in each.text
