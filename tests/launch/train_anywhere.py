"""Trains a small model in whatever world the launcher made, and prints from each rank what it got: run by tests.

With an argument, rank 1 kills itself in the first attempt, after its first step.
"""

from __future__ import annotations

import os
import signal
import sys

import torch
from torch import nn

import shardwright as sw

world = sw.init(timeout=60)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
net = sw.AutoParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(3):
    optimizer.zero_grad()
    loss = net(torch.linspace(-1, 1, 48, dtype=torch.float64).reshape(8, 6)).square().mean()
    loss.backward()
    optimizer.step()
    if len(sys.argv) > 1 and step == 0 and world.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
# one write, so that lines of ranks do not mix
os.write(1, f"rank {world.rank} of {world.size} attempt {attempt} loss {loss.item():.15f}\n".encode())
