"""Decoders whose sequence can pass in slices, put together of parts, and batches for them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

WIDTH, WORDS = 16, 32
PARTS: dict[str, tuple[Any, ...]] = {
    "positions": ("learned", "embedded", "rotary", "none"),
    "attention": ("plain", "grouped", "dropped", "scaled"),
    "layers": ("apart", "rows", "checkpointed"),
    "norm": ("layer", "rms"),
    "loss": ("shifted", "labels", "classes first", "cut tokens", "padded labels", "squares", "no loss", "penalty", "view"),
    "is_tied": (True, False),
}


@dataclass(frozen=True)
class Parts:
    """What a decoder is put together of; see ``PARTS``."""

    positions: str = "learned"
    attention: str = "plain"
    layers: str = "apart"
    norm: str = "layer"
    loss: str = "shifted"
    is_tied: bool = True

    @staticmethod
    def drawn(draw: random.Random) -> Parts:
        return Parts(**{name: draw.choice(values) for name, values in PARTS.items()})

    def __str__(self) -> str:
        return "-".join(str(getattr(self, name)).replace(" ", "_") for name in PARTS)


class Rms(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Block(nn.Module):
    def __init__(self, parts: Parts):
        super().__init__()
        self.parts, self.keys = parts, 2 if parts.attention == "grouped" else 4
        norm = nn.LayerNorm if parts.norm == "layer" else Rms
        self.first, self.second = norm(WIDTH), norm(WIDTH)
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * self.keys * WIDTH // 4)
        self.out, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        h, batch, length = self.first(x), x.shape[0], x.shape[1]
        if self.parts.layers == "rows":
            h = h.view(-1, WIDTH)
        q = self.q(h).view(batch, length, 4, -1).transpose(1, 2)
        k, v = (t.view(batch, length, self.keys, -1).transpose(1, 2) for t in self.kv(h).chunk(2, -1))
        if cos is not None:
            q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        kind = self.parts.attention
        options = {"grouped": {"enable_gqa": True}, "dropped": {"dropout_p": 0.2}, "scaled": {"scale": 0.3}}.get(kind, {})
        if kind == "dropped" and not self.training:
            options = {}
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, **options).transpose(1, 2)
        x = x + self.drop(self.out(a.reshape(batch, length, WIDTH)))
        h = self.second(x)
        if self.parts.layers == "rows":
            return x + self.drop(self.down(F.gelu(self.up(h.reshape(-1, WIDTH)))).view(x.shape))
        return x + self.drop(self.down(F.gelu(self.up(h))))


class Decoder(nn.Module):
    def __init__(self, parts: Parts, length: int, layers: int = 3):
        super().__init__()
        self.parts, self.length = parts, length
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        if parts.is_tied:
            self.head.weight = self.embed.weight
        if parts.positions == "learned":
            self.place = nn.Parameter(torch.randn(length, WIDTH))
        elif parts.positions == "embedded":
            self.place = nn.Embedding(length + 3, WIDTH)
        self.blocks = nn.ModuleList(Block(parts) for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        loss = self.parts.loss
        if loss == "cut tokens":
            ids, labels = ids[:, :-1], ids[:, 1:]
        x, length, cos, sin = self.embed(ids), ids.shape[1], None, None
        if self.parts.positions == "learned":
            x = x + self.place[:length]
        elif self.parts.positions == "embedded":
            x = x + self.place(torch.arange(length, device=ids.device))
        elif self.parts.positions == "rotary":
            angles = torch.outer(torch.arange(length, dtype=x.dtype), 100.0 ** (-torch.arange(2, dtype=x.dtype) / 2))
            cos, sin = (f(torch.cat((angles, angles), -1)) for f in (torch.cos, torch.sin))
        for block in self.blocks:
            if self.parts.layers == "checkpointed":
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin)
        logits = self.head(self.norm(x))
        if loss == "no loss":
            return logits
        if loss == "shifted":
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=3), logits
        if loss == "padded labels":
            moved = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
            return F.cross_entropy(logits.view(-1, WORDS).float().to(logits.dtype), moved.view(-1)), logits
        if loss == "classes first":
            return F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=3)
        if loss == "squares":
            return (logits.softmax(-1) - F.one_hot(labels, WORDS).to(logits.dtype)).square().mean(), {"logits": logits}
        if loss == "view":
            rows = logits.view(-1, WORDS)
            return F.cross_entropy(rows, labels.reshape(-1)), rows
        found = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=3)
        return found + 0.01 * self.norm.weight.square().sum() + 0.5 if loss == "penalty" else found


def batch_of(samples: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.randint(WORDS, (samples, length)), torch.randint(WORDS, (samples, length))
