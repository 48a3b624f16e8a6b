"""Communication fusion: how many collectives reduce the gradients of a network, under several settings.

python examples/communication_fusion.py          on 4 simulated ranks
torchrun --nproc-per-node 4 examples/communication_fusion.py
"""

import os
from typing import Any

import torch
from torch import nn

import shardwright as sw


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(256, 256) for _ in range(8)])


def reductions(net: Any, x: torch.Tensor) -> int:
    with sw.record_communication() as log:
        net(x).square().mean().backward()
    return len({event.launch for event in log.events if event.phase == "backward"})


def main() -> None:
    world = sw.init() if "RANK" in os.environ else sw.init(devices=4)
    x = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    numbered = network()
    for number, layer in enumerate(numbered):
        sw.set_comm_fusion(layer, 1 + number // 4)
    nets = {
        "as it is": sw.AutoParallel(network()),
        "each alone": sw.AutoParallel(network()).comm_fusion({"openstate": False}),
        "of 1 MB": sw.AutoParallel(network()).comm_fusion({"allreduce": {"mode": "size", "config": 1}}),
        "beginning at 6 and 12": sw.AutoParallel(network()).comm_fusion({"allreduce": {"mode": "index", "config": [6, 12]}}),
        "four layers each": sw.AutoParallel(numbered),
    }
    for name, net in nets.items():
        count = reductions(net, x)
        if world.rank == 0:
            print(f"buckets {name}: {count} collectives for 16 gradients")


if __name__ == "__main__":
    main()
