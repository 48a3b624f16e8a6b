"""The models the benchmarks train: the seed MLP and a small GPT, written for a single device."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """784-512-512-10, as three bias-free matrix products."""

    def __init__(self, sizes: tuple[int, ...] = (784, 512, 512, 10)):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return F.cross_entropy(self.layers[-1](x), target)


class Feedforward(nn.Module):
    """Two linear layers of width ``d`` and ``4 d`` with a ReLU between, and a mean of squares as loss."""

    def __init__(self, d: int):
        super().__init__()
        self.up = nn.Linear(d, 4 * d, bias=False)
        self.down = nn.Linear(4 * d, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x))).square().mean()


class Attention(nn.Module):
    """Causal self-attention; ``heads`` is the number of heads it holds."""

    def __init__(self, d: int, heads: int):
        super().__init__()
        self.head = d // heads
        self.q, self.k, self.v, self.proj = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (f(x).view(b, s, -1, self.head).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(b, s, -1))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, d: int, heads: int):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attention = Attention(d, heads)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln1(x))
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class GPT(nn.Module):
    """A small GPT with learned positions and an untied head; returns the loss."""

    def __init__(self, vocab: int = 256, d: int = 256, layers: int = 4, heads: int = 8, length: int = 128):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, d), nn.Embedding(length, d)
        self.blocks = nn.ModuleList(Block(d, heads) for _ in range(layers))
        self.ln, self.head = nn.LayerNorm(d), nn.Linear(d, vocab, bias=False)

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.ln(x)).flatten(0, 1), target.flatten())


def tensor_parallel_gpt_plan(axis: str = "tp") -> dict[str, tuple[str, ...]]:
    """Megatron's split of a block: q, k, v and up by columns, proj and down by rows. Entries are Layout calls."""
    columns = ("attention.q", "attention.k", "attention.v", "up")
    plan = {f"{name}.weight": (axis, "None") for name in columns}
    plan |= {f"{name}.bias": (axis,) for name in columns}
    return plan | {f"{name}.weight": ("None", axis) for name in ("attention.proj", "down")}
