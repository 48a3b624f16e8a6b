"""The processes of a job: which have ended without a word, as those do that are killed."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import Any

_PATIENCE = 2.0  # seconds that processes have to be gone, and ranks to say why they end


class Processes:
    """Processes of a job's ranks, as far as they run on this machine.

    Args:
        rank, size: of the job.
        store: the job's store.
    """

    def __init__(self, rank: int, size: int, store: Any):
        self.rank, self.size, self.store = rank, size, store
        self.known: dict[int, str] = {}  # by rank, where it runs: host, number of the process, and when it began
        with contextlib.suppress(Exception):
            store.set(f"process/{rank}", _described(os.getpid()))

    def learn(self) -> None:
        """Reads where the other ranks run, once all have said so."""
        if self.known:
            return
        others = {rank: f"process/{rank}" for rank in range(self.size) if rank != self.rank}
        with contextlib.suppress(Exception):
            if self.store.check(list(others.values())):
                self.known = {rank: self.store.get(key).decode() for rank, key in others.items()}

    def ended(self) -> int | None:
        """Returns a rank of this machine whose process has ended, waiting a little for it."""
        until = time.monotonic() + _PATIENCE
        while True:
            for rank, described in self.known.items():
                host, number, _ = described.split()
                if host == socket.gethostname() and _described(int(number)) != described:
                    return rank
            if time.monotonic() > until or not self.known:
                return None
            time.sleep(0.05)


def _described(number: int) -> str:
    """Returns the host and number of a process, and when it began or that it has ended.

    >>> _described(os.getpid()).split()[1] == str(os.getpid())
    True
    """
    began = "running"
    try:
        # after the name in brackets: the state, 19 numbers, and the time at which it began
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        began = "ended" if fields[0] in "ZX" else fields[19]
    except FileNotFoundError:
        if os.path.isdir("/proc/self"):
            began = "ended"
        else:  # a system without /proc
            try:
                os.kill(number, 0)
            except ProcessLookupError:
                began = "ended"
    return f"{socket.gethostname()} {number} {began}"
