"""Trains in a way that its first argument names, which on rank 1 is wrong: run by tests."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
from torch import nn

import shardwright as sw

KIND = sys.argv[1]
if KIND == "never comes" and os.environ["RANK"] == "1":
    time.sleep(100)
if KIND == "ends before" and os.environ["RANK"] == "1":
    sys.exit(0)
world = sw.init(timeout=6)
WRONG = world.rank == 1


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.a(x).relu()
        if KIND == "another program" and WRONG:
            h = h.sin()
        return self.b(h)


model = Net()
net, other = sw.AutoParallel(model), sw.AutoParallel(nn.Linear(3, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
steps = 6 + WRONG * {"more steps": 2, "fewer steps": -2}.get(KIND, 0)
for step in range(steps):
    rows = 8
    if WRONG and step == 3:
        if KIND == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if KIND == "raises":
            raise ValueError("raised at step 3")
        if KIND == "hangs":
            time.sleep(100)
        if KIND == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if KIND == "another order":
            other(torch.ones(4, 3))
        rows = 6 if KIND == "other shapes" else 8
    optimizer.zero_grad()
    loss = net(torch.linspace(-1, 1, rows * 6).reshape(rows, 6)).square().mean()
    if not (WRONG and step == 3 and KIND == "no backward"):
        loss.backward()
    optimizer.step()
