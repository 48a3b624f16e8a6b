"""Small networks whose result is the loss, in float64, with what makes features trip: odd sizes, ties, frozen parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Net(nn.Module):
    """Ids to classes: an embedding tied to the head, a frozen layer, a norm, a branch, and sizes that nothing divides."""

    def __init__(self, width: int = 12, vocabulary: int = 17):
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.up = nn.Linear(width, 30)
        self.down = nn.Linear(30, width)
        self.frozen = nn.Linear(width, width)
        self.frozen.requires_grad_(False)
        self.norm = nn.LayerNorm(width)
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.table.weight
        self.double()

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        x = self.frozen(x) * self.scale
        return F.cross_entropy(self.head(x).flatten(0, 1), target.flatten())


class Pictures(nn.Module):
    """Images to classes, with convolutions and, if wanted, batch norm."""

    def __init__(self, norm: bool = True):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.second = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8, 5)
        self.double()

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(images)))
        x = F.relu(self.second(x)).mean((2, 3))
        return F.cross_entropy(self.head(x), target)


class Layers(nn.Module):
    """Linear layers of one size."""

    def __init__(self, count: int = 4, width: int = 16):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(count))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


def ids_batches(count: int, batch: int = 12, length: int = 5) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(7)
    return [
        (torch.randint(17, (batch, length), generator=draw), torch.randint(17, (batch, length), generator=draw))
        for _ in range(count)
    ]


def image_batches(count: int, batch: int = 12, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(8)
    return [
        (torch.randn(batch, 3, size, size, generator=draw, dtype=torch.float64), torch.randint(5, (batch,), generator=draw))
        for _ in range(count)
    ]


def layer_batches(count: int, batch: int = 12, width: int = 16) -> list[tuple[Tensor]]:
    draw = torch.Generator().manual_seed(9)
    return [(torch.randn(batch, width, generator=draw, dtype=torch.float64),) for _ in range(count)]
