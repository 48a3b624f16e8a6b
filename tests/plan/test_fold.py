"""Repeated blocks of a graph are found, and nothing is taken for one that is none."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from shardwright.capture.capture import capture
from shardwright.plan.problem.blocks import blocks_of


def graph_of(module, *inputs):
    with torch.enable_grad():
        return capture(module, inputs, {}, torch.device("cpu"), {})


class Stack(nn.Module):
    def __init__(self, depth, width=8, layer=None):
        super().__init__()
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, width)
        self.layers = nn.ModuleList((layer or nn.Linear)(width, width) for _ in range(depth))

    def forward(self, x):
        x = self.first(x).tanh()
        for layer in self.layers:
            x = x + F.gelu(layer(x))
        return self.last(x.sigmoid()).square().mean()


def test_layers_of_a_stack():
    graph = graph_of(Stack(6), torch.ones(4, 8))
    (block,) = blocks_of(graph)
    assert (block.length, block.count) == (3, 6)
    names = [graph.nodes[block.start + i].op.name for i in range(3)]
    assert sorted(names) == ["aten.add", "aten.gelu", "aten.linear"]


def test_few_layers_are_left_alone():
    assert blocks_of(graph_of(Stack(3), torch.ones(4, 8))) == ()


def test_a_layer_of_another_kind_ends_a_block():
    model = Stack(9)
    model.layers[4].weight.requires_grad_(False)
    blocks = blocks_of(graph_of(model, torch.ones(4, 8)))
    graph = graph_of(model, torch.ones(4, 8))
    assert len(blocks) >= 1
    odd = next(i for i, n in enumerate(graph.nodes) if n.module == "layers.4")
    assert all(not block.start <= odd < block.stop for block in blocks)


def test_a_value_that_all_layers_read_is_no_obstacle():
    class Shared(Stack):
        def forward(self, x):
            scale, x = self.first(x).tanh(), self.last(x)
            for layer in self.layers:
                x = x + layer(x) * scale
            return x.square().mean()

    (block,) = blocks_of(graph_of(Shared(5), torch.ones(4, 8)))
    assert (block.length, block.count) == (3, 5)


def test_layers_read_from_further_back_are_no_block():
    class Skips(Stack):
        def forward(self, x):
            kept = []
            for layer in self.layers:
                kept.append(x)
                x = F.gelu(layer(x))
            for _ in self.layers:
                x = x + kept.pop()
            return x.square().mean()

    graph = graph_of(Skips(8), torch.ones(4, 8))
    for block in blocks_of(graph):
        inside = range(block.start, block.stop)
        made = {v: i for i in inside for v in graph.nodes[i].outputs}
        for i in inside:
            for value in graph.nodes[i].inputs:
                if value in made:
                    assert block.copy_of(i) - block.copy_of(made[value]) <= 1


def test_every_layer_contributing_to_the_result():
    class Summed(Stack):
        def forward(self, x):
            x = self.first(x)
            total = x.sum()
            for layer in self.layers:
                x = F.gelu(layer(x))
                total = total + x.sum()
            return total

    (block,) = blocks_of(graph_of(Summed(6), torch.ones(4, 8)))
    assert (block.length, block.count) == (4, 6)


def test_a_shared_layer_is_one_parameter():
    class Tied(Stack):
        def forward(self, x):
            x = self.first(x)
            for _ in range(6):
                x = x + F.gelu(self.layers[0](x))
            return x.square().mean()

    (block,) = blocks_of(graph_of(Tied(1), torch.ones(4, 8)))
    assert (block.length, block.count) == (3, 6)


def test_a_recurrence_that_begins_with_zeros_is_planned():
    import shardwright as sw

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.given = nn.Linear(8, 8), nn.Linear(4, 8)

        def forward(self, x):
            state = torch.zeros(x.shape[0], 8)
            with torch.no_grad():
                for _ in range(5):
                    state = torch.tanh(self.own(state) + self.given(x))
            return torch.tanh(self.own(state) + self.given(x)).square().mean()

    sw.init(4)
    model, x = Recurrent(), torch.randn(8, 4)
    for mode in ("auto", "dynamic_programming", "recursive_programming"):
        torch.testing.assert_close(sw.AutoParallel(model, mode)(x), model(x))
