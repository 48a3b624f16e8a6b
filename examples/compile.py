"""Compile: trains a small model with and without compile=..., and compares.

    python examples/compile.py [--backend inductor] [--devices 4] [--steps 3]

Prints the program that runs: what stands between collectives is one compiled function.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import nn

import shardwright as sw


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x):
        return x + F.dropout(self.down(F.gelu(self.up(self.norm(x)))), 0.1, self.training)


class Net(nn.Module):
    def __init__(self, d=32, layers=4):
        super().__init__()
        self.blocks = nn.Sequential(*(Block(d) for _ in range(layers)))
        self.head = nn.Linear(d, 10)

    def forward(self, x, target):
        return F.cross_entropy(self.head(self.blocks(x)), target)


def train(model, steps, **options):
    net, optimizer = sw.AutoParallel(model, **options), torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(steps):
        torch.manual_seed(step)
        x, target = torch.randn(16, 32, dtype=torch.float64), torch.randint(0, 10, (16,))
        optimizer.zero_grad()
        net(x, target).backward()
        optimizer.step()
    return net, [sw.full_value(p).detach() for p in model.parameters()]


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--backend", default="inductor")
parser.add_argument("--devices", type=int, default=4)
parser.add_argument("--steps", type=int, default=3)
options = parser.parse_args()
sw.init(devices=options.devices)
torch.manual_seed(0)
model = Net().double()
_, plain = train(copy.deepcopy(model), options.steps)
net, compiled = train(model, options.steps, compile=options.backend)
print(net.latest.runs)
print(f"weights differ by {max(float((a - b).abs().max()) for a, b in zip(plain, compiled)):.1e}")
