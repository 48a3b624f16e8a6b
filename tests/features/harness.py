"""How features are tested: a program is a function without arguments that trains on whatever world is current.

A test file lists its programs and runs them in both worlds::

    PROGRAMS = (three_steps, with_momentum)

    @pytest.mark.parametrize("program", PROGRAMS)
    @pytest.mark.parametrize("devices", rank_counts(4, more=(2, 3)))
    def test_simulated(program, devices):
        simulated(program, devices)

    @pytest.mark.parametrize("ranks", rank_counts(2, more=(3, 4)))
    def test_on_real_ranks(ranks):
        on_ranks(__file__, ranks, PROGRAMS)

    if __name__ == "__main__":
        main(PROGRAMS)
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jobs
import torch
from sampling import IS_ON, sampled
from torch import nn

import shardwright as sw
from shardwright.world import current

Program = Callable[[], None]


# Every number of ranks that tests know, in place of the few that tell most.
ALL_SIZES = os.environ.get("SHARDWRIGHT_TEST_ALL") == "1"


def rank_counts(*few: int, more: Sequence[int] = ()) -> list[int]:
    """Numbers of ranks to test on; those in ``more`` only where all are asked for, ``make test-all``."""
    return [*few, *more] if ALL_SIZES else [*few]


def simulated(program: Program, devices: int) -> None:
    """Runs a program on simulated ranks, and leaves the world as it was."""
    before = list(current._current)
    try:
        sw.init(devices=devices)
        torch.manual_seed(0)
        program()
    finally:
        current._current[:] = before


def on_ranks(file: str, ranks: int, programs: Sequence[Program], timeout: float = 300) -> None:
    """Runs a test file's programs on real gloo processes; each says by name that it passed. Of many, a sample."""
    if IS_ON:
        programs = sampled(programs, [f"{ranks} {program.__name__}" for program in programs], share=0.4, least=3)
    with tempfile.TemporaryDirectory() as folder:
        text = jobs.script(Path(folder), file, ranks, *(program.__name__ for program in programs), seconds=timeout)
    passed = {line.removeprefix("passed ") for line in text.splitlines() if line.startswith("passed ")}
    assert passed == {program.__name__ for program in programs}, passed


def main(programs: Sequence[Program]) -> None:
    """What a test file does when a job runs it."""
    torch.set_num_threads(1)
    world = sw.init()
    chosen = sys.argv[1:] or [program.__name__ for program in programs]
    for program in programs:
        if program.__name__ not in chosen:
            continue
        torch.manual_seed(0)
        program()
        if not world.is_simulated and world.rank == 0:
            print(f"passed {program.__name__}", flush=True)


def compare(expected: nn.Module, got: nn.Module, what: str = "", tolerance: float = 1e-9, gradients: bool = True) -> None:
    """Every parameter, its gradient and every buffer of two modules are the same, up to rounding."""
    for (name, a), (_, b) in zip(expected.named_parameters(), got.named_parameters(), strict=True):
        for kind, left, right in (("value", a, b), ("gradient", a.grad, b.grad))[: 2 if gradients else 1]:
            if left is None or right is None:
                assert left is right, f"{what}: {kind} of {name}: {left} and {right}"
                continue
            right = sw.full_value(right)
            scale = max(float(left.detach().abs().max()), 1e-5)
            error = float((left - right).detach().abs().max()) / scale
            assert error <= tolerance, f"{what}: {kind} of {name} differs by {error:.2e}"
    for (name, a), (_, b) in zip(expected.named_buffers(), got.named_buffers(), strict=True):
        assert torch.allclose(a.double(), b.double()), f"{what}: buffer {name}"


def same_steps(
    model: nn.Module,
    batches: Sequence[tuple[Any, ...]],
    prepare: Callable[[nn.Module], Any],
    optimizer: Callable[[Any], torch.optim.Optimizer] = lambda parameters: torch.optim.AdamW(parameters, 1e-2),
    tolerance: float = 1e-9,
    plain: nn.Module | None = None,
) -> Any:
    """Trains a model and its parallel form on the same batches; losses, gradients and weights agree after every step.

    Args:
        model: a module whose result is the loss, in float64.
        prepare: the model -> what is called in parallel, such as ``lambda m: sw.AutoParallel(m).hsdp()``.
        plain: what the single device trains, if not a copy of ``model``; its parameters are named as the model's.

    Returns:
        What ``prepare`` made.
    """
    plain = copy.deepcopy(model) if plain is None else plain
    net = prepare(model)
    pairs = [(plain, plain, optimizer(plain.parameters())), (net, model, optimizer(model.parameters()))]
    for number, batch in enumerate(batches):
        losses = []
        for run, _, update in pairs:
            update.zero_grad()
            torch.manual_seed(number)  # the same dropout masks
            loss = run(*batch)
            loss.backward()
            losses.append(float(loss.detach()))
        compare(plain, model, f"step {number}", tolerance)
        assert abs(losses[0] - losses[1]) <= tolerance * max(1.0, abs(losses[0])), (number, losses)
        for _, _, update in pairs:
            update.step()
    compare(plain, model, "at the end", tolerance, gradients=False)
    return net
