"""What people write around a model when they train it: on simulated and on real ranks equal to the single device."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Callable
from functools import cache
from typing import Any

import adapters  # noqa: F401
import around_the_step  # noqa: F401  (puts its habits into the table)
import jobs
import models  # noqa: F401
import objectives  # noqa: F401
import pytest
import torch
from common import HABITS, REFUSED, numbers
from torch import Tensor, nn

import shardwright as sw


def by_data(model: nn.Module) -> Any:
    return sw.AutoParallel(model, "data_parallel")


def optimizer_split(model: nn.Module) -> Any:
    return sw.AutoParallel(model, "data_parallel").hsdp(threshold=0)


def by_rows(model: nn.Module) -> Any:
    """The first matrix of the model is split over all ranks, as a tensor-parallel plan has it."""
    ranks = sw.init().size
    name = next((n for n, p in model.named_parameters() if p.ndim == 2), None)
    net = sw.AutoParallel(model)
    return net if name is None else net.shard({name: (ranks, 1)})


WAYS = {"data_parallel": by_data, "hsdp": optimizer_split, "tensor_parallel": by_rows}
ALL = os.environ.get("SHARDWRIGHT_TEST_ALL") == "1"


# Pruning gives the parameter another name than the strategy has; and on real ranks a mask is no distributed tensor.
WITHOUT_STRATEGIES = {"pruning_between_steps"}
REFUSED_BY_TORCH = {"pruning_between_steps": "mixed torch.Tensor and DTensor|in-place operations that require placement"}


def ways(name: str, world: int) -> list[str]:
    """One way of being parallel for each habit, in turns; ``make test-all`` takes them all."""
    found = [way for way in WAYS if way != "tensor_parallel" or name not in WITHOUT_STRATEGIES]
    return found if ALL else [found[([*HABITS].index(name) + world) % len(found)]]


@cache
def expected(name: str) -> list[Tensor]:
    return numbers(HABITS[name], lambda model: model)


def compare(name: str, parallel: Callable[[nn.Module], Any]) -> None:
    wanted, found = expected(name), numbers(HABITS[name], parallel)
    assert len(wanted) == len(found)
    for number, (a, b) in enumerate(zip(wanted, found)):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11, msg=lambda text, n=number: f"{name}: result {n}: {text}")


@pytest.mark.whole
@pytest.mark.parametrize("name", HABITS)
def test_simulated(name, monkeypatch):
    monkeypatch.setattr("shardwright.world.current._current", [])
    sw.init(devices=3)
    for way in ways(name, 0):
        compare(name, WAYS[way])


def compare_refusal(name: str) -> None:
    run, message = REFUSED[name]
    numbers(run, lambda model: model)
    with pytest.raises((sw.errors.ShardwrightError, RuntimeError), match=message):
        numbers(run, by_data)


@pytest.mark.whole
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, monkeypatch):
    monkeypatch.setattr("shardwright.world.current._current", [])
    sw.init(devices=3)
    compare_refusal(name)


def everything(rank: int) -> None:
    sw.init()
    for name in HABITS:
        for way in ways(name, 1):
            try:
                compare(name, WAYS[way])
            except Exception as error:
                if re.search(REFUSED_BY_TORCH.get(name, "(?!)"), str(error)):
                    continue
                said = " ".join(str(error).split())[:600]
                print(f"failed: {name} {way}: {type(error).__name__} {said} {traceback.format_exc()[-700:]}", flush=True)
    for name in REFUSED:
        try:
            compare_refusal(name)
        except BaseException as error:
            print(f"failed: {name}: {type(error).__name__} {' '.join(str(error).split())[:600]}", flush=True)
    print("reached the end", flush=True)


@pytest.mark.long
@pytest.mark.whole
def test_on_real_ranks(tmp_path):
    for ended in jobs.run(tmp_path, 2, everything, seconds=240):
        assert "failed:" not in ended.text
        assert "reached the end" in ended.text
        assert ended.code == 0


if __name__ == "__main__":
    everything(0)
