"""Networks for tests of pipelines, each with a maker of its batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

D = torch.float64


class Block(nn.Module):
    def __init__(self, width: int, drop: float):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.drop = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.Dropout(drop)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.drop(self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)))
        return x + self.drop(self.down(F.gelu(self.up(x))))


class GPT(nn.Module):
    """Tied embeddings, dropout, and a loss that ignores some tokens."""

    def __init__(self, drop: float = 0.1, layers: int = 4, checkpointed: bool = False):
        super().__init__()
        self.embed, self.place = nn.Embedding(32, 16), nn.Parameter(torch.randn(6, 16))
        self.blocks = nn.ModuleList(Block(16, drop) for _ in range(layers))
        self.head, self.checkpointed = nn.Linear(16, 32, bias=False), checkpointed
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids) + self.place
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        logits = self.head(x)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=3), logits


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1, stride=2)
        self.middle, self.norm = nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(2, 16)
        self.up, self.out = nn.ConvTranspose2d(16, 8, 2, stride=2), nn.Conv2d(16, 3, 1)

    def forward(self, x, y):
        a = F.relu(self.down1(x))
        b = F.relu(self.down2(a))
        m = F.relu(self.norm(self.middle(b))) + b
        return F.mse_loss(self.out(torch.cat([self.up(m), a], 1)), y)


class Towers(nn.Module):
    """Two towers, a regulariser of parameters, and a number that is added to the loss."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.b = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x, y):
        p, q = self.a(x), self.b(y)
        return ((p - q) ** 2).sum(1).mean() + 0.1 * self.a[0].weight.square().sum() + 1.5


class Negatives(nn.Module):
    """Three samples of a second input to each of the first."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)])

    def forward(self, x, y):
        own, others = self.encode(x), self.encode(y).view(len(x), 3, 8)
        return -(own[:, None] * others).sum(-1).log_softmax(-1)[:, 0].mean()


class Clip(Towers):
    """The samples of the batch meet in the loss."""

    def __init__(self):
        super().__init__()
        for tower in (self.a, self.b):
            tower.extend(nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)]))

    def forward(self, x, y):
        p, q = F.normalize(self.a(x)), F.normalize(self.b(y))
        scores, labels = p @ q.T * 3, torch.arange(len(x))
        return (F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)) / 2


class Normed(nn.Module):
    """Statistics of the batch in the last layers: before a loss, or of the result."""

    def __init__(self, has_loss: bool):
        super().__init__()
        self.layers = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(9)])
        self.norm, self.head, self.has_loss = nn.BatchNorm1d(8), nn.Linear(8, 5), has_loss

    def forward(self, x, y):
        h = self.layers(x)
        p = self.head(self.norm(h) + h)
        return (F.cross_entropy(p, y), p, h) if self.has_loss else (p - p.mean(0)) / p.std()


class Layers(nn.Module):
    """Returns logits, without a loss."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4)])

    def forward(self, x):
        return self.layers(x)


class Scaled(nn.Module):
    """One parameter read by every layer, a loss of every layer, a buffer that counts, a dict beside the loss."""

    def __init__(self):
        super().__init__()
        self.layers, self.scale = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)]), nn.Parameter(torch.ones(16))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, batch, *, flag=True):
        self.count += 1
        loss, h = 0, batch["x"]
        for layer in self.layers:
            h = torch.tanh(layer(h) * self.scale.exp())
            loss = loss + 0.1 * h.abs().mean()
        return loss + F.mse_loss(h, batch["y"]), {"h": h, "mask": batch["x"] > 0}


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 3


class Late(nn.Module):
    """A value that is used three stages later, weight norm, and a function with a backward of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)
        self.middle = nn.ModuleList([torch.nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)) for _ in range(2)])

    def forward(self, x):
        early = h = torch.relu(self.first(x))
        for layer in self.middle:
            h = Twice.apply(torch.tanh(layer(h)))
        return (self.last(h) * early).square().mean()


class Conv(nn.Module):
    """A frozen batch norm, whose statistics are those of before."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.pool = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(16, 5)
        self.norm.eval()

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x, y):
        return F.cross_entropy(self.head(self.pool(F.relu(self.norm(self.conv(x)))).flatten(1)), y, label_smoothing=0.1)


class Lossy(nn.Module):
    """Layers with any loss of their last activation."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], classes: int = 8):
        super().__init__()
        self.layers = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3)])
        self.head, self.loss = nn.Linear(8, classes), loss
        self.register_buffer("weight", torch.linspace(0.5, 2, classes))

    def forward(self, x, y):
        h = self.head(self.layers(x))
        return self.loss(h, y, self.weight)


LOSSES: dict[str, tuple[Callable[..., Tensor], bool]] = {  # the loss, and whether its targets are classes
    "mse": (lambda h, y, w: F.mse_loss(h, y), False),
    "mse sum": (lambda h, y, w: F.mse_loss(h, y, reduction="sum"), False),
    "l1": (lambda h, y, w: F.smooth_l1_loss(h, y), False),
    "huber": (lambda h, y, w: F.huber_loss(h, y), False),
    "ce": (lambda h, y, w: F.cross_entropy(h, y), True),
    "ce ignored": (lambda h, y, w: F.cross_entropy(h, y, ignore_index=2), True),
    "ce weighted": (lambda h, y, w: F.cross_entropy(h, y, w), True),
    "ce smooth": (lambda h, y, w: F.cross_entropy(h, y, w, ignore_index=1, label_smoothing=0.2), True),
    "ce sum": (lambda h, y, w: F.cross_entropy(h, y, reduction="sum"), True),
    "ce none": (lambda h, y, w: F.cross_entropy(h, y, reduction="none").mean(), True),
    "ce probabilities": (lambda h, y, w: F.cross_entropy(h, y.softmax(1)), False),
    "nll": (lambda h, y, w: F.nll_loss(h.log_softmax(1), y, w), True),
    "bce": (lambda h, y, w: F.binary_cross_entropy_with_logits(h, (y > 0).to(h.dtype), pos_weight=w), False),
    "bce of sigmoid": (lambda h, y, w: F.binary_cross_entropy(h.sigmoid(), (y > 0).to(h.dtype)), False),
    "kl": (lambda h, y, w: F.kl_div(h.log_softmax(1), y.softmax(1), reduction="batchmean"), False),
    "masked": (lambda h, y, w: ((h - y) ** 2 * (y > 0)).sum() / (y > 0).sum(), False),
    "root": (lambda h, y, w: F.mse_loss(h, y, reduction="none").mean(1).sqrt().mean(), False),
    "norm": (lambda h, y, w: (h - y).norm(dim=1).mean() + 0.01 * h.logsumexp(1).square().mean(), False),
    "by size": (lambda h, y, w: F.mse_loss(h, y, reduction="sum") / h.shape[0], False),
}


def transformers_t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=32,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=2,
            dropout_rate=0.1,
            use_cache=False,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
    )


class Case(NamedTuple):
    """A network and its batch, as positional and keyword arguments."""

    make: Callable[[], nn.Module]
    batch: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]


def _ids(size: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randint(32, (size, 6)),), {}


def _floats(*shapes: tuple[int, ...]) -> Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]:
    return lambda size: (tuple(torch.randn(size, *shape, dtype=D) for shape in shapes), {})


def _classes(*shape: int, classes: int) -> Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]:
    return lambda size: ((torch.randn(size, *shape, dtype=D), torch.randint(classes, (size,))), {})


def _labelled(size: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    ids = torch.randint(1, 32, (size, 6))
    return (), {"input_ids": ids, "labels": ids.masked_fill(torch.rand(ids.shape) < 0.2, -100)}


def _dict(size: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ({"x": torch.randn(size, 16, dtype=D), "y": torch.randn(size, 16, dtype=D)},), {"flag": False}


CASES: dict[str, Case] = {
    "gpt": Case(GPT, _ids),
    "gpt checkpointed": Case(lambda: GPT(checkpointed=True), _ids),
    "unet": Case(UNet, _floats((3, 8, 8), (3, 8, 8))),
    "towers": Case(Towers, _floats((8,), (6,))),
    "negatives": Case(Negatives, lambda size: ((torch.randn(size, 8, dtype=D), torch.randn(3 * size, 8, dtype=D)), {})),
    "clip": Case(Clip, _floats((8,), (6,))),
    "normed": Case(lambda: Normed(True), lambda size: _classes(8, classes=5)(max(size, 3))),
    "normed result": Case(lambda: Normed(False), lambda size: _classes(8, classes=5)(max(size, 3))),
    "layers": Case(Layers, _floats((16,))),
    "scaled": Case(Scaled, _dict),
    "late": Case(Late, _floats((16,))),
    "conv": Case(Conv, _classes(2, 6, 6, classes=5)),
    "t5": Case(transformers_t5, _labelled),
    **{
        f"loss {name}": Case(lambda loss=loss: Lossy(loss), _classes(8, classes=8) if has_classes else _floats((8,), (8,)))
        for name, (loss, has_classes) in LOSSES.items()
    },
}
