"""Every feature works with every other: each pair trains as the single device does, in both worlds."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardwright as sw
from harness import compare, on_ranks, rank_counts, simulated
from harness import main as run_programs
from shardwright.world.current import current_world

STEPS = 2


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.25)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))


class Net(nn.Module):
    """An embedding tied to the head, two blocks with dropout, a frozen layer; its result is the loss."""

    def __init__(self, width: int = 12, vocabulary: int = 18):
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.frozen = nn.Linear(width, width)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.frozen(x)).flatten(0, 1), target.flatten())


@dataclass(frozen=True)
class Feature:
    """What a feature does to the module, to the arguments of AutoParallel, to its settings, and between the passes."""

    module: Callable[[nn.Module], nn.Module] = lambda module: module
    arguments: tuple[tuple[str, Any], ...] = ()
    settings: Callable[[Any], Any] = lambda net: net
    clip: bool = False
    half: bool = False


def tensor_parallel(net: Any) -> Any:
    size = current_world().size
    tp = 2 if size % 2 == 0 else size
    layout = sw.Layout((size // tp, tp), ("dp", "tp"))
    columns, rows = {"weight": layout("tp", "None"), "bias": layout("tp")}, {"weight": layout("None", "tp")}
    up = {"in_strategy": (layout("dp", "None", "None"),), "parameter_plan": columns}
    down = {"in_strategy": (layout("dp", "None", "tp"),), "parameter_plan": rows}
    return net.shard({"*.up": up, "*.down": down})


FEATURES = {
    "level1": Feature(settings=lambda net: net.hsdp(threshold=0)),
    "level3": Feature(settings=lambda net: net.hsdp(threshold=0, optimizer_level="level3")),
    "fusion": Feature(settings=lambda net: net.comm_fusion({"allreduce": {"mode": "index", "config": [3, 7]}})),
    "accumulation": Feature(module=lambda module: sw.GradAccumulation(module, 2)),
    "copies": Feature(module=lambda module: sw.MicroBatchInterleaved(module, 2)),
    "recompute": Feature(settings=lambda net: net.recompute("*blocks.*")),
    "tensor": Feature(settings=tensor_parallel),
    "compile": Feature(arguments=(("compile", "aot_eager"),)),
    "clipping": Feature(clip=True),
    "precision": Feature(settings=lambda net: net.mixed_precision(torch.bfloat16), half=True),
}
PAIRS = [pair for pair in itertools.combinations(FEATURES, 2) if pair != ("level1", "level3")]


def train_pair(names: tuple[str, str]) -> None:
    features = [FEATURES[name] for name in names]
    half = any(f.half for f in features)
    torch.manual_seed(1)
    model: nn.Module = Net() if half else Net().double()
    for feature in features:
        model = feature.module(model)
    plain = copy.deepcopy(model)
    net = sw.AutoParallel(model, **dict(a for f in features for a in f.arguments))
    for feature in features:
        net = feature.settings(net)
    clip = any(f.clip for f in features)
    for step in range(STEPS):
        for run, module in ((plain, plain), (net, model)):
            torch.manual_seed(step)
            ids, target = torch.randint(18, (2, 24, 3)).unbind()
            torch.manual_seed(100 + step)  # the same dropout masks
            with torch.autocast("cpu", torch.bfloat16, enabled=half and run is plain):
                loss = run(ids, target)
            loss.backward()
            if clip:
                torch.nn.utils.clip_grad_norm_([p for p in module.parameters() if p.requires_grad], 0.5)
        # halves are rounded at other places where a sum over ranks comes before the rounding
        compare(plain, model, f"{' and '.join(names)}, step {step}", 2**-5 if half else 1e-9)
        with torch.no_grad():
            for module in (plain, model):
                for parameter in module.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.1 * parameter.grad
                        parameter.grad = None


def all_pairs() -> None:
    for names in PAIRS:
        train_pair(names)


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
@pytest.mark.parametrize("devices", rank_counts(4, more=(3,)))
def test_simulated(names, devices):
    simulated(lambda: train_pair(names), devices)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [2])
def test_on_real_ranks(ranks):
    on_ranks(__file__, ranks, [all_pairs], timeout=500)


if __name__ == "__main__":
    run_programs([all_pairs])
