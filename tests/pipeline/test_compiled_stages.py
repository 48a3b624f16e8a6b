"""Stages compiled with ``torch.compile``: micro-batches compute what they compute otherwise, in every schedule."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import shardwright as sw

sys.path.insert(0, str(Path(__file__).parent))
from test_pipeline_jobs import Gpt


class Net(Gpt):
    """Its loss alone."""

    def forward(self, ids):
        return super().forward(ids)[0]


class Attention(nn.Module):
    """Blocks of causal attention."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 8), nn.Linear(8, 32)
        self.layers = nn.ModuleList(nn.Linear(8, 24) for _ in range(4))

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            q, k, v = layer(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
            x = x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


CASES = [
    (Net, {"scheduler": "1f1b"}, "data_parallel"),
    (Net, {"scheduler": "gpipe"}, "semi_auto"),
    (Net, {"scheduler": "zero_bubble_h1"}, "auto"),
    (Net, {"scheduler": "1f1b", "interleave": True}, "semi_auto"),
    (Attention, {"scheduler": "seqpipe", "slices": 2}, "data_parallel"),
]


def few(case):
    return pytest.param(*case, marks=() if case[1]["scheduler"] == "gpipe" else pytest.mark.long)


@pytest.mark.parametrize("make, pipeline, mode", [few(case) for case in CASES])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_equal_to_the_single_device(make, pipeline, mode, backend):
    sw.init(devices=4)
    torch.manual_seed(0)
    model = make().double()
    single = copy.deepcopy(model)
    net = sw.AutoParallel(sw.PipelineCell(model, 4), mode, compile=backend).pipeline(stages=2, **pipeline)
    found = []
    for called, own in ((net, model), (single, single)):
        optimizer = torch.optim.AdamW(own.parameters(), 1e-2)
        losses = []
        for step in range(2):
            torch.manual_seed(step)
            losses.append(called(torch.arange(60).view(10, 6) % 32))
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        own.eval()
        with torch.no_grad():
            losses.append(called(torch.arange(60).view(10, 6) % 32))
        found.append([*(loss.detach() for loss in losses), *(p.detach() for p in own.parameters())])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)
