"""Trains from the newest checkpoint on, saves every third step, and writes the weights at the end: run by tests.

    python train_and_recover.py FOLDER STEPS [--kill RANK SECONDS] [--slow SECONDS]

A rank that is to be killed kills itself, in the first attempt, so many seconds after its training began.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from torch import nn

import shardwright as sw

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("steps", type=int)
parser.add_argument("--kill", nargs=2, type=float)
parser.add_argument("--slow", type=float, default=0.0)
options = parser.parse_args()

world = sw.init(timeout=60)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 3)).double()
net = sw.AutoParallel(model).hsdp(threshold=0)
optimizer = torch.optim.AdamW(model.parameters(), 0.01)
samples = torch.utils.data.TensorDataset(torch.linspace(-1, 1, 300, dtype=torch.float64).reshape(50, 6))
loader = sw.data.loader(samples, batch_size=12, shuffle=True, seed=3, drop_last=True)
state = {"model": net, "optimizer": optimizer, "loader": loader}

net.compile(samples.tensors[0][:12])
step = 0
if sw.latest(options.folder) is not None:
    step = sw.load(options.folder, **state).step
attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
os.write(1, f"rank {world.rank} of {world.size} begins at step {step} at {time.time()} attempt {attempt}\n".encode())
if options.kill and world.rank == options.kill[0] and attempt == "0":
    threading.Timer(options.kill[1], lambda: os.kill(os.getpid(), signal.SIGKILL)).start()

while step < options.steps:
    for (x,) in loader:
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
        step += 1
        time.sleep(options.slow)
        ends = sw.preempted()
        if ends or step % 3 == 0 or step == options.steps:
            sw.save(options.folder, step=step, keep_last=2, **state)
        if ends:
            os.write(1, f"rank {world.rank} saved step {step} and ends\n".encode())
            sys.exit(143)
        if step == options.steps:
            break
values = {name: sw.full_value(p).detach().clone() for name, p in model.named_parameters()}
if world.rank == 0:
    torch.save(values, options.folder / "weights.pt")
