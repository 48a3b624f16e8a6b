"""Handwritten digits on 8 devices: strategies as Layouts, which name the axes that split each dim.

The devices form two grids: 2 x 2 x 2 for the first product, a row of 8 for the second. `shardwright layout` prints
which slice of a tensor every rank holds:

    python -m shardwright layout --devices 2,2,2 --axes dp,sp,mp --shape 32,784 "mp,(sp,dp)"

    python examples/mnist_layout.py                                       simulated
    python -m shardwright run --devices 8 examples/mnist_layout.py        simulated
    torchrun --nproc-per-node 8 examples/mnist_layout.py                  8 processes
"""

from torch import Tensor, nn

import shardwright as sw
from mnist_common import main, normal

cube = sw.Layout((2, 2, 2), ("dp", "sp", "mp"))
row = sw.Layout((8,), ("tp",))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight1 = normal(28 * 28, 512)
        self.weight2 = normal(512, 512)
        self.weight3 = normal(512, 10)
        self.flatten = sw.ops.Flatten()
        self.matmul1 = sw.ops.MatMul().shard((cube("mp", ("sp", "dp")), cube(("sp", "dp"), "None")))
        self.relu1 = sw.ops.ReLU().shard(((4, 1),))
        self.matmul2 = sw.ops.MatMul().shard((row("None", "tp"), row("tp", "None")))
        self.relu2 = sw.ops.ReLU().shard(((8, 1),))
        self.matmul3 = sw.ops.MatMul()

    def forward(self, x: Tensor) -> Tensor:
        x = self.flatten(x)
        x = self.relu1(self.matmul1(x, self.weight1))
        x = self.relu2(self.matmul2(x, self.weight2))
        return self.matmul3(x, self.weight3)


if __name__ == "__main__":
    main(Network)
