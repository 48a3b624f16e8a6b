"""Golden programs: the texts of local programs, one of each kind, as they were when somebody last looked at them.

A change of what ranks run shows here as a change of text. Where it is meant: ``SHARDWRIGHT_GOLDEN=renew pytest tests/golden``
writes the texts anew; look at the difference before committing it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardwright as sw

HERE = Path(__file__).parent
RENEW = os.environ.get("SHARDWRIGHT_GOLDEN") == "renew"

GRID = sw.Layout((2, 2), ("dp", "tp"))


class Mlp(nn.Module):
    def __init__(self, width: int = 8, hidden: int = 16):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(x)))


class Block(nn.Module):
    """A decoder block with a tied head, a loss and a dropout."""

    def __init__(self, vocab: int = 24, width: int = 16, heads: int = 4):
        super().__init__()
        self.embed, self.norm = nn.Embedding(vocab, width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp, self.dropout, self.head = Mlp(width, 4 * width), nn.Dropout(0.1), nn.Linear(width, vocab, bias=False)
        self.head.weight, self.heads = self.embed.weight, heads

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))
        x = x + self.mlp(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


IDS = torch.zeros(4, 6, dtype=torch.long)
X, IMAGES = torch.zeros(8, 8), torch.zeros(4, 3, 8, 8)


def columns(tp: int, dp: int = 1) -> dict[str, Any]:
    """Splits the outputs of a linear layer over ``tp`` devices, and its batch over ``dp``."""
    return {"in_strategy": ((dp, 1),), "parameter_plan": {"weight": (tp, 1), "bias": (tp,)}}


def rows(tp: int, dp: int = 1) -> dict[str, Any]:
    """Splits what a linear layer sums over ``tp`` devices, and its batch over ``dp``."""
    return {"in_strategy": ((dp, tp),), "parameter_plan": {"weight": (1, tp), "bias": (1,)}}


BY_TP = {"weight": GRID("tp", "None"), "bias": GRID("tp")}
MEGATRON = {
    "mlp.up": {"in_strategy": (GRID("dp", "None", "None"),), "parameter_plan": BY_TP},
    "mlp.down": {"in_strategy": (GRID("dp", "None", "tp"),), "parameter_plan": {"weight": GRID("None", "tp")}},
    "embed.weight": GRID("tp", "None"),
}


def net(module: nn.Module, mode: str = "semi_auto", **strategies: Any) -> sw.AutoParallel:
    made = sw.AutoParallel(module, mode)
    return made.shard(strategies) if strategies else made


class ByHand(nn.Module):
    """A program of one rank with a sum of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sw.collectives.all_reduce((x @ self.weight).sum(0), "dp")


# name -> number of devices, what makes the net, its inputs
PROGRAMS: dict[str, tuple[int, Callable[[], sw.AutoParallel], tuple[Any, ...]]] = {
    "data parallel": (4, lambda: net(Mlp(), "data_parallel"), (X,)),
    "data parallel of an uneven batch": (3, lambda: net(Mlp(), "data_parallel"), (torch.zeros(7, 8),)),
    "columns then rows": (2, lambda: net(Mlp(), up=columns(2), down=rows(2)), (X,)),
    "rows alone": (4, lambda: net(Mlp(), down=rows(4)), (X,)),
    "two meshes": (6, lambda: net(Mlp(12, 12), up=columns(3, dp=2), down=rows(2, dp=3)), (torch.zeros(6, 12),)),
    "a decoder block": (4, lambda: net(Block(), **MEGATRON), (IDS, IDS)),
    "a decoder block by data": (4, lambda: net(Block(), "data_parallel"), (IDS, IDS)),
    "propagated": (4, lambda: net(Mlp(), "sharding_propagation", up=columns(2, dp=2)), (X,)),
    "pictures": (2, lambda: net(Pictures(), "data_parallel"), (IMAGES,)),
    "pictures by height": (2, lambda: net(Pictures(), conv=((1, 1, 2, 1),)), (IMAGES,)),
    "optimizer level 1": (4, lambda: net(Mlp(), "data_parallel").hsdp(threshold=0), (X,)),
    "optimizer level 3": (4, lambda: net(Mlp(), "data_parallel").hsdp(threshold=0, optimizer_level="level3"), (X,)),
    "optimizer of halves": (4, lambda: net(Mlp(), "data_parallel").hsdp(shard_size=2, threshold=0), (X,)),
    "recompute": (4, lambda: net(Block(), **MEGATRON).recompute("mlp"), (IDS, IDS)),
    "mixed precision": (4, lambda: net(Block(), **MEGATRON).mixed_precision(torch.bfloat16), (IDS, IDS)),
    "gradients in bfloat16": (
        2,
        lambda: net(Mlp(), "data_parallel").mixed_precision(torch.bfloat16, reduce_dtype=torch.bfloat16),
        (X,),
    ),
    "copies": (4, lambda: net(sw.MicroBatchInterleaved(Mlp(), 2), **{"network.up": columns(2, dp=2)}), (X,)),
    "micro-batches": (2, lambda: net(sw.GradAccumulation(Mlp(), 2), "data_parallel"), (X,)),
    "buckets": (2, lambda: net(Mlp(), "data_parallel").comm_fusion({"openstate": False}), (X,)),
    "collectives by hand": (2, lambda: net(ByHand(), "hybrid_parallel"), (X,)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_as_it_was(name, monkeypatch):
    monkeypatch.setattr("shardwright.world.current._current", [])
    devices, make, inputs = PROGRAMS[name]
    sw.init(devices=devices)
    text = re.sub(r"test_golden\.py:\d+", "test_golden.py", str(make().compile(*inputs).program)) + "\n"
    path = HERE / f"{name.replace(' ', '_')}.txt"
    if RENEW:
        path.write_text(text, "utf-8")
    assert path.exists(), f"SHARDWRIGHT_GOLDEN=renew pytest {Path(__file__).name} writes it"
    assert text == path.read_text("utf-8")


def test_no_text_is_of_a_program_that_is_gone():
    assert {path.stem for path in HERE.glob("*.txt")} == {name.replace(" ", "_") for name in PROGRAMS}
