"""Technique 2 of sharding propagation: configure the operators that change dims.

Where an operator takes dims away or mixes them, a split of its input can go on in several ways. The mean over the tokens
and the product after it say that it is the batch that stays split; the pointwise operators between them follow.

    python examples/propagation_dimensions.py [--draw dimensions.svg]
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shardwright as sw
from propagation_common import main, weight

DP = 8


class Network(nn.Module):
    def __init__(self, dim: int = 32, classes: int = 8):
        super().__init__()
        self.scale, self.shift = weight(dim), weight(dim)
        self.weight, self.bias = weight(dim, classes), weight(classes)
        self.mean = sw.ops.ReduceMean().shard(((DP, 1, 1),))
        self.matmul = sw.ops.MatMul().shard(((DP, 1), (1, 1)))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = torch.relu(x * self.scale + self.shift)
        x = torch.tanh(self.mean(x, 1))
        return F.cross_entropy(self.matmul(x, self.weight) + self.bias, labels)


if __name__ == "__main__":
    sw.init(devices=DP)
    torch.manual_seed(1)
    main(Network(), torch.randn(16, 12, 32, dtype=torch.float64), torch.randint(8, (16,)))
