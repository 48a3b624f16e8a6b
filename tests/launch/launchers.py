"""Launchers for tests: ``shardwright run`` in a process forked from the server that has imported everything."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import jobs


def _launch(arguments, folder, output, variables, ignored):
    os.setsid()
    os.chdir(folder)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for target in (1, 2):
        os.dup2(descriptor, target)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update({"PYTHONPATH": str(jobs.ROOT), "OMP_NUM_THREADS": "1", **variables})
    if ignored is not None:
        signal.signal(ignored, signal.SIG_IGN)
    from shardwright.cli import main

    code = main.main(["run", *arguments])
    sys.stdout.flush()
    os._exit(code)


class Launcher:
    """One ``shardwright run``.

    Args:
        folder: where it runs.
        arguments: of the command.
        name: of the file that gets its output.
        ignored: a signal that it is started to ignore, as under nohup.
        variables: further ones of its environment.
    """

    def __init__(self, folder, *arguments, name="out", ignored=None, **variables):
        self.output = Path(folder) / f"{name}.txt"
        self.process = jobs.context().Process(
            target=_launch, args=(arguments, str(folder), str(self.output), variables, ignored)
        )
        self.began = time.monotonic()
        self.process.start()

    @property
    def text(self):
        """What it has printed."""
        return self.output.read_text() if self.output.exists() else ""

    def signal(self, number):
        """Sends the launcher a signal, and no other process."""
        os.kill(self.process.pid, number)

    def end(self, seconds=60.0):
        """Waits for the end; returns the exit code, and how long it took since the start."""
        self.process.join(seconds)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"the launcher has not ended in {seconds} s\n{self.text}")
        return code, time.monotonic() - self.began


def wait_for(paths, launcher, seconds=60.0):
    """Waits until files are there; returns their texts."""
    until = time.monotonic() + seconds
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < until, launcher.text
        assert launcher.process.is_alive(), launcher.text
        time.sleep(0.05)
    return [path.read_text() for path in paths]


def is_alive(pid):
    """Tells whether a process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def check_gone(pids, seconds=5.0):
    """Checks that processes end soon, and kills those that do not."""
    until = time.monotonic() + seconds
    while any(map(is_alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    left = [pid for pid in pids if is_alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
