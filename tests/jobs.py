"""Jobs of real gloo ranks for tests: started from a server that has imported everything, and ended after a time."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import re
import runpy
import signal
import socket
import sys
import time
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Ended(NamedTuple):
    """How a rank ended: its exit code, below 0 for a signal and ``None`` where it had to be killed; and what it printed."""

    code: int | None
    text: str
    seconds: float


def _rank(rank, size, port, path, function, args):
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    for target in (1, 2):
        os.dup2(descriptor, target)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    import torch

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        function(rank, *args)
    except SystemExit:
        raise
    except BaseException as error:
        sys.last_value = error  # as the interpreter does before it ends a script
        sys.excepthook(type(error), error, error.__traceback__)
        raise SystemExit(1) from None
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing ends without them
        sys.stdout.flush()


def free_port() -> int:
    """Returns a port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def context() -> ForkServerContext:
    """Returns the context whose processes are forked from a server that has imported all and captured once."""
    before = os.environ.get("PYTHONPATH")
    multiprocessing.set_forkserver_preload(["preloaded"])
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT), *([before] if before else [])])
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return multiprocessing.get_context("forkserver")


def run(folder, size, function, *args, seconds=60.0):
    """Runs ``function(rank, *args)`` on every rank of a job; returns how each ended."""
    forked = context()
    port = free_port()
    paths = [folder / f"rank{rank}.txt" for rank in range(size)]
    began = time.monotonic()
    started = [forked.Process(target=_rank, args=(r, size, port, paths[r], function, args)) for r in range(size)]
    for process in started:
        process.start()
    found = []
    for process, path in zip(started, paths, strict=True):
        process.join(max(0.1, seconds - (time.monotonic() - began)))
        code = process.exitcode
        if code is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        found.append(Ended(code, path.read_text() if path.exists() else "", time.monotonic() - began))
    return found


def _as_script(rank, path, arguments):
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")


def script(folder, path, size, *arguments, seconds=300.0):
    """Runs a script on every rank of a job, as torchrun would; returns what rank 0 printed, where all ended well."""
    ended = run(folder, size, _as_script, str(path), arguments, seconds=seconds)
    assert [e.code for e in ended] == [0] * size, "\n".join(
        f"rank {r}, {e.code}: {e.text[-3000:]}" for r, e in enumerate(ended)
    )
    return ended[0].text


def cases(folder, job):
    """Runs ``job(rank, ..., folder)`` on two ranks; returns what both print as ``case name: outcome``."""
    ended = run(folder, 2, job, str(folder), seconds=300)
    assert [e.code for e in ended] == [0, 0], ended[0].text[-4000:] + ended[1].text[-2000:]
    found = [dict(re.findall(r"^case (.*?): (.*)$", e.text, re.M)) for e in ended]
    assert found[0] == found[1]
    return found[0]
