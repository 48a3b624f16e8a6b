"""Models and meshes for ``plan_quality.py``, and the plans that an expert would write for them.

Everything lives on the meta device: shapes, no numbers, no memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from models import GPT, MLP, tensor_parallel_gpt_plan
from torch import Tensor, nn
from truth_models import Convolutions, Llama, Recommender

import shardwright as sw
from shardwright.calibrate.models import Mixer, Pictures, Tagger

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import deepseek_moe
import llama

Inputs = tuple[Tensor, ...]
Made = tuple[nn.Module, Inputs]


# -- models that are nowhere else -----------------------------------------------------------------------------------------


class TiedGPT(GPT):
    """The head is the table of embeddings."""

    def __init__(self, **sizes: Any):
        super().__init__(**sizes)
        self.head.weight = self.tokens.weight


class ResNet(nn.Module):
    """Residual blocks with batch norm, halving the image and doubling the channels three times."""

    def __init__(self, width: int = 64, classes: int = 1000):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        sizes = [width, width, 2 * width, 4 * width, 8 * width]
        self.convs1 = nn.ModuleList(nn.Conv2d(a, b, 3, 1 if a == b else 2, 1, bias=False) for a, b in pairwise(sizes))
        self.convs2 = nn.ModuleList(nn.Conv2d(b, b, 3, padding=1, bias=False) for b in sizes[1:])
        self.skips = nn.ModuleList(nn.Conv2d(a, b, 1, 1 if a == b else 2, bias=False) for a, b in pairwise(sizes))
        self.norms1 = nn.ModuleList(nn.BatchNorm2d(b) for b in sizes[1:])
        self.norms2 = nn.ModuleList(nn.BatchNorm2d(b) for b in sizes[1:])
        self.out = nn.Linear(8 * width, classes)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        for one, two, skip, first, second in zip(self.convs1, self.convs2, self.skips, self.norms1, self.norms2):
            y = second(two(F.relu(first(one(x)))))
            x = F.relu(y + skip(x))
        return F.cross_entropy(self.out(x.mean((2, 3))), target)


class UNet(nn.Module):
    """Down and up again; each level is joined with what it came from, so that many values live at a time."""

    def __init__(self, width: int = 32, levels: int = 3):
        super().__init__()
        sizes = [width << level for level in range(levels + 1)]
        self.stem, self.out = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 1, 1)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(sizes))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in reversed(list(pairwise(sizes))))
        self.join = nn.ModuleList(nn.Conv2d(2 * a, a, 3, padding=1) for a in reversed(sizes[:-1]))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        levels = []
        for down in self.down:
            levels.append(x)
            x = F.relu(down(F.max_pool2d(x, 2)))
        for up, join in zip(self.up, self.join):
            x = F.relu(join(torch.cat([up(x), levels.pop()], 1)))
        return F.mse_loss(torch.sigmoid(self.out(x)), target)


class EncoderDecoder(nn.Module):
    """Attention over one sequence, then over another and across to the first; every layer of one reads the other."""

    def __init__(self, vocab: int = 32000, d: int = 512, layers: int = 2, heads: int = 8):
        super().__init__()
        self.tokens = nn.Embedding(vocab, d)
        self.encoder = nn.ModuleList(nn.TransformerEncoderLayer(d, heads, 4 * d, 0.0, batch_first=True) for _ in range(layers))
        self.decoder = nn.ModuleList(CrossBlock(d, heads) for _ in range(layers))
        self.head = nn.Linear(d, vocab, bias=False)

    def forward(self, source: Tensor, ids: Tensor, target: Tensor) -> Tensor:
        memory, x = self.tokens(source), self.tokens(ids)
        for layer in self.encoder:
            memory = layer(memory)
        for block in self.decoder:
            x = block(x, memory)
        return F.cross_entropy(self.head(x).flatten(0, 1), target.flatten())


class CrossBlock(nn.Module):
    def __init__(self, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(d) for _ in range(3))
        self.own, self.own_out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.query, self.both, self.cross_out = nn.Linear(d, d), nn.Linear(d, 2 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.own_out(self.attend(*self.own(self.norm1(x)).chunk(3, -1), True))
        x = x + self.cross_out(self.attend(self.query(self.norm2(x)), *self.both(memory).chunk(2, -1), False))
        return x + self.down(F.gelu(self.up(self.norm3(x))))


class ExpertNet(nn.Module):
    """Each token through one of many experts, a fixed number of tokens an expert; stacked weights, as products over them."""

    def __init__(self, d: int = 1024, hidden: int = 4096, experts: int = 16, layers: int = 2):
        super().__init__()
        self.experts = experts
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(layers))
        self.gates = nn.ModuleList(nn.Linear(d, experts, bias=False) for _ in range(layers))
        self.up = nn.ParameterList(nn.Parameter(torch.empty(experts, d, hidden)) for _ in range(layers))
        self.down = nn.ParameterList(nn.Parameter(torch.empty(experts, hidden, d)) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for norm, gate, up, down in zip(self.norms, self.gates, self.up, self.down):
            y = norm(x)
            scores = torch.softmax(gate(y), -1)
            slots = x.shape[1] // self.experts
            weight, chosen = scores.transpose(1, 2).topk(slots, -1)  # every expert takes its best tokens
            place = F.one_hot(chosen, x.shape[1]).to(y.dtype)  # batch, expert, slot, token
            sent = torch.einsum("best,btd->besd", place, y)
            done = torch.einsum("besh,ehd->besd", F.gelu(torch.einsum("besd,edh->besh", sent, up)), down)
            x = x + torch.einsum("best,besd->btd", place * weight.unsqueeze(-1), done)
        return x.square().mean()


class Autoencoder(nn.Module):
    """A chain of products, narrow in the middle, of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [3000, 1500, 300, 30, 300, 1500, 3000]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.layers:
            y = torch.tanh(layer(y))
        return F.mse_loss(y, x)


class TwoTowers(nn.Module):
    """Two inputs through networks of their own; every pair of a batch is compared."""

    def __init__(self, d: int = 1024, out: int = 256):
        super().__init__()
        self.left = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, out))
        self.right = nn.Sequential(nn.Linear(d, 2 * d), nn.ReLU(), nn.Linear(2 * d, out))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        left, right = F.normalize(self.left(a), dim=-1), F.normalize(self.right(b), dim=-1)
        return F.cross_entropy(left @ right.t() * 20, torch.arange(len(a), device=a.device))


class Recurrent(nn.Module):
    """A gated recurrence written out over a few steps, all sharing their weights."""

    def __init__(self, d: int = 1024, steps: int = 6):
        super().__init__()
        self.steps = steps
        self.enter, self.gate, self.candidate = nn.Linear(d, d), nn.Linear(2 * d, d), nn.Linear(2 * d, d)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = self.enter(x)
        state = torch.zeros_like(x[:, 0])
        for t in range(self.steps):
            both = torch.cat([x[:, t], state], -1)
            keep = torch.sigmoid(self.gate(both))
            state = keep * state + (1 - keep) * torch.tanh(self.candidate(both))
        return F.mse_loss(state, target)


class Vision(nn.Module):
    """Patches of an image through transformer layers; the mean is classified."""

    def __init__(self, d: int = 768, layers: int = 12, heads: int = 12, classes: int = 1000):
        super().__init__()
        self.patches = nn.Conv2d(3, d, 16, 16)
        self.positions = nn.Parameter(torch.empty(196, d))
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(d, heads, 4 * d, 0.0, batch_first=True) for _ in range(layers))
        self.out = nn.Linear(d, classes)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.out(x.mean(1)), target)


# -- the zoo --------------------------------------------------------------------------------------------------------------


def ids(batch: int, length: int) -> Inputs:
    return torch.empty(batch, length, dtype=torch.long), torch.empty(batch, length, dtype=torch.long)


def labels(batch: int) -> Tensor:
    return torch.empty(batch, dtype=torch.long)


def gpt(d: int, layers: int, batch: int, length: int, kind: type[GPT] = GPT, dtype: torch.dtype = torch.bfloat16) -> Made:
    return kind(vocab=51200, d=d, layers=layers, heads=d // 128, length=length).to(dtype), ids(batch, length)


ZOO: dict[str, Callable[[], Made]] = {
    "mlp": lambda: (MLP(), (torch.empty(512, 784), labels(512))),
    "wide mlp": lambda: (MLP((8192, 16384, 16384, 1000)), (torch.empty(1024, 8192), labels(1024))),
    "autoencoder": lambda: (Autoencoder(), (torch.empty(96, 3000),)),
    "two towers": lambda: (TwoTowers(), (torch.empty(512, 1024), torch.empty(512, 1024))),
    "recommender": lambda: (
        Recommender(600_000, 800_000, 128), (labels(8192), torch.empty(8192, 8, dtype=torch.long), torch.empty(8192))
    ),
    "recurrent": lambda: (Recurrent(), (torch.empty(64, 6, 1024), torch.empty(64, 1024))),
    "cnn": lambda: (Convolutions(), (torch.empty(256, 3, 32, 32), labels(256))),
    "resnet": lambda: (ResNet(), (torch.empty(64, 3, 112, 112), labels(64))),
    "unet": lambda: (UNet(), (torch.empty(16, 3, 256, 256), torch.empty(16, 1, 256, 256))),
    "mixer": lambda: (Mixer(512, 256, 8), (torch.empty(64, 256, 48), labels(64))),
    "pictures": lambda: (Pictures(96, 4), (torch.empty(64, 3, 64, 64), labels(64))),
    "tagger": lambda: (Tagger(50_000, 1024, 4000), ids(64, 128)),
    "small gpt": lambda: gpt(768, 12, 8, 1024),
    "tied gpt": lambda: gpt(1024, 4, 16, 512, TiedGPT),
    "large gpt": lambda: gpt(8192, 4, 1, 2048),
    "small llama": lambda: (Llama(32000, 1024, 4, 8, 512), ids(16, 512)),
    "llama 8B": lambda: (llama.build("8b"), llama.inputs(batch=32, sequence=4096, size="8b")),
    "experts": lambda: (ExpertNet(), (torch.empty(16, 512, 1024),)),
    "deepseek": lambda: (deepseek_moe.build("tiny"), deepseek_moe.inputs(batch=16, sequence=64, size="tiny")),
    "encoder-decoder": lambda: (EncoderDecoder(), (*ids(16, 128), torch.empty(16, 128, dtype=torch.long))),
    "vision": lambda: (Vision(), (torch.empty(64, 3, 224, 224), labels(64))),
}  # fmt: skip
MESHES = ((8,), (2, 4), (8, 8))
# Models that are also planned on odd counts and on meshes of three axes.
MORE: dict[str, tuple[tuple[int, ...], ...]] = {
    "mlp": ((6,), (2, 2, 2)),
    "small gpt": ((2, 2, 2), (3, 4)),
    "cnn": ((5,),),
    "wide mlp": ((2, 4, 8),),
    "experts": ((7,),),
}


def make(name: str) -> Made:
    """A model of the zoo with its inputs, on the meta device."""
    with torch.device("meta"):
        return ZOO[name]()


# -- what an expert would write -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """A well-known plan for a model on a machine: what a search must not be dearer than.

    Args:
        mesh: devices, as axes.
        strategies: what ``AutoParallel.shard`` is told; ``None``: the ``mode`` alone.
        stored_split: parameters are stored split over all ranks (ZeRO-3, FSDP).
        memory: bytes a rank may use, as the usual limit of the case.
        machine: what the devices are.
    """

    model: Callable[[], Made]
    mesh: tuple[int, ...]
    strategies: dict[str, Any] | None = None
    mode: str = "semi_auto"
    stored_split: bool = False
    memory: str | None = None
    machine: str = "h100"


def megatron(layout: sw.Layout, sequence: bool = False, batch: str = "None") -> dict[str, Any]:
    """Tensor parallel for the blocks of a GPT; with ``sequence``, norms and residuals split along the sequence."""
    plan = {name: layout(*axes) for name, axes in tensor_parallel_gpt_plan().items()}
    if not sequence:
        return {"blocks.?": {"in_strategy": (layout(batch, "None", "None"),), "parameter_plan": plan}}
    split, whole = layout(batch, "tp", "None"), layout(batch, "None", "None")
    own = {kind: {n.removeprefix(f"{kind}."): e for n, e in plan.items() if n.startswith(f"{kind}.")} for kind in
           ("attention", "up", "down")}  # fmt: skip
    return {
        "blocks.?": {"in_strategy": (split,)},
        "blocks.?.attention": {"in_strategy": (whole,), "parameter_plan": own["attention"]},
        "blocks.?.up": {"in_strategy": (whole,), "parameter_plan": own["up"]},
        "blocks.?.down": {"in_strategy": (layout(batch, "None", "tp"),), "parameter_plan": own["down"]},
    }


def vocabulary(layout: sw.Layout) -> dict[str, Any]:
    """The table of embeddings by rows, the head by columns."""
    return {
        "tokens": {"in_strategy": (layout("None", "None"),), "parameter_plan": {"weight": layout("tp", "None")}},
        "head": {"in_strategy": (layout("None", "None", "None"),), "parameter_plan": {"weight": layout("tp", "None")}},
    }


def two_dimensions(layout: sw.Layout) -> dict[str, Any]:
    """Both axes split every product: the batch over one, the two sides of a pair of products over the other."""
    return {
        "layers.0": {"in_strategy": (layout("x", "None"),), "parameter_plan": {"weight": layout("y", "None")}},
        "layers.1": {"in_strategy": (layout("x", "y"),), "parameter_plan": {"weight": layout("None", "y")}},
    }


def _line(size: int) -> sw.Layout:
    return sw.Layout((size,), ("tp",))


REFERENCES: dict[str, Reference] = {
    "Megatron for a GPT": Reference(lambda: gpt(8192, 4, 1, 2048), (8,), megatron(_line(8)), memory="80GB"),
    "Megatron, norms along the sequence": Reference(
        lambda: gpt(8192, 4, 1, 2048), (8,), megatron(_line(8), sequence=True), memory="80GB"
    ),
    "embedding and head by vocabulary": Reference(
        lambda: gpt(8192, 4, 1, 2048), (8,), {**megatron(_line(8)), **vocabulary(_line(8))}, memory="80GB"
    ),
    "tensor and data parallel on 8·8": Reference(
        lambda: gpt(8192, 4, 16, 2048), (8, 8), megatron(sw.Layout((8, 8), ("dp", "tp")), batch="dp"), memory="80GB"
    ),
    "FSDP": Reference(lambda: gpt(4096, 16, 64, 1024), (8,), mode="data_parallel", stored_split=True, memory="80GB"),
    "data parallel for a small CNN": Reference(ZOO["cnn"], (8,), mode="data_parallel"),
    "two-dimensional tensor parallel": Reference(
        lambda: (MLP((16384, 16384, 16384, 1024)), (torch.empty(8192, 16384), labels(8192))),
        (8, 8), two_dimensions(sw.Layout((8, 8), ("x", "y"))),
    ),
    "expert parallel": Reference(
        lambda: (ExpertNet(2048, 8192, 64), (torch.empty(8, 2048, 2048),)), (8,),
        {f"{side}.{at}": _line(8)("tp", "None", "None") for side in ("up", "down") for at in (0, 1)},
        memory="80GB",
    ),
}  # fmt: skip
