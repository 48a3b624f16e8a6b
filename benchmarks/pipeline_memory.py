"""Memory of pipelines on gloo ranks: the most that each rank needs over training steps, against what the plan says.

Measured as in :mod:`memory_truth`: torch's profiler sees each allocation of the second and third step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from memory_truth import by_hand, peak_between_marks, train, watch_this_thread
from pipeline_models import MICRO, ORDERS, Order, batch, make, marks, optimizer_of
from torch import nn

import shardwright as sw

WITHIN = 0.05


def measure(case: str, order: Order, world: Any) -> tuple[int, float]:
    """Returns the bytes that this rank needed and those that the plan says, without optimizer states: SGD has none."""
    predicted: list[float] = []

    def prepare() -> tuple[nn.Module, Any]:
        model = make(case)
        call = sw.AutoParallel(sw.PipelineCell(model, MICRO, stage_config=marks(order, world.size)))
        return model, call.pipeline(stages=world.size, scheduler=order.ours, interleave=order.interleave)

    def predict(call: Any) -> None:
        predicted.append(call.plan.memory[world.rank].peak)

    events = train(prepare, lambda: batch(case), lambda net: optimizer_of(net.parameters()), predict, world)
    return peak_between_marks(events), predicted[0]


def worker(only: str) -> list[Any]:
    """One rank: measures all cases; returns those of all ranks."""
    torch.set_num_threads(1)
    watch_this_thread()
    world = sw.init()
    by_hand()
    found = []
    for case in ("gpt", "mlp"):
        for name, order in ORDERS.items():
            if only in f"{case}, {name}":
                everyone: list[Any] = [None] * world.size
                dist.all_gather_object(everyone, measure(case, order, world))
                found.append((f"{case}, {name}", everyone))
    return found


def judge(targets: Any, ranks: int, found: list[Any]) -> None:
    """Prints a line for every case, and judges each by the rank whose prediction is farthest off."""
    print(f"\nmemory on {ranks} ranks: measured and as the plan says, of every rank, MB")
    for name, pairs in found:
        off = max(abs(predicted / measured - 1) for measured, predicted in pairs)
        texts = "  ".join(f"{measured / 1e6:.2f} {predicted / 1e6:.2f}" for measured, predicted in pairs)
        print(f"{name:24}{texts}")
        targets.reached(f"{name} on {ranks} ranks, off by", off, WITHIN)
