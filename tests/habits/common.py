"""What the habits share: the table of them, small networks, and batches that are the same on every rank.

A habit is a function that gets ``parallel``, which makes a model parallel (or leaves it as it is, for the single device),
trains for a few steps as users write it, and yields numbers: losses, weights, gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import shardwright as sw

Habit = Callable[[Callable[[nn.Module], Any]], Iterator[Any]]
HABITS: dict[str, Habit] = {}
REFUSED: dict[str, tuple[Habit, str]] = {}


def habit(function: Habit) -> Habit:
    """Puts a habit into the table."""
    HABITS[function.__name__] = function
    return function


def refused(message: str) -> Callable[[Habit], Habit]:
    """Puts a habit into the table of those that are refused, with what the error says."""

    def put(function: Habit) -> Habit:
        REFUSED[function.__name__] = (function, message)
        return function

    return put


def numbers(run: Habit, parallel: Callable[[nn.Module], Any]) -> list[Tensor]:
    """What a habit yields, as whole tensors."""
    torch.manual_seed(0)
    return [sw.full_value(v).detach().clone() if isinstance(v, Tensor) else torch.tensor(v) for v in run(parallel)]


def mlp(*sizes: int, of: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """A perceptron in float64."""
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), of()]
    return nn.Sequential(*layers[:-1]).double()


def batches(count: int = 3, rows: int = 6, width: int = 5, outputs: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Batches of samples with targets."""
    draw = torch.Generator().manual_seed(count)
    return [
        (torch.randn(rows, width, generator=draw).double(), torch.randn(rows, outputs, generator=draw).double())
        for _ in range(count)
    ]


def classes(count: int = 3, rows: int = 6, width: int = 5, outputs: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Batches of samples with classes."""
    return [(x, y.argmax(1)) for x, y in batches(count, rows, width, outputs)]


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    """One step of the optimizer; returns the loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
