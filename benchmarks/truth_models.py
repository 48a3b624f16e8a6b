"""Models, batches and well-known plans for ``plan_truth.py``; the calibration has other models, and has not seen these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from models import GPT, MLP, tensor_parallel_gpt_plan
from torch import Tensor, nn

import shardwright as sw

Inputs = tuple[Tensor, ...]
Strategies = dict[str, Any]


class Llama(nn.Module):
    """RMS norms, rotary positions, gated feedforward, untied head; returns the loss."""

    def __init__(self, vocab: int = 512, d: int = 128, layers: int = 2, heads: int = 4, length: int = 64):
        super().__init__()
        self.tokens = nn.Embedding(vocab, d)
        self.blocks = nn.ModuleList(LlamaBlock(d, heads) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(d), nn.Linear(d, vocab, bias=False)
        angles = torch.outer(torch.arange(length).float(), 1e4 ** (-torch.arange(0, d // heads, 2).float() / (d // heads)))
        self.register_buffer("cos", angles.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angles.sin().repeat(1, 2), persistent=False)

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), target.flatten())


class LlamaBlock(nn.Module):
    def __init__(self, d: int, heads: int):
        super().__init__()
        self.head, hidden = d // heads, 3 * d
        self.norm1, self.norm2 = nn.RMSNorm(d), nn.RMSNorm(d)
        self.q, self.k, self.v, self.proj = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(d, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, s, _ = x.shape
        h = self.norm1(x)
        q, k, v = (f(h).view(b, s, -1, self.head).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, s, -1))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Convolutions(nn.Module):
    """Residual convolutions over images of 32 x 32, pooled, with a linear classifier."""

    def __init__(self, width: int = 16, blocks: int = 2, classes: int = 100):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.up = nn.ModuleList(nn.Conv2d(width, 2 * width, 3, padding=1) for _ in range(blocks))
        self.down = nn.ModuleList(nn.Conv2d(2 * width, width, 3, padding=1) for _ in range(blocks))
        self.out = nn.Linear(width * 64, classes)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        for up, down in zip(self.up, self.down):
            x = x + down(F.relu(up(x)))
        return F.cross_entropy(self.out(F.max_pool2d(x, 2).flatten(1)), target)


class Recommender(nn.Module):
    """Two large tables of embeddings, a bag of items, and a small network on top."""

    def __init__(self, users: int = 6000, items: int = 8000, d: int = 64):
        super().__init__()
        self.users, self.items = nn.Embedding(users, d), nn.Embedding(items, d)
        self.one, self.two, self.out = nn.Linear(2 * d, 512), nn.Linear(512, 256), nn.Linear(256, 1)

    def forward(self, user: Tensor, items: Tensor, target: Tensor) -> Tensor:
        x = torch.cat([self.users(user), self.items(items).mean(1)], -1)
        y = self.out(F.relu(self.two(F.relu(self.one(x))))).squeeze(-1)
        return F.mse_loss(torch.sigmoid(y), target)


# -- batches --------------------------------------------------------------------------------------------------------------


def _ids(vocab: int, batch: int, length: int) -> Inputs:
    ids = torch.randint(0, vocab, (batch, length + 1))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def _mlp(n: int) -> Inputs:
    return torch.randn(n, 784), torch.randint(0, 10, (n,))


def _images(n: int) -> Inputs:
    return torch.randn(n, 3, 32, 32), torch.randint(0, 100, (n,))


def _clicks(n: int) -> Inputs:
    return torch.randint(0, 6000, (n,)), torch.randint(0, 8000, (n, 8)), torch.rand(n)


@dataclass(frozen=True)
class Subject:
    """A model with its batches: the middle one is that of the pairs, all are cases of best-by-measurement."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    batches: tuple[int, ...]
    tensor_parallel: Callable[[sw.Layout, str], Strategies]
    sequence_parallel: Callable[[sw.Layout], Strategies] | None = None


# -- Megatron's plans -----------------------------------------------------------------------------------------------------


def _columns(layout: sw.Layout, names: tuple[str, ...], bias: bool = True) -> Strategies:
    plan: Strategies = {f"{name}.weight": layout("tp", "None") for name in names}
    return plan | ({f"{name}.bias": layout("tp") for name in names} if bias else {})


def _gpt_tensor(layout: sw.Layout, batch: str) -> Strategies:
    plan = {name: layout(*axes) for name, axes in tensor_parallel_gpt_plan().items()}
    return {"blocks.?": {"in_strategy": (layout(batch, "None", "None"),), "parameter_plan": plan}}


def _gpt_sequence(layout: sw.Layout) -> Strategies:
    plan = {name.removeprefix("attention."): layout(*axes) for name, axes in tensor_parallel_gpt_plan().items()}
    split, whole = layout("None", "tp", "None"), layout("None", "None", "None")
    attention = {name: entry for name, entry in plan.items() if name[0] in "qkvp"}
    up, down = ({n.removeprefix(f"{k}."): e for n, e in plan.items() if n.startswith(k)} for k in ("up", "down"))
    return {
        "blocks.?": {"in_strategy": (split,)},
        "blocks.?.attention": {"in_strategy": (whole,), "parameter_plan": attention},
        "blocks.?.up": {"in_strategy": (whole,), "parameter_plan": up},
        "blocks.?.down": {"in_strategy": (layout("None", "None", "tp"),), "parameter_plan": down},
    }


def _llama_tensor(layout: sw.Layout, batch: str) -> Strategies:
    plan = _columns(layout, ("q", "k", "v", "gate", "up"), bias=False)
    plan |= {f"{name}.weight": layout("None", "tp") for name in ("proj", "down")}
    tables = (layout("None", "None"), layout("None", "None"))
    return {"blocks.?": {"in_strategy": (layout(batch, "None", "None"), *tables), "parameter_plan": plan}}


def _mlp_tensor(layout: sw.Layout, batch: str) -> Strategies:
    return {
        "layers.0": {"in_strategy": (layout(batch, "None"),), "parameter_plan": {"weight": layout("tp", "None")}},
        "layers.1": {"in_strategy": (layout(batch, "tp"),), "parameter_plan": {"weight": layout("None", "tp")}},
    }


def _conv_tensor(layout: sw.Layout, batch: str) -> Strategies:
    up = {"weight": layout("tp", "None", "None", "None"), "bias": layout("tp")}
    down = {"weight": layout("None", "tp", "None", "None")}
    whole, split = layout(batch, "None", "None", "None"), layout(batch, "tp", "None", "None")
    return {
        "up.?": {"in_strategy": (whole,), "parameter_plan": up},
        "down.?": {"in_strategy": (split,), "parameter_plan": down},
    }


def _recommender_tensor(layout: sw.Layout, batch: str) -> Strategies:
    one = {"weight": layout("tp", "None"), "bias": layout("tp")}
    return {
        "one": {"in_strategy": (layout(batch, "None"),), "parameter_plan": one},
        "two": {"in_strategy": (layout(batch, "tp"),), "parameter_plan": {"weight": layout("None", "tp")}},
    }


SUBJECTS: dict[str, Subject] = {
    "mlp": Subject(MLP, _mlp, (64, 512, 2048), _mlp_tensor),
    "gpt": Subject(
        lambda: GPT(d=192, layers=2, heads=4, length=64), lambda n: _ids(256, n, 64), (2, 8, 16), _gpt_tensor, _gpt_sequence
    ),
    "llama": Subject(Llama, lambda n: _ids(512, n, 64), (4, 16, 32), _llama_tensor),
    "convolutions": Subject(Convolutions, _images, (8, 32, 64), _conv_tensor),
    "recommender": Subject(Recommender, _clicks, (64, 512, 2048), _recommender_tensor),
}
