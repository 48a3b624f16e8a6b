"""Llama 3 in plain PyTorch, from the published shapes; nothing in the model knows of devices.

    python examples/llama.py --size tiny        trains the tiny one for a few steps on 4 simulated devices

`model()` and `inputs()` give a planner the model and its tensors on the meta device, where they hold no memory. The
environment variable CONFIG chooses the size: 8b (default), 70b, 405b or tiny.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import language_common


@dataclass(frozen=True)
class Config:
    """Sizes of a model; `hidden` is the width of the feed-forward part, `theta` the base of the rotary frequencies."""

    layers: int
    dim: int
    heads: int
    kv_heads: int
    hidden: int
    vocabulary: int = 128256
    theta: float = 500_000.0


CONFIGS = {
    "8b": Config(layers=32, dim=4096, heads=32, kv_heads=8, hidden=14336),
    "70b": Config(layers=80, dim=8192, heads=64, kv_heads=8, hidden=28672),
    "405b": Config(layers=126, dim=16384, heads=128, kv_heads=8, hidden=53248),
    "tiny": Config(layers=2, dim=32, heads=4, kv_heads=2, hidden=64, vocabulary=96),
}


# -- the model: plain PyTorch -----------------------------------------------------------------------------------------


def rotations(x: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angle of each position of (batch, length, ...) and frequency: two of (length, dim / 2)."""
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=x.device) / dim)
    angles = torch.outer(torch.arange(x.shape[1], dtype=torch.float32, device=x.device), frequencies)
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (i, i + dim / 2) of the last dim of (batch, heads, length, dim) by its position's angle."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)


class Attention(nn.Module):
    """Causal attention in which several heads of queries share one head of keys and values."""

    def __init__(self, config: Config):
        super().__init__()
        self.head_dim = config.dim // config.heads
        self.query = nn.Linear(config.dim, config.heads * self.head_dim, bias=False)
        self.key = nn.Linear(config.dim, config.kv_heads * self.head_dim, bias=False)
        self.value = nn.Linear(config.dim, config.kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(config.heads * self.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (self.split_heads(project(x)) for project in (self.query, self.key, self.value))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU: one product gates the other."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate = nn.Linear(config.dim, config.hidden, bias=False)
        self.up = nn.Linear(config.dim, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.norm1, self.attention = nn.RMSNorm(config.dim, eps=1e-5), Attention(config)
        self.norm2, self.feedforward = nn.RMSNorm(config.dim, eps=1e-5), FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), cos, sin)
        return x + self.feedforward(self.norm2(x))


class Llama(nn.Module):
    """A decoder with a head of its own; returns the mean loss of predicting `targets` from `tokens`."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.head = nn.Linear(config.dim, config.vocabulary, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        cos, sin = rotations(x, self.config.dim // self.config.heads, self.config.theta)
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), targets.flatten())


# -- what a planner asks for ------------------------------------------------------------------------------------------


def build(size: str = "8b", layers: int | None = None, dtype: torch.dtype = torch.bfloat16, device: str = "meta") -> Llama:
    """The model of a size, or one with other `layers`."""
    return language_common.build(Llama, CONFIGS[size], layers, dtype, device)


def inputs(batch: int = 16, sequence: int = 8192, device: str = "meta", size: str | None = None) -> tuple[Tensor, Tensor]:
    """Tokens and the targets they should predict, (batch, sequence) each."""
    return language_common.inputs(CONFIGS[size or chosen()].vocabulary, batch, sequence, device)


def model(size: str | None = None) -> nn.Module:
    """The model of a size, or of the one that CONFIG names, on the meta device."""
    return build(size or chosen())


def chosen() -> str:
    return os.environ.get("CONFIG", "8b")


# -- training the tiny one --------------------------------------------------------------------------------------------


def strategies(layout: Any) -> dict[str, Any]:
    """The batch over `dp`; of each pair of products the first by columns and the second by rows over `tp`."""
    plan: dict[str, Any] = {"embedding": {"in_strategy": (layout("dp", "None"),)}}
    plan |= {f"*{name}.weight": layout("tp", "None") for name in ("query", "key", "value", "gate", "up", "head")}
    return plan | {f"*{name}.weight": layout("None", "tp") for name in ("out", "down")}


if __name__ == "__main__":
    language_common.main(__doc__, CONFIGS, build, strategies, ("dp", "tp"))
