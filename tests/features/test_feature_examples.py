"""The examples of the training features run and say what they are about."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    monkeypatch.setattr("shardwright.world.current._current", [])
    for name in ("RANK", "WORLD_SIZE", "SHARDWRIGHT_DEVICES"):
        monkeypatch.delenv(name, raising=False)

    def runner(name):
        monkeypatch.setattr(sys, "argv", [name])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return runner


def test_optimizer_parallel(run):
    text = run("optimizer_parallel")
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", text)]
    assert losses[-1] < 0.1 < losses[0]
    assert "layer1.weight: [64, 784] of [512, 784]" in text
    assert "layer3.weight: [10, 512] of [10, 512]" in text


def test_gradient_accumulation(run):
    text = run("gradient_accumulation")
    for parts, whole in re.findall(r"loss (\d\.\d+) in four parts, (\d\.\d+) at once", text):
        assert float(parts) == pytest.approx(float(whole), abs=2e-6)
    assert "collectives that reduce gradients: 1 a step" in text


def test_communication_fusion(run):
    assert re.findall(r": (\d+) collectives", run("communication_fusion")) == ["1", "16", "2", "3", "2"]


def test_recompute(run):
    text = run("recompute")
    kept, again = re.findall(r"loss (\S+), gradients' norm (\S+), held for the backward +(\S+) MB", text)
    assert kept[:2] == again[:2]
    assert float(again[2]) < 0.1 * float(kept[2])
