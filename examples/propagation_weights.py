"""Technique 1 of sharding propagation: configure the operators that carry weights.

An embedding, data parallel, and a feed-forward layer, data parallel and by columns: the lookup and the layer's first
product are configured. The second product becomes split by rows, with one all-reduce.

    python examples/propagation_weights.py [--draw weights.svg]
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shardwright as sw
from propagation_common import main, weight

DP, MP = 2, 4


class Network(nn.Module):
    def __init__(self, vocabulary: int = 48, dim: int = 32):
        super().__init__()
        self.table = weight(vocabulary, dim)
        self.up, self.up_bias = weight(dim, 4 * dim), weight(4 * dim)
        self.down, self.down_bias = weight(4 * dim, dim), weight(dim)
        self.gather = sw.ops.Gather().shard(((1, 1), (DP, 1)))
        self.matmul = sw.ops.MatMul().shard(((DP, 1), (1, MP)))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.gather(self.table, ids).flatten(0, 1)
        h = F.gelu(self.matmul(x, self.up) + self.up_bias)
        x = x + (torch.matmul(h, self.down) + self.down_bias)
        return F.mse_loss(x, targets)


if __name__ == "__main__":
    sw.init(devices=DP * MP)
    torch.manual_seed(1)
    main(Network(), torch.randint(48, (8, 16)), torch.randn(8 * 16, 32, dtype=torch.float64))
