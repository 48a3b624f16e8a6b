"""``shardwright run --distributed`` leaves no process behind: signals to it reach the ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ALL = os.environ.get("SHARDWRIGHT_TEST_ALL") == "1"

SCRIPT = """
import os, sys, time
import torch
import torch.distributed as dist
import shardwright as sw

world = sw.init()
open(f"{sys.argv[1]}/pid{world.rank}", "w").write(str(os.getpid()))
dist.barrier()
open(f"{sys.argv[1]}/ready{world.rank}", "w").close()
if world.rank == 0 and sys.argv[2] == "waiting":
    dist.all_reduce(torch.ones(1))  # rank 1 never comes
time.sleep(100)
"""

CASES = []  # tests/launch/test_failures.py has some that take less time
if ALL:
    signals = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    CASES = [(s, how, group) for s in signals for how in ("waiting", "sleeping") for group in (False, True)]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("number", "how", "to_group"), CASES)
def test_no_rank_outlives_the_launcher(tmp_path, number, how, to_group):
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "shardwright", "run", "--devices", "2", "--distributed", "train.py", str(tmp_path), how]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "out.txt", "w") as out:
        launcher = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=out, stderr=out, start_new_session=True)
    ranks = []
    try:
        end = time.monotonic() + 150
        while not all((tmp_path / f"ready{r}").exists() for r in (0, 1)):
            assert time.monotonic() < end, (tmp_path / "out.txt").read_text()
            assert launcher.poll() is None, (tmp_path / "out.txt").read_text()
            time.sleep(0.1)
        ranks = [int((tmp_path / f"pid{r}").read_text()) for r in (0, 1)]
        (os.killpg if to_group else os.kill)(launcher.pid, number)
        assert launcher.wait(60) != 0
        end = time.monotonic() + 10
        while any(map(is_alive, ranks)) and time.monotonic() < end:
            time.sleep(0.1)
        assert not any(map(is_alive, ranks))
    finally:
        for pid in (launcher.pid, *ranks):
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        launcher.wait(10)
