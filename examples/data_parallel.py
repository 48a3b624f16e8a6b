"""Data parallel training of a small network: the batch over all ranks, gradients summed while the backward runs.

Simulated, or started with ``torchrun --nproc-per-node 4``: the losses are those of one device, to the last digit shown.
"""

import copy
import os

import torch
from torch import nn
from torch.nn import functional as F

import shardwright as sw


def train(model: nn.Module, loss_of, rows: slice) -> list[float]:
    """Ten steps; ``rows`` are the part of every batch that is handed in."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in range(10):
        images = torch.randn(32, 784, dtype=torch.float64, generator=generator)
        labels = images[:, :10].argmax(1)
        optimizer.zero_grad()
        loss = loss_of(images[rows], labels[rows])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)).double()

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.layers(images), labels)


def main() -> None:
    world = sw.init(None if "RANK" in os.environ else 4)
    torch.manual_seed(0)
    model = Classifier()
    plain = copy.deepcopy(model)
    net = sw.AutoParallel(model, "data_parallel").dataset_strategy("data_parallel")
    size = 32 // world.size
    rows = slice(None) if world.is_simulated else slice(world.rank * size, (world.rank + 1) * size)
    losses, expected = train(model, net, rows), train(plain, plain, slice(None))
    if world.rank == 0:
        for step, (loss, single) in enumerate(zip(losses, expected, strict=True)):
            print(f"step {step}: loss {loss:.7f}, on a single device {single:.7f}")


if __name__ == "__main__":
    main()
