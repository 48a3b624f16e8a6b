"""What the large language models share: building one on any device, its inputs, and training a tiny one."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import shardwright as sw

SEED, BATCH, LENGTH, LEARNING_RATE = 1, 8, 16, 1e-2


def build(kind: Callable[[Any], Any], config: Any, layers: int | None, dtype: torch.dtype, device: str) -> Any:
    """A model made on a device, its floating tensors of a dtype; `layers` replaces the config's."""
    if layers is not None:
        config = replace(config, layers=layers)
    with torch.device(device):
        return kind(config).to(dtype)


def inputs(vocabulary: int, batch: int, sequence: int, device: str) -> tuple[Tensor, Tensor]:
    """Tokens and targets: counting up from a random start, so that the next token can be learnt."""
    if device == "meta":
        return tuple(torch.empty(batch, sequence, dtype=torch.long, device=device) for _ in range(2))  # type: ignore[return-value]
    starts = torch.randint(vocabulary, (batch, 1), device=device)
    tokens = (starts + torch.arange(sequence + 1, device=device)) % vocabulary
    return tokens[:, :-1], tokens[:, 1:]


def main(
    text: str | None,
    configs: Mapping[str, Any],
    make: Callable[..., nn.Module],
    strategies: Callable[[sw.Layout], dict[str, Any]],
    axes: tuple[str, str],
) -> None:
    """Trains a small size on simulated devices, or on those of a launcher, and prints the losses."""
    parser = argparse.ArgumentParser(description=(text or "").strip().splitlines()[0])
    parser.add_argument("--size", choices=list(configs), default="tiny")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    started = {"RANK", "SHARDWRIGHT_DEVICES"} & set(os.environ)
    world = sw.init() if started else sw.init(devices=4)
    say = print if world.rank == 0 else lambda *args: None

    torch.manual_seed(SEED)
    model = make(options.size, dtype=torch.float32, device="cpu")
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    split = 2 if world.size % 2 == 0 else 1
    layout = sw.Layout((world.size // split, split), axes)
    net = sw.AutoParallel(model, parallel_mode="semi_auto").shard(strategies(layout))
    for step in range(options.steps):
        optimizer.zero_grad()
        loss = net(*inputs(configs[options.size].vocabulary, BATCH, LENGTH, "cpu"))
        loss.backward()
        optimizer.step()
        if step == 0:
            say(str(net.plan).splitlines()[0])
        if step % 5 == 0 or step == options.steps - 1:
            say(f"step {step:3}, loss is {float(loss.detach()):.4f}")
