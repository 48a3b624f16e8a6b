"""Random graphs under random strategies on random device counts equal the single device, in float64."""

from __future__ import annotations

import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import shardwright as sw


def counts(rng, shape, devices, whole=()):
    """Random slice counts of a tensor, their product a divisor of the device count; ``whole`` dims stay at 1."""
    result, left = [1] * len(shape), devices
    for dim in rng.sample(range(len(shape)), len(shape)):
        if dim in whole or shape[dim] == 1:
            continue
        result[dim] = rng.choice([k for k in range(1, left + 1) if left % k == 0])
        left //= result[dim]
    return tuple(result)


def entries(rng, devices, *tensors):
    """One strategy for several tensors, as slice counts or as Layouts; a tensor is (shape, factor names, whole)."""
    factors = list(dict.fromkeys(f for _, names, _ in tensors for f in names))
    size = {f: n for shape, names, _ in tensors for f, n in zip(names, shape, strict=True) if n > 1}
    stays = {f for _, names, whole in tensors for i, f in enumerate(names) if i in whole}
    way = counts(rng, [size.get(f, 1) for f in factors], devices, [i for i, f in enumerate(factors) if f in stays])
    split = dict(zip(factors, way, strict=True))
    if rng.random() < 0.5:
        return tuple(tuple(split[f] if n > 1 else 1 for f, n in zip(names, shape, strict=True)) for shape, names, _ in tensors)
    order = [f for f in factors if split[f] > 1]
    rng.shuffle(order)
    rest = devices // math.prod(split.values())
    names = [*(f"x_{f}" for f in order), "rest"]
    ranks = list(range(devices))
    if rng.random() < 0.2:
        rng.shuffle(ranks)
    layout = sw.Layout((*(split[f] for f in order), rest), tuple(names), ranks)
    return tuple(
        layout(*(f"x_{f}" if split[f] > 1 and n > 1 else "None" for f, n in zip(fs, shape, strict=True)))
        for shape, fs, _ in tensors
    )


class RandomNet(nn.Module):
    """A chain with residuals over activations of shape (batch, length, width)."""

    def __init__(self, rng, devices, batch, length, width, depth):
        super().__init__()
        self.weights = nn.ParameterList()
        self.steps = []
        shape = (batch, length, width)
        for _ in range(depth):
            kind = rng.choice(["matmul", "linear", "relu", "gelu", "softmax", "norm", "add", "reshape", "transpose",
                               "mean", "attention", "cat", "mul"])  # fmt: skip
            shape = self.grow(rng, devices, kind, shape, rng.random() < 0.6)

    def weight(self, *shape):
        self.weights.append(nn.Parameter(torch.randn(*shape, dtype=torch.float64) / math.sqrt(shape[0])))
        return len(self.weights) - 1

    def grow(self, rng, devices, kind, shape, marked):
        def op(function, *tensors):
            strategy = entries(rng, devices, *tensors) if marked else None
            return sw.shard(function, strategy) if strategy else function

        x = (shape, "bsk", ())
        if kind == "matmul":
            width = rng.choice([4, 5, 6, 8])
            f, i = op(torch.matmul, x, ((shape[-1], width), "kn", ())), self.weight(shape[-1], width)
            self.steps.append(lambda x, w: f(x, w[i]))
            return (*shape[:-1], width)
        if kind == "linear":
            width = rng.choice([4, 7, 8])
            f = op(F.linear, x, ((width, shape[-1]), "nk", ()), ((width,), "n", ()))
            i, j = self.weight(width, shape[-1]), self.weight(width)
            self.steps.append(lambda x, w: f(x, w[i], w[j]))
            return (*shape[:-1], width)
        if kind in ("relu", "gelu"):
            f = op({"relu": torch.relu, "gelu": F.gelu}[kind], x)
            self.steps.append(lambda x, w: f(x) + 0.1 * x)
        elif kind == "softmax":
            f = op(lambda x: torch.softmax(x, -1), (shape, "bsk", (2,)))
            self.steps.append(lambda x, w: f(x))
        elif kind == "norm":
            f, i = op(lambda x, g: F.layer_norm(x, x.shape[-1:], g), (shape, "bsk", (2,)), (shape[2:], "k", (0,))), None
            i = self.weight(shape[-1])
            self.steps.append(lambda x, w: f(x, w[i]))
        elif kind in ("add", "mul"):
            f = op(torch.add if kind == "add" else torch.mul, x, (shape[2:], "k", ()))
            i = self.weight(shape[-1])
            self.steps.append(lambda x, w: f(x, w[i]))
        elif kind == "reshape":
            self.steps.append(lambda x, w: torch.tanh(x.reshape(-1, x.shape[-1])).view(x.shape))
        elif kind == "transpose":
            f = op(lambda x: x.transpose(0, 1), x)
            self.steps.append(lambda x, w: f(x).contiguous())
            return (shape[1], shape[0], shape[2])
        elif kind == "mean":
            f = op(lambda x: x.mean(1, keepdim=True), x)
            self.steps.append(lambda x, w: x - f(x))
        elif kind == "attention":
            self.steps.append(lambda x, w: F.scaled_dot_product_attention(x[None], x[None], x[None])[0])
        elif kind == "cat":
            self.steps.append(lambda x, w: torch.cat([x, torch.sin(x)], dim=1)[:, : x.shape[1]])
        return shape

    def forward(self, x):
        for step in self.steps:
            x = step(x, self.weights)
        return x.square().mean(), x


@pytest.mark.parametrize("seed", range(60))
def test_random_graph(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    devices = rng.choice([2, 3, 4, 5, 6, 8, 12])
    sw.init(devices=devices)
    batch, length, width = rng.choice([1, 3, 4, 7, 8]), rng.choice([2, 5, 6]), rng.choice([4, 6, 9])
    net = RandomNet(rng, devices, batch, length, width, depth=rng.choice([3, 6, 9]))
    x = torch.randn(batch, length, width, dtype=torch.float64, requires_grad=True)
    report = sw.verify(net, x)
    assert report.ok, f"{report}\n{sw.AutoParallel(net).compile(x).plan}"
