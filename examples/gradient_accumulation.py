"""Gradient accumulation: a batch in four parts, one part's activations at a time, one reduction of the gradients.

python examples/gradient_accumulation.py         on 4 simulated ranks
torchrun --nproc-per-node 4 examples/gradient_accumulation.py
"""

import os

import torch
from torch import nn

import shardwright as sw


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.layers(x), target)


def losses(parts: int) -> tuple[list[float], int]:
    """Losses of some steps, and how many collectives reduced gradients in the last."""
    torch.manual_seed(0)
    net = sw.AutoParallel(sw.GradAccumulation(Network(), parts))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    x, target = torch.randn(64, 784), torch.randint(10, (64,))
    found = []
    for _ in range(5):
        optimizer.zero_grad()
        with sw.record_communication() as log:
            loss = net(x, target)
            loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found, len({event.launch for event in log.events if event.phase == "backward" and event.shape})


def main() -> None:
    world = sw.init() if "RANK" in os.environ else sw.init(devices=4)
    whole, _ = losses(1)
    parts, reductions = losses(4)
    if world.rank == 0:
        for step, (a, b) in enumerate(zip(whole, parts, strict=True)):
            print(f"step {step}: loss {b:.6f} in four parts, {a:.6f} at once")
        print(f"collectives that reduce gradients: {reductions} a step")


if __name__ == "__main__":
    main()
