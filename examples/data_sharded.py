"""Trains a convolutional network whose images reach the ranks cut along the batch and the width.

python examples/data_sharded.py                              # 8 simulated devices
torchrun --nproc-per-node 4 examples/data_sharded.py         # a real job: each rank reads its slices alone
"""

from __future__ import annotations

import copy
import os
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import shardwright as sw
from digits import load_digits


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.second = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))
        self.out = nn.Linear(16 * 7 * 7, 10)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.out(self.second(self.first(images)).flatten(1)), labels)


def main(steps: int = 8, batch_size: int = 32) -> None:
    world = sw.init() if {"RANK", "SHARDWRIGHT_DEVICES"} & set(os.environ) else sw.init(devices=8)
    columns = 4 if world.size % 4 == 0 else world.size  # of every image; the ranks left over cut the batch
    rows = world.size // columns
    torch.manual_seed(1)
    model = Network()
    single = copy.deepcopy(model)
    net = sw.AutoParallel(model, "auto").dataset_strategy(((rows, 1, 1, columns), (rows,)))

    digits = TensorDataset(*load_digits())
    slices = sw.data.loader(digits, batch_size, net=net, shuffle=True, seed=1)
    batches = sw.data.loader(digits, batch_size, shuffle=True, seed=1)  # the same ones, whole
    optimizers = [torch.optim.SGD(m.parameters(), 0.01) for m in (model, single)]
    for step, (own, whole) in enumerate(islice(zip(slices, batches), steps)):
        losses = []
        for run, batch, optimizer in zip((net, single), (own, whole), optimizers):
            optimizer.zero_grad()
            loss = run(*batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if world.rank == 0:
            print(f"step {step}: handed in {list(own[0].shape)}, loss {losses[0]:.5f}, of a single device {losses[1]:.5f}")


if __name__ == "__main__":
    main()
