"""Trains on the ranks of a job and saves the weights: ``train_in_pods.py OUT [DIES]``; rank 1 dies in its first life."""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

import shardwright as sw

world, out = sw.init(), Path(sys.argv[1])
if len(sys.argv) > 2 and world.rank == 1 and not Path(sys.argv[2]).exists():
    Path(sys.argv[2]).touch()
    os.kill(os.getpid(), signal.SIGKILL)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()
x, y = torch.randn(12, 8).double(), torch.randint(4, (12,))
net = sw.AutoParallel(model, "data_parallel")
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for _ in range(3):
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(x), y).backward()
    optimizer.step()
weights = {name: sw.full_value(p).detach() for name, p in model.named_parameters()}
if world.rank == 0:
    torch.save((world.size, os.environ["MS_ROLE"], weights), out)
