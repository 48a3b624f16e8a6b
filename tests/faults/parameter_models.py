"""Models whose parameters users do much with."""

from __future__ import annotations

import copy

import torch
from tensor_methods import COLUMNS, ROWS
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.a, self.b = nn.Linear(COLUMNS, ROWS), nn.Linear(ROWS, 3)
        self.a.register_buffer("average", torch.zeros(ROWS))
        self.double()

    def forward(self, x):
        h = self.a(x).tanh()
        if self.training:
            self.a.average.lerp_(h.detach().mean(0), 0.1)
        return self.b(h)

    def best(self, x):
        return [self(x).argmax(1).tolist(), torch.multinomial(self(x).softmax(1), 2).tolist()]


class Momentum(nn.Module):
    """An encoder that forward moves towards the trained one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.query = nn.Linear(COLUMNS, ROWS).double()
        self.key = copy.deepcopy(self.query).requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            for a, b in zip(self.query.parameters(), self.key.parameters(), strict=True):
                b.mul_(0.9).add_(a, alpha=0.1)
        return (self.query(x) * self.key(x)).mean()
