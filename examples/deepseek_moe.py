"""A mixture of experts after DeepSeek-V3, in plain PyTorch; nothing in the model knows of devices.

    python examples/deepseek_moe.py --size tiny     trains the tiny one for a few steps on 4 simulated devices

The shapes are the published ones: latent attention, a few dense layers, then layers with one shared expert and the
best of many routed experts for each token. What is left out: the choice among groups of experts, the prediction of a
second token, YaRN. An expert takes at most `capacity` times its even share of each sequence and drops the rest, first
come, first served, so that every shape is known beforehand.

`model()` and `inputs()` give a planner the model and its tensors on the meta device, where they hold no memory. The
environment variable CONFIG chooses the size: v3 (default) or tiny.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import language_common
from llama import rotate, rotations


@dataclass(frozen=True)
class Config:
    """Sizes of a model.

    `dense_layers` of the `layers` come first and have a feed-forward part of width `hidden`. A head of queries and
    keys has `nope_dim` elements without and `rope_dim` with position; one of values has `value_dim`.
    """

    layers: int
    dense_layers: int
    dim: int
    heads: int
    hidden: int
    experts: int
    top: int
    expert_hidden: int
    query_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    vocabulary: int
    capacity: float = 1.25
    gate_scale: float = 2.5
    theta: float = 10_000.0


CONFIGS = {
    "v3": Config(
        layers=61, dense_layers=3, dim=7168, heads=128, hidden=18432, experts=256, top=8, expert_hidden=2048,
        query_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128, vocabulary=129280,
    ),
    "tiny": Config(
        layers=3, dense_layers=1, dim=32, heads=4, hidden=64, experts=8, top=2, expert_hidden=16,
        query_rank=24, kv_rank=16, nope_dim=8, rope_dim=4, value_dim=8, vocabulary=96,
    ),
}  # fmt: skip


# -- the model: plain PyTorch -----------------------------------------------------------------------------------------


class LatentAttention(nn.Module):
    """Causal attention whose queries, and whose keys and values together, come from short latent vectors.

    The part of a key that carries the position is one for all heads and does not pass through the latent vector.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.nope, self.rope, self.value_dim = config.nope_dim, config.rope_dim, config.value_dim
        self.kv_rank = config.kv_rank
        self.query_down = nn.Linear(config.dim, config.query_rank, bias=False)
        self.query_norm = nn.RMSNorm(config.query_rank, eps=1e-6)
        self.query_up = nn.Linear(config.query_rank, config.heads * (self.nope + self.rope), bias=False)
        self.kv_down = nn.Linear(config.dim, config.kv_rank + self.rope, bias=False)
        self.kv_norm = nn.RMSNorm(config.kv_rank, eps=1e-6)
        self.kv_up = nn.Linear(config.kv_rank, config.heads * (self.nope + self.value_dim), bias=False)
        self.out = nn.Linear(config.heads * self.value_dim, config.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        query = self.split_heads(self.query_up(self.query_norm(self.query_down(x))), self.nope + self.rope)
        q_nope, q_rope = query.split((self.nope, self.rope), -1)
        latent, k_rope = self.kv_down(x).split((self.kv_rank, self.rope), -1)
        both = self.split_heads(self.kv_up(self.kv_norm(latent)), self.nope + self.value_dim)
        k_nope, value = both.split((self.nope, self.value_dim), -1)
        k_rope = rotate(k_rope.unsqueeze(1), cos, sin).expand(-1, k_nope.shape[1], -1, -1)
        query = torch.cat((q_nope, rotate(q_rope, cos, sin)), -1)
        key = torch.cat((k_nope, k_rope), -1)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))

    def split_heads(self, x: Tensor, head_dim: int) -> Tensor:
        return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU: one product gates the other."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """Many SwiGLU parts in stacked weights; expert `e` works on row `e` of (experts, tokens, dim)."""

    def __init__(self, experts: int, dim: int, hidden: int):
        super().__init__()
        self.gate = nn.Parameter(torch.empty(experts, dim, hidden))
        self.up = nn.Parameter(torch.empty(experts, dim, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, dim))
        for weight in (self.gate, self.up, self.down):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """`weight` (experts, tokens, 1) scales each result; before the last product, where rows are shorter."""
        hidden = F.silu(torch.bmm(x, self.gate)) * torch.bmm(x, self.up)
        return torch.bmm(hidden * weight, self.down)


class MixtureOfExperts(nn.Module):
    """A shared expert for every token and, added to it, the `top` best of the routed ones."""

    def __init__(self, config: Config):
        super().__init__()
        self.experts, self.top = config.experts, config.top
        self.capacity, self.gate_scale = config.capacity, config.gate_scale
        self.router = nn.Linear(config.dim, config.experts, bias=False)
        self.register_buffer("router_bias", torch.zeros(config.experts))  # moved from outside to even out the load
        self.shared = FeedForward(config.dim, config.expert_hidden)
        self.routed = Experts(config.experts, config.dim, config.expert_hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, dim) to the same. Each sequence fills the experts by itself, so sequences may be apart."""
        batch, length, dim = x.shape
        room = math.ceil(self.capacity * length * self.top / self.experts)
        expert, gate = self.choose(x)
        token, weight = self.fill(expert, gate, room)
        index = token.unsqueeze(-1).expand(-1, -1, dim)
        filled = by_expert(x.gather(1, index), self.experts)
        weights = by_expert(weight.to(x.dtype).unsqueeze(-1), self.experts)
        result = by_sequence(self.routed(filled, weights), batch)
        return torch.zeros_like(x).scatter_add(1, index, result) + self.shared(x)

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The numbers of each token's experts and the weights of their results, both (batch, length · top)."""
        score = self.router(x).float().sigmoid()
        expert = (score + self.router_bias).topk(self.top, -1).indices
        gate = score.gather(-1, expert)
        gate = self.gate_scale * gate / gate.sum(-1, keepdim=True)
        return expert.flatten(1), gate.flatten(1)

    def fill(self, expert: Tensor, gate: Tensor, room: int) -> tuple[Tensor, Tensor]:
        """The token in each place of each expert, (batch, experts · room), and its weight, 0 for places left empty."""
        batch, calls = expert.shape
        is_mine = expert.unsqueeze(-1) == torch.arange(self.experts, device=expert.device)
        place = is_mine.cumsum(1, dtype=torch.int32).gather(-1, expert.unsqueeze(-1)).squeeze(-1) - 1
        full = self.experts * room  # one more place takes what is dropped
        slot = torch.where(place < room, expert * room + place, full)
        token = torch.arange(calls, device=expert.device).div(self.top, rounding_mode="floor").expand(batch, -1)
        tokens = torch.zeros(batch, full + 1, dtype=token.dtype, device=token.device).scatter(1, slot, token)
        weights = torch.zeros(batch, full + 1, dtype=gate.dtype, device=gate.device).scatter(1, slot, gate)
        return tokens[:, :full], weights[:, :full]


def by_expert(x: Tensor, experts: int) -> Tensor:
    """(batch, experts · room, n) to (experts, batch · room, n)."""
    return x.unflatten(1, (experts, -1)).transpose(0, 1).flatten(1, 2)


def by_sequence(x: Tensor, batch: int) -> Tensor:
    """(experts, batch · room, n) to (batch, experts · room, n)."""
    return x.unflatten(1, (batch, -1)).transpose(0, 1).flatten(1, 2)


class Block(nn.Module):
    def __init__(self, config: Config, dense: bool):
        super().__init__()
        self.norm1, self.attention = nn.RMSNorm(config.dim, eps=1e-6), LatentAttention(config)
        self.norm2 = nn.RMSNorm(config.dim, eps=1e-6)
        self.feedforward = FeedForward(config.dim, config.hidden) if dense else MixtureOfExperts(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), cos, sin)
        return x + self.feedforward(self.norm2(x))


class DeepSeekMoE(nn.Module):
    """A decoder with a head of its own; returns the mean loss of predicting `targets` from `tokens`."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.dim)
        self.blocks = nn.ModuleList(Block(config, i < config.dense_layers) for i in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, config.vocabulary, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        cos, sin = rotations(x, self.config.rope_dim, self.config.theta)
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), targets.flatten())


# -- what a planner asks for ------------------------------------------------------------------------------------------


def build(
    size: str = "v3", layers: int | None = None, dtype: torch.dtype = torch.bfloat16, device: str = "meta"
) -> DeepSeekMoE:
    """The model of a size, or one with other `layers`."""
    return language_common.build(DeepSeekMoE, CONFIGS[size], layers, dtype, device)


def inputs(batch: int = 16, sequence: int = 4096, device: str = "meta", size: str | None = None) -> tuple[Tensor, Tensor]:
    """Tokens and the targets they should predict, (batch, sequence) each."""
    return language_common.inputs(CONFIGS[size or chosen()].vocabulary, batch, sequence, device)


def model(size: str | None = None) -> nn.Module:
    """The model of a size, or of the one that CONFIG names, on the meta device."""
    return build(size or chosen())


def chosen() -> str:
    return os.environ.get("CONFIG", "v3")


# -- training the tiny one --------------------------------------------------------------------------------------------


def strategies(layout: Any) -> dict[str, Any]:
    """The batch over `dp`, the routed experts over `ep`."""
    plan: dict[str, Any] = {"embedding": {"in_strategy": (layout("dp", "None"),)}}
    return plan | {f"*routed.{name}": layout("ep", "None", "None") for name in ("gate", "up", "down")}


if __name__ == "__main__":
    language_common.main(__doc__, CONFIGS, build, strategies, ("dp", "ep"))
