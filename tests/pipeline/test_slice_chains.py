"""Any chain of operators after causal attention is exact in slices of the sequence, or refused."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import shardwright as sw

D = torch.float64


def chain(draw: random.Random, shape: tuple[int, ...]) -> list[tuple[str, Any]]:
    """Draws operators that reshape, reorder, cut and couple a tensor of this shape."""
    found: list[tuple[str, Any]] = []
    first = shape
    for _ in range(draw.randint(1, 5)):
        kind, size = (
            draw.choice(["view", "view", "join", "back", "order", "count", "cut", "softmax", "drop", "cube"]),
            math.prod(shape),
        )
        at = draw.randrange(len(shape))
        if kind == "view":
            dims, rest = [], size
            for _ in range(draw.randint(0, 3)):
                dims.append(draw.choice([d for d in range(1, rest + 1) if rest % d == 0]))
                rest //= dims[-1]
            shape = (*dims, rest)
        elif kind == "join" and at:
            shape = (*shape[: at - 1], shape[at - 1] * shape[at], *shape[at + 1 :])
        elif kind == "back" and size == math.prod(first):
            shape = first
        elif kind == "order":
            order = draw.sample(range(len(shape)), len(shape))
            shape = tuple(shape[dim] for dim in order)
            found.append((kind, order))
        elif kind == "cut" and shape[at] > 1:
            begin = draw.randint(0, 1)
            shape = (*shape[:at], draw.randint(1, shape[at] - begin), *shape[at + 1 :])
            found.append((kind, (at, begin, shape[at])))
        elif kind in ("count", "softmax", "drop", "cube"):
            found.append((kind, at))
        if kind in ("view", "join", "back"):
            found.append(("view", shape))
    return found


class Chained(nn.Module):
    """Attention, and a chain of operators."""

    def __init__(self, steps: list[tuple[str, Any]], width: int):
        super().__init__()
        self.embed, self.key, self.steps = nn.Embedding(20, width), nn.Linear(width, width), steps

    def forward(self, ids):
        x, loss = self.embed(ids), 0.0
        x = x + F.scaled_dot_product_attention(x, self.key(x), x, is_causal=True)
        for kind, arg in self.steps:
            if kind == "count":
                x = x + torch.arange(x.shape[arg], dtype=D).view([-1 if dim == arg else 1 for dim in range(x.ndim)])
            elif kind == "cube":
                loss = loss + (x.sum(arg) ** 3).mean()
            elif kind == "cut":
                x = x.narrow(*arg)
            elif kind == "drop":
                x = F.dropout(x, 0.3)
            else:
                x = {"view": x.reshape, "order": x.permute, "softmax": x.softmax}[kind](arg)
        return loss + (x * x.detach().cos()).mean()


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_any_chain_of_operators_is_exact_or_refused(seed):
    draw, outcomes = random.Random(seed), {True: 0, False: 0}
    for _ in range(60):
        samples, length, width = draw.randint(1, 4), draw.choice([4, 6]), draw.choice([2, 4, 6])
        sw.init(devices=draw.randint(1, 2))
        model = Chained(chain(draw, (samples, length, width)), width).double()
        single, ids = copy.deepcopy(model), torch.randint(20, (samples, length))
        net = sw.AutoParallel(sw.PipelineCell(model, draw.choice([1, 2, samples])))
        net.pipeline(stages=1, scheduler="seqpipe", slices=draw.choice([2, 3]))
        losses = []
        try:
            for target in (net, single):
                torch.manual_seed(1)
                losses.append(target(ids))
                losses[-1].backward()
        except sw.errors.ShardwrightError:
            outcomes[False] += 1
            continue
        outcomes[True] += 1
        pairs = [
            (model.steps, *losses),
            *((name, p.grad, q.grad) for (name, p), q in zip(model.named_parameters(), single.parameters())),
        ]
        for what, ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, msg=lambda text, what=what: f"{what}: {text}")
    assert min(outcomes.values()) > 10
