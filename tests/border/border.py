"""Random chains of pieces, trained for some steps beside the same chain on one device."""

from __future__ import annotations

import math
import random
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pieces
import torch
from torch import Tensor, nn

import shardwright as sw

STEPS = 3
MODES = ("semi_auto", "data_parallel", "auto")


@dataclass(frozen=True)
class Case:
    """A chain, what happens to it between steps, and how it is called.

    Args:
        names: its pieces.
        events: what happens before step 1 and step 2; ``None``: nothing.
        without_grad: steps that run under ``no_grad``.
        twice: whether the last step asks for second derivatives.
    """

    number: int
    names: tuple[str, ...]
    events: tuple[Any, ...]
    without_grad: tuple[int, ...]
    twice: bool
    mode: str
    batch: int

    @property
    def must_be(self) -> str:
        """``equal`` or ``refused``, or either: second derivatives are there where nothing is split."""
        if any(name in pieces.REFUSED for name in self.names):
            return "refused"
        return "equal or refused" if self.twice else "equal"

    def __str__(self) -> str:
        events = [event.__name__ if event else "-" for event in self.events]
        return f"{self.number}: {self.names} {events} {self.mode} batch {self.batch} no_grad {self.without_grad} {self.twice}"


def case(number: int) -> Case:
    """The case of a number: every kind of piece is met three times, then mostly those that work in other company."""
    draw = random.Random(number)
    kinds = [*pieces.EQUAL, *pieces.REFUSED]
    often = number < 3 * len(kinds) or draw.random() < 0.02
    names = [kinds[number % len(kinds)] if often else draw.choice(list(pieces.EQUAL))]
    names += draw.choices(list(pieces.EQUAL), k=draw.randint(0, 2))
    draw.shuffle(names)
    events = tuple(draw.choice(pieces.EVENTS) if draw.random() < 0.5 else None for _ in range(STEPS - 1))
    without_grad = tuple(step for step in range(1, STEPS) if draw.random() < 0.2)
    can_be_twice = STEPS - 1 not in without_grad and "checkpointed_reentrant" not in names  # which one device refuses
    twice = can_be_twice and draw.random() < 0.1
    return Case(number, tuple(names), events, without_grad, twice, draw.choice(MODES), draw.choice((4, 6, 8, 12)))


def build(case: Case) -> nn.Sequential:
    torch.manual_seed(case.number)
    return nn.Sequential(*[{**pieces.EQUAL, **pieces.REFUSED}[name]() for name in case.names]).double()


def seed(case: Case, step: int) -> None:
    number = 1000 * case.number + step
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Weights, gradients, buffers and plain attributes."""
    found: dict[str, Any] = {}
    for name, p in model.named_parameters():
        found[name] = sw.full_value(p).detach().clone()
        found[f"{name}.grad"] = None if p.grad is None else sw.full_value(p.grad).detach().clone()
    found |= {name: b.clone() for name, b in model.named_buffers()}
    for path, module in model.named_modules():
        found[f"{path}.calls"] = getattr(module, "calls", None)
        seen = getattr(module, "seen", None)
        found[f"{path}.seen"] = seen.detach().clone() if isinstance(seen, Tensor) else seen
    return found


def step(case: Case, number: int, model: nn.Module, net: Any, x: Tensor) -> Tensor:
    """One step of training, or a call under ``no_grad``; returns the loss."""
    seed(case, number)
    if number in case.without_grad:
        with torch.no_grad():
            return net(x).square().mean()
    for p in model.parameters():
        p.grad = None
    loss = net(x).square().mean()
    if case.twice and number == STEPS - 1:
        wanted = [p for p in model.parameters() if p.requires_grad]
        first = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first if g is not None), wanted, allow_unused=True)
        return loss.detach() + sum(sw.full_value(g.detach()).abs().sum() for g in second if g is not None)
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(p.grad.clamp(-1, 1), alpha=0.05)  # so that no chain of pieces grows without bounds
    return loss.detach()


def train(case: Case, parallel: bool) -> list[Any]:
    """What every step gives; the last entry is the text of the refusal if there was one.

    A refusal must leave the model, and torch, as they were.
    """
    pieces.reset()
    model = build(case)
    net: Any = sw.AutoParallel(model, case.mode) if parallel else model
    x = torch.randn(case.batch, pieces.WIDTH, dtype=torch.float64)
    results: list[Any] = []
    for number in range(STEPS):
        event = case.events[number - 1] if number else None
        if event is not None and len(model) > 1:
            event(model)
        before = state_of(model)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "None of the inputs have requires_grad")  # of a reentrant checkpoint
                loss = step(case, number, model, net, x)
        except sw.errors.ShardwrightError as error:
            if "create_graph" not in str(error):  # which is found when the backward pass runs
                seed(case, number)
                assert same(before, state_of(model), only_values=True), "a refused call changed the model"
                assert nn.Linear(2, 2).double()(torch.ones(1, 2, dtype=torch.float64)).requires_grad
            return [*results, f"refused: {error}"]
        except (RuntimeError, AttributeError, AssertionError) as error:  # what one device does not compute either
            return [*results, f"raises: {error}"]
        results.append((loss.detach().clone(), state_of(model)))
    return results


def scale_of(state: dict[str, Any]) -> float:
    """The largest gradient: what cancels out is rounding of that."""
    found = [t.abs().max().item() for name, t in state.items() if name.endswith(".grad") and t is not None]
    return max([1.0, *(value for value in found if math.isfinite(value))])


def same(one: dict[str, Any], other: dict[str, Any], only_values: bool = False) -> bool:
    """Whether two states agree to rounding."""
    names = [n for n in one if not (only_values and n.endswith(".grad"))]
    return one.keys() == other.keys() and all(agree(one[n], other[n]) for n in names)


def agree(one: Any, other: Any, scale: float = 1.0) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.allclose(one, other, rtol=1e-9, atol=1e-11 * scale, equal_nan=True)
    if one is None or other is None:  # a gradient that is zero may be missing
        return all(t is None or (isinstance(t, Tensor) and not t.any()) for t in (one, other))
    return bool(one == other)


def outcome(case: Case) -> str:
    """``equal``, ``refused`` with the reason, or what is silently different."""
    single = train(case, parallel=False)
    parallel = train(case, parallel=True)
    pieces.reset()
    steps, verdict = STEPS, "equal"
    if isinstance(parallel[-1], str):
        steps, verdict = len(parallel) - 1, parallel[-1]
    if isinstance(single[-1], str):
        if len(parallel) > len(single) or verdict == "equal":
            return f"SILENT: one device {single[-1]}; the parallel program: {verdict}"
        verdict = case.must_be
    for number in range(steps):
        (loss, state), (other_loss, other_state) = single[number], parallel[number]
        if not agree(loss, other_loss):
            return f"SILENT: loss of step {number}: {other_loss.item()} for {loss.item()}"
        scale = scale_of(state)
        wrong = [n for n in state if not agree(state[n], other_state.get(n), scale)]
        if wrong or state.keys() != other_state.keys():
            return f"SILENT: {wrong} after step {number}"
    return verdict
