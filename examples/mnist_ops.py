"""Handwritten digits on 8 devices: strategies on primitive operators.

A strategy says into how many slices each dim of each input is cut. What has none runs data parallel.

    python examples/mnist_ops.py                                          simulated
    python -m shardwright run --devices 8 examples/mnist_ops.py           simulated
    torchrun --nproc-per-node 8 examples/mnist_ops.py                     8 processes
"""

from torch import Tensor, nn

import shardwright as sw
from mnist_common import main, normal


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight1 = normal(28 * 28, 512)
        self.weight2 = normal(512, 512)
        self.weight3 = normal(512, 10)
        self.flatten = sw.ops.Flatten()
        self.matmul1 = sw.ops.MatMul().shard(((2, 4), (4, 1)))
        self.relu1 = sw.ops.ReLU().shard(((4, 1),))
        self.matmul2 = sw.ops.MatMul().shard(((1, 8), (8, 1)))
        self.relu2 = sw.ops.ReLU().shard(((8, 1),))
        self.matmul3 = sw.ops.MatMul()

    def forward(self, x: Tensor) -> Tensor:
        x = self.flatten(x)
        x = self.relu1(self.matmul1(x, self.weight1))
        x = self.relu2(self.matmul2(x, self.weight2))
        return self.matmul3(x, self.weight3)


if __name__ == "__main__":
    main(Network)
