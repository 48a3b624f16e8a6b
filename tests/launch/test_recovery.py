"""Recovery: ranks and nodes that are killed lose nothing, on the same ranks or on fewer; who is asked to end saves first."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from pathlib import Path

import jobs
import pytest
import torch
from launchers import Launcher, check_gone, wait_for

import shardwright as sw

ALL = os.environ.get("SHARDWRIGHT_TEST_ALL") == "1"
SCRIPT = str(Path(__file__).parent / "train_and_recover.py")
STEPS = 30
BEGUN = re.compile(r"rank (\d+) of (\d+) begins at step (\d+) at ([\d.]+) attempt (\d+)")


def uninterrupted(folder, ranks):
    """Trains on a number of ranks without anything happening; returns the weights."""
    launcher = Launcher(folder, "--nproc-per-node", str(ranks), SCRIPT, str(folder / "whole"), str(STEPS), name="whole")
    assert launcher.end(120)[0] == 0, launcher.text
    return torch.load(folder / "whole/weights.pt")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The weights of the uninterrupted run on 2 ranks."""
    return uninterrupted(tmp_path_factory.mktemp("whole"), 2)


@pytest.mark.parametrize("seed", range(20 if ALL else 1))
def test_a_rank_killed_at_any_moment_changes_nothing(seed, weights, tmp_path):
    """One of two ranks is killed at a random moment; all go on from the last checkpoint, to the same bits."""
    draw = random.Random(seed)
    slow, when = 0.05, draw.uniform(0.2, 2.0)
    given = [SCRIPT, str(tmp_path / "run"), str(STEPS), "--kill", str(draw.randrange(2)), str(when), "--slow", str(slow)]
    launcher = Launcher(tmp_path, "--nproc-per-node", "2", "--max-restarts", "2", *given)
    assert launcher.end(120)[0] == 0, launcher.text
    begun = [[float(n) for n in found] for found in BEGUN.findall(launcher.text)]
    assert sorted((rank, attempt) for rank, _, _, _, attempt in begun) == [(0, 0), (0, 1), (1, 0), (1, 1)], launcher.text
    found = torch.load(tmp_path / "run/weights.pt")
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    assert not list((tmp_path / "run").glob(".step*"))


@pytest.mark.skipif(not ALL, reason="starts three jobs: in make test-all")
def test_ranks_that_are_asked_to_end_save_first(weights, tmp_path):
    """SIGTERM to the launcher: all ranks save the same step within their grace, and the next run goes on from there."""
    given = ["--nproc-per-node", "2", SCRIPT, str(tmp_path / "run"), str(STEPS), "--slow", "0.1"]
    launcher = Launcher(tmp_path, *given)
    until = time.monotonic() + 60
    while sw.latest(tmp_path / "run") is None:
        assert time.monotonic() < until, launcher.text
        time.sleep(0.05)
    launcher.signal(signal.SIGTERM)
    code, _ = launcher.end(30)
    saved = re.findall(r"saved step (\d+) and ends", launcher.text)
    assert code == 143, launcher.text
    assert len(saved) == 2
    assert len(set(saved)) == 1
    assert sw.latest(tmp_path / "run").name == f"step-{saved[0]}"
    again = Launcher(tmp_path, *given, name="again")
    assert again.end(60)[0] == 0, again.text
    assert {int(step) for _, _, step, _, _ in BEGUN.findall(again.text)} == {int(saved[0])}
    found = torch.load(tmp_path / "run/weights.pt")
    assert all(torch.equal(found[name], value) for name, value in weights.items())


@pytest.mark.skipif(not ALL, reason="takes half a minute: in make test-all")
def test_fewer_nodes_go_on_where_one_is_lost(weights, tmp_path):
    """A node of two is killed with its ranks; the other one plans anew for its own, in the same order of samples."""
    port = str(jobs.free_port())
    place = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "job"]
    given = ["--nnodes", "1:2", *place, "--max-restarts", "3", "--nproc-per-node"]
    script = [SCRIPT, str(tmp_path / "run"), str(STEPS), "--slow", "0.2"]
    stays = Launcher(tmp_path, *given, "2", *script, name="stays")
    time.sleep(1.0)
    lost = Launcher(tmp_path, *given, "1", *script, name="lost")
    wait_for([lost.output], lost)
    until = time.monotonic() + 60
    while sw.latest(tmp_path / "run") is None:
        assert time.monotonic() < until, stays.text + lost.text
        time.sleep(0.05)
    lost.signal(signal.SIGKILL)
    assert stays.end(90)[0] == 0, stays.text
    begun = [[float(n) for n in found] for found in BEGUN.findall(stays.text)]
    assert [size for _, size, *_ in begun] == [3, 3, 2, 2], stays.text
    found = torch.load(tmp_path / "run/weights.pt")
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)
    check_gone([lost.process.pid])
