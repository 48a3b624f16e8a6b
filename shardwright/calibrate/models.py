"""Models whose steps are measured."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mixer(nn.Module):
    """A model of layer norms, gelu, and products over positions and over channels."""

    def __init__(self, d: int = 160, length: int = 64, layers: int = 2, classes: int = 64):
        super().__init__()
        self.embed = nn.Linear(48, d)
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(2 * layers))
        self.mix = nn.ModuleList(nn.Linear(length, length) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(d, 3 * d) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(3 * d, d) for _ in range(layers))
        self.out = nn.Linear(d, classes)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = self.embed(x)
        for i, (mix, up, down) in enumerate(zip(self.mix, self.up, self.down)):
            x = x + mix(self.norms[2 * i](x).transpose(1, 2)).transpose(1, 2)
            x = x + down(F.gelu(up(self.norms[2 * i + 1](x))))
        return F.cross_entropy(self.out(x.mean(1)), target)


class Pictures(nn.Module):
    """A model of convolutions, a pool, and attention over the rest of the picture."""

    def __init__(self, width: int = 24, heads: int = 2, classes: int = 32):
        super().__init__()
        self.heads = heads
        self.up = nn.ModuleList([nn.Conv2d(3, width, 5, padding=2), nn.Conv2d(width, 2 * width, 3, padding=1)])
        self.down = nn.ModuleList([nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1)])
        self.qkv, self.out = nn.Linear(2 * width, 6 * width), nn.Linear(2 * width, classes)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.up[0](x)), 2)
        x = F.gelu(self.down[0](F.relu(self.up[1](x))))
        x = x.flatten(2).transpose(1, 2)
        b, s, d = x.shape
        q, k, v = (t.view(b, s, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, d)
        return F.cross_entropy(self.out((x + y).mean(1)), target)


class Tagger(nn.Module):
    """A model with an embedding table, a gated network per token, and a large head."""

    def __init__(self, vocab: int = 3000, d: int = 96, tags: int = 400):
        super().__init__()
        self.tokens, self.norm = nn.Embedding(vocab, d), nn.RMSNorm(d)
        self.up, self.gate, self.down = nn.Linear(d, 4 * d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.out = nn.Linear(d, tags)

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        x = self.norm(self.tokens(ids))
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return F.cross_entropy(self.out(x).flatten(0, 1), target.flatten())


Inputs = tuple[Tensor, ...]
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Inputs]]] = {
    "mixer": (Mixer, lambda n: (torch.randn(n, 64, 48), torch.randint(0, 64, (n,)))),
    "pictures": (Pictures, lambda n: (torch.randn(n, 3, 24, 24), torch.randint(0, 32, (n,)))),
    "tagger": (Tagger, lambda n: (torch.randint(0, 3000, (n, 32)), torch.randint(0, 400, (n, 32)))),
}
