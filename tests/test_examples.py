"""The examples run on simulated devices and compute what a single device computes."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import mnist_common
import shardwright as sw

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
MNIST = ("mnist_ops", "mnist_functional", "mnist_layout")


@pytest.fixture(autouse=True)
def _eight_devices(monkeypatch):
    for name in ("DATA_PATH", "RANK", "WORLD_SIZE", "SHARDWRIGHT_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("shardwright.world.current._current", [])


def run(name, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def differences(text):
    """The sizes in the line about the single device."""
    line = next(line for line in text.splitlines() if line.startswith("matches single device: "))
    return [float(size) for size in re.findall(r"\d\.\de[-+]\d\d", line)]


@pytest.mark.parametrize("name", MNIST)
def test_digits(name, monkeypatch, capsys):
    text = run(name, monkeypatch, capsys, "--steps", "12")
    assert text.startswith("plan for 8 ranks")
    losses = re.findall(r"^epoch: 0 step: (\d+), loss is (\d\.\d{7})$", text, re.M)
    assert [step for step, _ in losses] == ["0", "10"]
    assert float(losses[0][1]) == pytest.approx(2.3009810, abs=1e-5)
    assert float(losses[1][1]) < float(losses[0][1])
    assert len(differences(text)) == 2
    assert max(differences(text)) < 1e-6


def test_the_three_forms_have_the_same_losses():
    sw.init(devices=8)
    forms = [runpy.run_path(str(EXAMPLES / f"{name}.py"))["Network"] for name in MNIST]
    losses = [mnist_common.train(form, 1, 3, lambda *args: None)[0] for form in forms]
    assert losses[1] == losses[0]
    torch.testing.assert_close(losses[2], losses[0], atol=1e-6, rtol=0)


def test_the_sums_of_the_first_product_and_of_its_gradient():
    """matmul1 ((2, 4), (4, 1)): its output is summed over ranks 0-3 and 4-7, its weight's gradient over 0 and 4, ..."""
    sw.init(devices=8)
    with sw.record_communication() as log:
        mnist_common.train(runpy.run_path(str(EXAMPLES / "mnist_ops.py"))["Network"], 1, 1, lambda *args: None)
    reduces = {(e.phase, e.shape): e.groups for e in log.events if e.kind == "all_reduce"}
    assert reduces["forward", (32, 512)] == ((0, 1, 2, 3, 4, 5, 6, 7),)  # matmul2
    first = next(e for e in log.events if e.kind == "all_reduce" and e.shape == (32, 512))
    assert first.groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert reduces["backward", (784, 512)] == ((0, 4), (1, 5), (2, 6), (3, 7))


def test_a_wrong_result_is_told_apart(monkeypatch):
    sw.init(devices=8)
    network = runpy.run_path(str(EXAMPLES / "mnist_ops.py"))["Network"]
    losses, weights = mnist_common.train(network, 1, 2, lambda *args: None)
    weights[2] = weights[2] * 1.01
    with pytest.raises(SystemExit, match="DIFFERS from single device"):
        mnist_common.check(losses, weights)


def test_char_lm(monkeypatch, capsys):
    text = run("char_lm", monkeypatch, capsys, "--steps", "21")
    losses = [float(loss) for loss in re.findall(r"mean loss is (\d\.\d+)", text)]
    assert losses[1] < losses[0] - 0.5
    assert text.startswith("plan for 8 ranks, mesh dp=2,tp=4")
    assert re.search(r"forward +4 x all_reduce over tp", text)
    assert re.search(r"backward +4 x all_reduce over tp", text)
    assert "generated: '    def " in text
    assert max(differences(text)) < 1e-5


def test_gan_penalty(monkeypatch, capsys):
    text = run("gan_penalty", monkeypatch, capsys)
    losses = re.findall(r"^step +(\d+): critic (-?\d+\.\d+), generator (-?\d+\.\d+)$", text, re.M)
    assert [int(step) for step, *_ in losses] == [0, 5, 10, 15, 20, 25]
    assert float(losses[-1][1]) < float(losses[0][1]) / 2
    assert float(re.findall(r"to a single device's: (\S+)", text)[0]) < 1e-12
    assert len((EXAMPLES / "gan_penalty.py").read_text("utf-8").splitlines()) <= 80


# Of each technique: what was configured, and what its neighbours got.
PROPAGATION = {
    "weights": (["embedding (1, 1) (2, 1)", "matmul (2, 1) (1, 4)"], ["gelu (2, 4)", "matmul1 (2, 4) (4, 1)"]),
    "dimensions": (["mean (8, 1, 1)", "matmul (8, 1) (1, 1)"], ["relu (8, 1, 1)", "tanh (8, 1)"]),
    "boundary": (
        ["matmul (8, 1) (1, 1)", "matmul1 (1, 1) (1, 8)"],
        ["conv2d (8, 1, 1, 1) (1, 1, 1, 1) (1,)", "relu3 (1, 8)", "matmul2 (1, 8) (8, 1)"],
    ),
}


@pytest.mark.parametrize("technique", PROPAGATION)
def test_propagation(technique, monkeypatch, capsys, tmp_path):
    path = tmp_path / "plan.svg"
    text = run(f"propagation_{technique}", monkeypatch, capsys, "--draw", str(path))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    configured, inferred = PROPAGATION[technique]
    assert [line.removeprefix("configured ") for line in lines if line.startswith("configured")] == configured
    assert {f"inferred {line}" for line in inferred} <= set(lines)
    losses = [float(loss) for loss in re.findall(r"loss is (\d\.\d+)", text)]
    assert losses == sorted(losses, reverse=True)
    assert "matches single device" in text
    assert "lint:" not in text
    drawing = path.read_text("utf-8")
    assert drawing.count(">configured<") == 1
    assert all(line.split(" ", 1)[0] in drawing for line in configured)


@pytest.mark.parametrize(("dimensions", "bytes_sent"), [("2d", "1310720"), ("3d", "917504")])
def test_tensor_parallel(dimensions, bytes_sent, monkeypatch, capsys):
    name = f"tensor_parallel_{dimensions}"
    text = run(name, monkeypatch, capsys)
    assert f"{bytes_sent} forward, {bytes_sent} backward; closed form: {bytes_sent}" in text
    assert text.endswith("matches single device\n")
    assert len((EXAMPLES / f"{name}.py").read_text("utf-8").splitlines()) < 60


def test_an_example_is_short():
    for technique in PROPAGATION:
        assert len((EXAMPLES / f"propagation_{technique}.py").read_text("utf-8").splitlines()) < 60


def test_pipelines(monkeypatch, capsys):
    text = run("pipeline_gpt", monkeypatch, capsys)
    losses = [re.findall(r"\d+\.\d{6}", line) for line in text.splitlines()[:4]]
    assert len(losses[0]) == 3
    assert losses.count(losses[0]) == 4
    assert "step 3" in run("multiple_mixed", monkeypatch, capsys)
