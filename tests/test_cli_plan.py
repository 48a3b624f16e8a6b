"""`shardwright plan`: on the examples as they are, and on what is wrong with a command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from shardwright.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr("shardwright.world.current._current", [])
    monkeypatch.setattr(sys, "path", sys.path[:])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:  # a script's own imports
        if getattr(sys.modules[name], "__file__", None) and str(EXAMPLES) in str(sys.modules[name].__file__):
            del sys.modules[name]


def run(capsys, *arguments):
    code = main(["plan", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_model_and_its_inputs(capsys, tmp_path):
    page, file = tmp_path / "plan.html", tmp_path / "plan.json"
    code, out, err = run(
        capsys, EXAMPLES / "llama.py", "--devices", 64, "--mesh", "8,8", "--axes", "dp,tp", "--machine", "h100",
        "--set", "size=8b", "--set", "batch=64", "--set", "sequence=2048", "--html", page, "--save", file,
    )  # fmt: skip
    assert code == 0, err
    assert "plan for 64 ranks, mesh dp=8,tp=8, mode auto" in out
    assert "32 ×  blocks.*.feedforward.gate" in out
    assert "of 80.0 GB at most" in out
    assert json.loads(file.read_text())["devices"] == 64
    assert "<html" in page.read_text()[:200]


@pytest.mark.parametrize("script", ["mnist_ops.py", "char_lm.py"])
def test_a_training_script_as_it_is(capsys, script):
    code, out, err = run(capsys, EXAMPLES / script, "--devices", 8, "--machine", "a100", "--mode", "auto", "--summary")
    assert code == 0, err
    assert "plan for 8 ranks" in out
    assert "mode auto" in out


def test_the_mode_is_the_scripts_own_by_default(capsys):
    code, out, err = run(capsys, EXAMPLES / "mnist_ops.py", "--devices", 8, "--summary")
    assert code == 0, err
    assert "mode semi_auto" in out


def test_tensors_without_memory(capsys, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import torch, shardwright as sw\n"
        "from torch import nn\n"
        "model = nn.Sequential(*(nn.Linear(65536, 65536, bias=False) for _ in range(8)))\n"  # 137 GB
        "net = sw.AutoParallel(model)\n"
        "loss = net(torch.randn(64, 65536)).square().mean()\n"
        "raise SystemExit('not reached')\n"
    )
    code, out, err = run(capsys, script, "--devices", 16, "--meta", "--mode", "auto", "--explain", "3", "--memory", "80GB")
    assert code == 0, err
    assert "3/aten.linear" in out or "linear" in out


def test_machines_are_listed(capsys):
    code, out, _ = run(capsys, "none.py", "--devices", 2, "--machine", "list")
    assert code == 0
    assert "h100" in out.split()


TINY = [EXAMPLES / "llama.py", "--set", "size=tiny", "--set", "batch=8", "--set", "sequence=64"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["missing.py"], "there is no file missing.py"),
        ([EXAMPLES / "llama.py", "--machine", "h1000"], "machine 'h1000' is not known"),
        ([EXAMPLES / "llama.py", "--set", "colour=red"], "neither model\\(\\) nor inputs\\(\\)"),
        ([EXAMPLES / "llama.py", "--set", "colour"], "write NAME=VALUE"),
        ([*TINY, "--mesh", "3,3"], "3·3 = 9"),
        ([*TINY, "--axes", "dp,tp"], "2 aliases for no mesh; give one a size"),
        ([*TINY, "--mesh", "4,2", "--axes", "dp"], "1 aliases for the mesh 4,2"),
        ([*TINY, "--load", "missing.json"], "there is no plan file missing.json"),
        ([*TINY, "--save", "/no/such/plan.json"], "--save /no/such/plan.json: there is no folder /no/such"),
        ([*TINY, "--html", "/tmp"], "--html /tmp: that is a folder; name a file, /tmp/plan.html"),
        ([*TINY, "--memory", "much"], "memory 'much' is not a size"),
        ([*TINY, "--memory", "1KB"], "no plan for 8 devices(.|\n)*allow memory='[0-9.]+kB'.*recompute\\('auto'\\)"),
        ([ROOT / "examples" / "language_common.py"], "called no AutoParallel"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(capsys, arguments, message):
    import re

    code, out, err = run(capsys, *arguments, "--devices", 8)
    assert code == 2, out
    assert re.search(message, err), err


NO_INPUTS = "def inputs():\n    return ()\n"


@pytest.mark.parametrize(
    "text, message",
    [
        ("import torch, nosuch\n", r"train.py:1: import torch, nosuch\n  ModuleNotFoundError: No module named 'nosuch'"),
        ("def model(:\n", r"is no Python: invalid syntax at .*train.py:1: def model\(:"),
        ("def model():\n    return 1 / 0\n\n" + NO_INPUTS, r"train.py:2: return 1 / 0\n  ZeroDivisionError"),
        ("def model():\n    return 3\n\n" + NO_INPUTS, r"model\(\) of .*train.py returns 3, a int: return an"),
        ("def model():\n    return 3\n", r"AutoParallel and has model\(\) but defines no inputs\(\): define one"),
        ("raise SystemExit('no data')\n", r"train.py ended by itself before there was anything to plan: no data"),
    ],
)
def test_what_goes_wrong_in_a_script_is_said_by_its_line(capsys, tmp_path, text, message):
    import re

    script = tmp_path / "train.py"
    script.write_text(text)
    code, _, err = run(capsys, script, "--devices", 8)
    assert code == 2
    assert re.search(message, err), err
    assert "Traceback" not in err
    assert "runpy" not in err


def test_a_script_has_arguments_of_its_own(capsys, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import argparse, torch, shardwright as sw\n"
        "parser = argparse.ArgumentParser()\n"
        "parser.add_argument('--width', type=int, required=True)\n"
        "width = parser.parse_args().width\n"
        "sw.AutoParallel(torch.nn.Linear(width, width))(torch.ones(8, width))\n"
    )
    code, out, err = run(capsys, script, "--devices", 4, "--", "--width", 48)
    assert code == 0, err
    assert "[48, 48]" in out
    code, _, err = run(capsys, script, "--devices", 4)
    assert code == 2
    assert "give them after --" in err


def test_the_command_says_what_is_missing(capsys):
    assert run(capsys)[0] == 2
    code, _, err = run(capsys, EXAMPLES / "llama.py")
    assert code == 2
    assert "the number of devices is missing: write shardwright plan" in err
    assert run(capsys, "--machine", "list")[0] == 0


def test_a_plan_that_does_not_fit_says_so(capsys, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import torch, shardwright as sw\n"
        "model = torch.nn.Sequential(*(torch.nn.Linear(65536, 65536, bias=False) for _ in range(8)))\n"
        "sw.AutoParallel(model, 'data_parallel')(torch.empty(64, 65536))\n"
    )
    code, out, err = run(capsys, script, "--devices", 8, "--meta", "--summary")
    assert code == 0, err
    assert "note: a rank needs" in out
    assert "and has 80.0 GB" in out
