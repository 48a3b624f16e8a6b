"""What the three examples of sharding propagation share: training on 8 devices, the check, and what is printed."""

from __future__ import annotations

import argparse
import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn

import shardwright as sw
from shardwright.ir.graph import is_configured
from shardwright.plan.modes.propagation import slice_counts
from shardwright.report.lint import lint

STEPS, LEARNING_RATE, TOLERANCE = 3, 0.1, 1e-10


def main(network: nn.Module, *inputs: Tensor) -> None:
    """Trains a network that returns its loss on 8 simulated devices, checks it, and shows what propagation chose."""
    parser = argparse.ArgumentParser(description="Configures a few operators and lets propagation choose for the others.")
    parser.add_argument("--draw", metavar="FILE", help="draw the plan into a .png or .svg file")
    options = parser.parse_args()

    single = copy.deepcopy(network)  # outside of AutoParallel the marked operators are the plain ones
    net = sw.AutoParallel(network, parallel_mode="sharding_propagation")
    losses, expected = train(net, inputs), train(single, inputs)
    show(net.plan)
    for step, loss in enumerate(losses):
        print(f"step {step}, loss is {loss:.6f}")
    difference = max(abs(a - b) / abs(b) for a, b in zip(losses, expected))
    if not difference <= TOLERANCE:
        sys.exit(f"DIFFERS from single device: {difference:.1e}")
    print(f"matches single device: largest relative difference of the loss {difference:.1e}")
    if options.draw:
        from shardwright.report.draw_plan import draw_plan

        draw_plan(net.plan, options.draw)


def train(net: Any, inputs: tuple[Tensor, ...]) -> list[float]:
    optimizer = torch.optim.SGD(net.parameters(), LEARNING_RATE)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = net(*inputs)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def show(plan: Any) -> None:
    """Operators with the slice counts of their inputs, then what the lint says."""
    for node in plan.graph.nodes:
        how = "configured" if is_configured(node) else "inferred  "
        print(f"{how} {node.name:16} {'  '.join(map(str, slice_counts(plan, node)))}")
    for finding in lint(plan):
        print(f"lint: {finding}")


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, dtype=torch.float64) / shape[0] ** 0.5)
