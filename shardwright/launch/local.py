"""Starts processes on this machine, one per rank."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from shardwright.errors import WorldError
from shardwright.launch.job import add_package

_PATIENCE = 60.0  # seconds in which ranks have to start, and to answer


def run_ranks(ranks: int, module: str, variables: Mapping[str, str], progress: Callable[[float], None]) -> dict[str, Any]:
    """Runs a module in one process per rank and returns what the first process reports.

    Args:
        ranks: number of processes.
        module: the module to run, by its full name.
        variables: additional environment variables.
        progress: called with each number that the first process prints. It prints one line of JSON per report; a report that is
            a dict is the result.

    Raises:
        WorldError: a process failed; the text is what it printed.
    """
    environment = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    environment.update(variables)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    environment.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # the first rank is to keep the store itself
    add_package(environment, environment.get("PYTHONPATH"))
    command = [sys.executable, "-m", module]
    result: dict[str, Any] | None = None
    with tempfile.TemporaryFile("w+") as errors:
        jobs: list[subprocess.Popen[str]] = []
        try:
            for rank in range(ranks):
                own = {**environment, "RANK": str(rank)}
                jobs.append(subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=errors, text=True))
            for line in jobs[0].stdout or ():
                said = json.loads(line)
                if isinstance(said, dict):
                    result = said
                else:
                    progress(said)
            codes = [job.wait(_PATIENCE) for job in jobs]
        finally:
            for job in jobs:
                job.kill()
                job.communicate()
        if result is None or any(codes):
            errors.seek(0)
            raise WorldError(f"calibrating with {ranks} ranks failed:\n{errors.read()[-2000:].strip()}")
    return result


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
