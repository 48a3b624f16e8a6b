"""Optimizer parallel: three layers on eight ranks, each parameter, gradient and optimizer state on one of them in pieces.

python examples/optimizer_parallel.py            on 8 simulated ranks
torchrun --nproc-per-node 4 examples/optimizer_parallel.py
"""

import os

import torch
from torch import nn

import shardwright as sw
from shardwright.parameters.placements import layout_of


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.layer2, self.layer3 = nn.Linear(784, 512), nn.Linear(512, 512), nn.Linear(512, 10)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.layer2(torch.relu(self.layer1(x))))
        return nn.functional.cross_entropy(self.layer3(x), target)


def main() -> None:
    world = sw.init() if "RANK" in os.environ else sw.init(devices=8)
    torch.manual_seed(0)
    model = Network()
    for number, layer in enumerate((model.layer1, model.layer2, model.layer3)):
        sw.set_comm_fusion(layer, number + 1)
    net = sw.AutoParallel(model).hsdp(optimizer_level="level1")
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    x, target = torch.randn(32, 784), torch.randint(10, (32,))
    for step in range(10):
        optimizer.zero_grad()
        loss = net(x, target)
        loss.backward()
        optimizer.step()
        if world.rank == 0:
            print(f"step {step}: loss {loss.item():.4f}")
    if world.rank == 0:
        for given in net.latest.graph.inputs:
            if given.kind == "parameter":
                piece = net.plan.input_layouts[given.value].local_shape(given.meta.shape, 0)
                print(f"{given.target}: {list(piece)} of {list(given.meta.shape)}")
        if not world.is_simulated:
            print("stored as", layout_of(next(net.parameters())))


if __name__ == "__main__":
    main()
