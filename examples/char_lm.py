"""A small GPT on real text, the sources of the Python standard library: data and tensor parallel.

The model is plain PyTorch. `strategies` says how it is split: the batch over `dp`; of each pair of products in a block
the first by columns and the second by rows over `tp`, so that a block needs two all-reduces forward and two backward.

    python examples/char_lm.py                                            8 simulated devices
    python -m shardwright run --devices 4 examples/char_lm.py             4 simulated devices
    torchrun --nproc-per-node 4 examples/char_lm.py                       4 processes
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shardwright as sw

SEED = 1
SOURCES = ("argparse", "ast", "asyncio/base_events", "configparser", "datetime", "decimal", "doctest", "inspect", "json/decoder")
LENGTH, BATCH_SIZE = 64, 16
CHECKED_STEPS, TOLERANCE = 5, 1e-4


# -- the model: plain PyTorch -----------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.head_dim = dim // heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split_heads(project(x)) for project in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim), MLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A decoder whose head shares its weight with the embedding."""

    def __init__(self, vocabulary: int, dim: int = 128, heads: int = 4, blocks: int = 2):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, dim)
        self.positions = nn.Embedding(LENGTH, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


# -- how it is split --------------------------------------------------------------------------------------------------


def strategies(layout: sw.Layout) -> dict[str, Any]:
    """Name pattern -> where it is; the rest follows from these."""
    column, row, across = layout("tp", "None"), layout("None", "tp"), layout("tp")
    return {
        "model": {"in_strategy": (layout("dp", "None"),)},  # the batch
        "*.query.weight": column, "*.query.bias": across,
        "*.key.weight": column, "*.key.bias": across,
        "*.value.weight": column, "*.value.bias": across,
        "*.out.weight": row,
        "*.up.weight": column, "*.up.bias": across,
        "*.down.weight": row,
    }  # fmt: skip
