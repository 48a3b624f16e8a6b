"""Technique 3 of sharding propagation: configure the operators at the boundary between two ways to split.

The first half of the network has small weights and large activations: data parallel. The second half is the other way
round: model parallel. Two products in a row are configured: the first one's way spreads backward, to the convolutions,
the second one's forward, to the classifier.

    python examples/propagation_boundary.py [--draw boundary.svg]
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shardwright as sw
from propagation_common import main, weight

DEVICES = 8


class Network(nn.Module):
    def __init__(self, channels: int = 8, wide: int = 256, classes: int = 16):
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, dtype=torch.float64)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, dtype=torch.float64)
        self.first, self.second = weight(channels * 16, 64), weight(64, wide)
        self.bias, self.third = weight(wide), weight(wide, classes)
        self.data_parallel = sw.ops.MatMul().shard(((DEVICES, 1), (1, 1)))
        self.model_parallel = sw.ops.MatMul().shard(((1, 1), (1, DEVICES)))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.conv1(images)), 2)
        x = x + torch.relu(self.conv2(x))
        x = torch.relu(self.data_parallel(x.flatten(1), self.first))
        x = torch.relu(self.model_parallel(x, self.second) + self.bias)
        return F.cross_entropy(torch.matmul(x, self.third), labels)


if __name__ == "__main__":
    sw.init(devices=DEVICES)
    torch.manual_seed(1)
    main(Network(), torch.randn(16, 3, 8, 8, dtype=torch.float64), torch.randint(16, (16,)))
