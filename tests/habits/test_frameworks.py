"""The loops of Hugging Face, Accelerate and Lightning around a net: in both worlds the numbers of a single device."""

from __future__ import annotations

import os
import re
import runpy
import warnings
from pathlib import Path

import jobs
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples"
# A Trainer that thinks that its processes have other data multiplies losses by their number: so these are compared too.
FIRST_LOSSES = {"huggingface_trainer": "3.928700", "accelerate_loop": "4.176878", "lightning_module": "4.188884"}
EXAMPLES = tuple(FIRST_LOSSES)


def run(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the frameworks warn of each other
        runpy.run_path(str(FOLDER / f"{name}.py"))["main"]()


def numbers(text):
    """The losses in a text, and the difference from a single device."""
    losses = re.findall(r"\b\d\.\d{6}\b", text)
    differences = re.findall(r"to a single device's: (\S+)", text)
    assert len(differences) == 1, text
    return losses, float(differences[0])


@pytest.mark.whole
@pytest.mark.parametrize("name", EXAMPLES)
def test_simulated(name, monkeypatch, capsys):
    monkeypatch.setattr("shardwright.world.current._current", [])
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SHARDWRIGHT_DEVICES"):
        monkeypatch.delenv(variable, raising=False)
    run(name)
    losses, difference = numbers(capsys.readouterr().out)
    assert losses[0] == FIRST_LOSSES[name]
    assert float(losses[-1]) < float(losses[0]) - 0.4
    assert difference < 1e-12


def everything(rank):
    os.environ["LOCAL_RANK"] = str(rank)
    for name in EXAMPLES:
        print(f"begin {name}")
        run(name)
        print(f"end {name}")


@pytest.mark.whole
def test_on_real_ranks(tmp_path):
    first, second = jobs.run(tmp_path, 2, everything, seconds=240)
    assert (first.code, second.code) == (0, 0), first.text[-3000:] + second.text[-3000:]
    for name in EXAMPLES:
        losses, difference = numbers(first.text.partition(f"begin {name}")[2].partition(f"end {name}")[0])
        assert losses[0] == FIRST_LOSSES[name]
        assert difference < 1e-12
