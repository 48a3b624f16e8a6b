"""Pipelines compute what the single device computes: networks, stages, micro-batches, schedules, modes and features."""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

import pytest
import torch
from staged_networks import CASES
from torch import Tensor
from torch.utils._pytree import tree_leaves

import shardwright as sw


def tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def loss_of(result: Any) -> Tensor:
    first = tensors(result)[0]
    return first if not first.dim() else first.square().mean()


def same(found: Any, expected: Any) -> None:
    for ours, theirs in zip(tensors(found), tensors(expected), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def train(target, model, args, kwargs, steps=2, seed=0) -> list[Any]:
    """Trains, evaluates, and trains again; returns what came out."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    found = []
    for step in range(steps + 1):
        if step == steps:
            model.eval()
            with torch.no_grad():
                found.append(target(*args, **kwargs))
            model.train()
        torch.manual_seed(seed + step)
        result = target(*args, **kwargs)
        loss_of(result).backward()
        found.append(result)
        optimizer.step()
        optimizer.zero_grad()
    return found


def check(name, devices, stages, micro, batch, mode="semi_auto", setup=lambda net, model: net, steps=2, **pipeline):
    """Trains a network in a pipeline and on one device; both have to agree."""
    sw.init(devices=devices)
    torch.manual_seed(0)
    model = CASES[name].make().double()
    single = copy.deepcopy(model)
    net = sw.AutoParallel(sw.PipelineCell(model, micro), mode).pipeline(stages=stages, **pipeline)
    net = setup(net, model) or net
    args, kwargs = CASES[name].batch(batch)
    same(train(net, model, args, kwargs, steps), train(single, single, args, kwargs, steps))
    for (path, ours), theirs in zip(model.named_parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, msg=lambda text, path=path: f"{path}: {text}")
    for ours, theirs in zip(model.buffers(), single.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    return net


SHAPES = [  # devices, stages, micro-batches, batch
    (2, 2, 4, 8), (2, 2, 4, 10), (2, 2, 3, 1), (4, 2, 4, 8), (4, 2, 3, 10), (4, (1, 3), 4, 10), (3, (2, 1), 2, 5), (3, 3, 3, 7),
    (4, 4, 4, 8), (4, 4, 6, 2), (4, 2, 4, 4),
]  # fmt: skip
SCHEDULES = [
    {"scheduler": "gpipe"}, {"scheduler": "1f1b"}, {"interleave": True}, {"scheduler": "zero_bubble_h1"},
    {"scheduler": "zero_bubble_v"}, {"scheduler": "searched"},
]  # fmt: skip
MODES = ["semi_auto", "data_parallel", "auto", "recursive_programming"]


def generated() -> list[Any]:
    """Makes every network on every shape, with schedules and modes in turn; of these one in seven is not long."""
    draw = random.Random(0)
    found = []
    for name, shape in itertools.product(CASES, SHAPES):
        mode, schedule = draw.choice(MODES), draw.choice(SCHEDULES)
        devices, stages, micro, batch = shape
        rows = stages if isinstance(stages, int) else len(stages)
        if schedule.get("scheduler") == "zero_bubble_v":
            micro = max(micro, 2 * rows)
        ident = f"{name}-{devices}-{stages}-{micro}-{batch}-{mode}-{'-'.join(map(str, schedule.values()))}"
        is_long = schedule.get("scheduler") == "searched" or name in ("gpt checkpointed", "t5") or len(found) % 7 != 0
        marks = [pytest.mark.long] if is_long else []
        found.append(pytest.param(name, devices, stages, micro, batch, mode, schedule, id=ident, marks=marks))
    return found


@pytest.mark.parametrize("name,devices,stages,micro,batch,mode,schedule", generated())
def test_networks(name, devices, stages, micro, batch, mode, schedule):
    check(name, devices, stages, micro, batch, mode, steps=1, **schedule)
