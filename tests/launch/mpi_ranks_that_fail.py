"""What each rank of a job of MPI does where one of them does not do its part: run by tests, with the name of a case."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
from torch import nn

import shardwright as sw

case = sys.argv[1]
world = sw.init(backend="mpi", timeout=3 if case == "late" else 60)
torch.manual_seed(0)
model = nn.Linear(6, 4).double()
net = sw.AutoParallel(model, "data_parallel")
x = torch.randn(8, 6).double()
net(x).square().mean().backward()
began = time.monotonic()
try:
    if case == "late" and world.rank == 1:
        time.sleep(8)
    if case == "error" and world.rank == 1:
        raise ArithmeticError("of the user's own")
    if case == "kill" and world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if case == "other" and world.rank == 1:
        net(x)  # and no backward pass
    for _ in range(3):
        net(x).square().mean().backward()
except sw.errors.WorldError as error:
    os.write(1, f"rank {world.rank} after {time.monotonic() - began:.1f} s: {error}\n".encode())
    raise
os.write(1, f"rank {world.rank} done\n".encode())
