"""Handwritten digits on 8 devices: strategies on torch's own functions.

Any function of torch takes a strategy, in the same form as a primitive. What has none runs data parallel.

    python examples/mnist_functional.py                                   simulated
    python -m shardwright run --devices 8 examples/mnist_functional.py    simulated
    torchrun --nproc-per-node 8 examples/mnist_functional.py              8 processes
"""

import torch
from torch import Tensor, nn

import shardwright as sw
from mnist_common import main, normal


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight1 = normal(28 * 28, 512)
        self.weight2 = normal(512, 512)
        self.weight3 = normal(512, 10)
        self.matmul1 = sw.shard(torch.matmul, in_strategy=((2, 4), (4, 1)))
        self.relu1 = sw.shard(torch.relu, in_strategy=((4, 1),))
        self.matmul2 = sw.shard(torch.matmul, in_strategy=((1, 8), (8, 1)))
        self.relu2 = sw.shard(torch.relu, in_strategy=((8, 1),))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(x, 1)
        x = self.relu1(self.matmul1(x, self.weight1))
        x = self.relu2(self.matmul2(x, self.weight2))
        return torch.matmul(x, self.weight3)


if __name__ == "__main__":
    main(Network)
