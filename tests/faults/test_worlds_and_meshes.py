"""What a world and a mesh are made of is checked: timeouts, half of a job's variables, axes, sizes, ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import jobs
import pytest
import torch

import shardwright as sw
from shardwright.errors import ArgumentTypeError, LayoutError, WorldError

ROOT = Path(__file__).resolve().parents[2]

AXES = [
    (("dp", "dp"), (2, 2), LayoutError, "repeats an"),
    (("",), (2,), LayoutError, "not usable"),
    (("a b",), (2,), LayoutError, "not usable"),
    (("a>b",), (2,), LayoutError, "not usable"),
    (("None",), (2,), LayoutError, "not usable"),
    ((1,), (2,), ArgumentTypeError, "not a str"),
    ((None,), (2,), ArgumentTypeError, "not a str"),
    (("dp",), (0,), LayoutError, "at least one rank"),
    (("dp",), (-2,), LayoutError, "at least one rank"),
    (("dp",), (2.0,), ArgumentTypeError, "not an int"),
    (("dp",), (True,), ArgumentTypeError, "not an int"),
    (("dp",), ("2",), ArgumentTypeError, "not an int"),
    (("dp", "mp"), (2,), LayoutError, "an axis"),
    (("dp",), 2, ArgumentTypeError, "tuple"),
    (None, None, ArgumentTypeError, "tuple"),
    ("dp", (1, 2), ArgumentTypeError, "tuple"),
    (("dp",), (10**20,), LayoutError, "more than"),
]
RANKS = [
    ((0, 0), LayoutError, "repeats a rank"),
    ((0, -1), LayoutError, "negative"),
    ((0, 1, 2), LayoutError, "3 ranks"),
    ((0,), LayoutError, "1 ranks"),
    ((0, 1.0), ArgumentTypeError, "not an int"),
    ((0, True), ArgumentTypeError, "not an int"),
    (3, ArgumentTypeError, "list of ints"),
    ("01", ArgumentTypeError, "list of ints"),
]


@pytest.mark.parametrize(("axes", "sizes", "error", "said"), AXES)
def test_axes_of_meshes_and_layouts_are_checked_alike(axes, sizes, error, said):
    for make in (lambda: sw.Mesh(axes, sizes), lambda: sw.Layout(sizes, axes)):
        with pytest.raises(error, match=said):
            make()


@pytest.mark.parametrize(("ranks", "error", "said"), RANKS)
def test_ranks_of_meshes_and_layouts_are_checked_alike(ranks, error, said):
    for make in (lambda: sw.Mesh(("dp",), (2,), ranks), lambda: sw.Layout((2,), ("dp",), ranks)):
        with pytest.raises(error, match=said):
            make()


def test_meshes_that_are_right():
    assert sw.Mesh((), ()).ranks == (0,)
    assert sw.Mesh(("dp", "d0.1", "_x"), (2, 1, 3), (5, 4, 3, 2, 1, 0)).size == 6
    assert sw.Mesh(("interleaved_parallel",), (2,)).size == 2
    assert sw.Mesh(("dp",), (2,), None).ranks == (0, 1)
    assert sw.Mesh.parse("dp=2,mp=2 ranks=0,2,1,3").ranks == (0, 2, 1, 3)
    assert sw.Layout((2, 2), ("dp", "interleaved_parallel")).mesh.size == 2


def test_data_axes_are_named_once():
    sw.init(devices=4)
    with (
        pytest.raises(LayoutError, match="names an axis twice"),
        sw.collectives.over(sw.Mesh(("dp", "mp"), (2, 2)), data=("dp", "dp")),
    ):
        pass


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 1e300, True, "60", [3], timedelta(0), timedelta(-3)])
def test_timeouts_that_are_none_are_refused(timeout):
    with pytest.raises((WorldError, ArgumentTypeError), match=r"init\(timeout="):
        sw.init(devices=2, timeout=timeout)


@pytest.mark.parametrize("every", [0, -1, True, 1.5, "8"])
def test_checks_of_weights_that_are_none_are_refused(every):
    with pytest.raises(WorldError, match=r"init\(check_weights="):
        sw.init(devices=2, check_weights=every)


def test_simulated_ranks_take_a_timeout():
    for timeout in (5, 0.5, timedelta(minutes=1), None):
        assert sw.init(devices=3, timeout=timeout).size == 3


def test_half_of_the_variables_of_a_job_is_no_job(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(WorldError, match="MASTER_ADDR is not set"):
        sw.init()
    with pytest.raises(WorldError, match="MASTER_ADDR is not set"):
        sw.init(devices=2)
    monkeypatch.setenv("WORLD_SIZE", "1")  # alone: some launchers say so
    assert sw.init(devices=2).size == 2
    code = "import shardwright as sw, torch; sw.AutoParallel(torch.nn.Linear(2, 2))(torch.ones(2, 2))"
    environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "29501", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "MASTER_ADDR is not set" in done.stderr


def short_of_patience(rank):
    sw.init(timeout=3)
    tp = sw.Layout((2, 2), ("dp", "tp"))
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
    net = sw.AutoParallel(model).shard({"0.weight": tp("tp", "None"), "1.weight": tp("None", "tp")})
    for step in range(3):
        if rank == 2 and step == 2:
            time.sleep(12)  # rank 3 waits for it, in a group of the two
        net(torch.ones(8, 8)).sum().backward()


@pytest.mark.skipif(os.environ.get("SHARDWRIGHT_TEST_ALL") != "1", reason="four processes and some seconds of waiting")
def test_a_rank_that_never_comes_is_waited_for_as_long_as_was_said(tmp_path):
    ended = jobs.run(tmp_path, 4, short_of_patience, seconds=45)
    assert ended[3].code == 1, ended[3].text[-2000:]
    assert "imed out" in ended[3].text
    assert ended[2].code is not None
