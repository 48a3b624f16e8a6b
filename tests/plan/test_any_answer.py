"""Whatever a search answers, the program computes what the single device computes: rows drawn at random, not the best ones."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import GPT
from torch import nn

import shardwright as sw
import shardwright.plan.modes.search as automatic
from shardwright.search.problem import Solution


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.norm, self.out = nn.BatchNorm2d(8), nn.Linear(8 * 16, 6)

    def forward(self, x, target):
        x = F.max_pool2d(F.relu(self.norm(self.first(x))), 2)
        return F.cross_entropy(self.out(F.gelu(self.second(x)).flatten(1)), target)


class Tied(nn.Module):
    """One weight for tokens and logits, scaled features, uneven sizes, a gate read by three."""

    def __init__(self):
        super().__init__()
        self.tokens, self.gate, self.mix = nn.Embedding(21, 10), nn.Linear(10, 30), nn.Linear(30, 10)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 10))

    def forward(self, ids, target):
        x = self.tokens(ids)
        gate = self.gate(x).softmax(-1)
        x = self.mix(gate * gate.sigmoid() + gate) * self.scale + x
        logits = x @ self.tokens.weight.T
        return F.cross_entropy(logits.flatten(0, 1), target.flatten()) + (x.sum(1) * self.scale).square().mean()


def gpt():
    return GPT(vocab=24, d=16, layers=5, heads=4, length=6)


def ids(vocab, *shape):
    return torch.randint(0, vocab, shape), torch.randint(0, vocab, shape)


CASES = {
    "gpt": (gpt, lambda: ids(24, 4, 6)),
    "convolutions": (Convolutions, lambda: (torch.randn(6, 3, 16, 16, dtype=torch.float64), torch.randint(0, 6, (6,)))),
    "tied": (Tied, lambda: ids(21, 6, 5)),
}


def at_random(seed, finite_only=True):
    """A stand-in for the search that takes any row, or any that does not cost infinitely much."""

    def solve(problem, **options):
        draw = random.Random(seed)
        choices = [draw.randrange(len(node.cost)) for node in problem.nodes]
        for repeat in problem.repeats:
            for at in range(repeat.start, repeat.start + repeat.length):
                choices[at] = [draw.randrange(len(problem.nodes[at].cost)) for _ in range(repeat.count)]
        flat, places = problem.unfolded()
        mine = [0] * len(flat.nodes)
        for at, where in enumerate(places):
            for copy_, place in enumerate(where):
                mine[place] = choices[at][copy_] if isinstance(choices[at], list) else choices[at]
        _repair(flat, mine, draw)
        return Solution(problem.folded(mine, places), 0.0, 0.0, 0.0, "at random")

    return solve


def _repair(flat, mine, draw):
    """Changes rows until no pair would make a sum pending that is not."""
    for _ in range(200):
        bad = [e for e in flat.edges if not np.isfinite(e.cost[mine[e.a], mine[e.b]])]
        if not bad:
            return
        for edge in bad:
            fine = np.flatnonzero(np.isfinite(edge.cost[mine[edge.a]]))
            mine[edge.b] = int(draw.choice(fine.tolist()))
    raise AssertionError("no finite answer found")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mesh", [(2,), (3,), (2, 2), (2, 3), (2, 2, 2)])
def test_any_rows(name, mesh, monkeypatch):
    make, inputs = CASES[name]
    size = int(np.prod(mesh))
    for seed in range(4):
        torch.manual_seed(seed)
        sw.init(size)
        model, given = make().double(), inputs()
        single = copy.deepcopy(model)
        monkeypatch.setattr(automatic, "solve", at_random(f"{name} {mesh} {seed}"))
        net = sw.AutoParallel(model, parallel_mode="auto").search(mesh=mesh)
        loss, expected = net(*given), single(*given)
        loss.backward()
        expected.backward()
        what = f"{name} on {mesh}, seed {seed}\n{net.plan}"
        assert torch.allclose(loss, expected, rtol=1e-10, atol=1e-12), what
        for (parameter, mine), theirs in zip(model.named_parameters(), single.parameters()):
            assert torch.allclose(mine.grad, theirs.grad, rtol=1e-9, atol=1e-11), f"{parameter}: {what}"
