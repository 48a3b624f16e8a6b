"""Runs a job in the background: ``python -m shardwright.launch.background JOB``, where JOB is JSON."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from shardwright.launch.job import Launch, add_package
from shardwright.launch.logs import make_folder


def start_in_background(job: Launch) -> tuple[int, Path]:
    """Starts a job in a process of its own, which goes on when this one ends; returns its number and its log.

    Raises:
        OSError: the directory of logs cannot be made.
    """
    assert job.folder is not None
    folder = Path(job.folder).resolve()
    make_folder(folder)
    path = folder / job.launcher_log
    job = replace(job, folder=str(folder), shown=(), in_background=True)
    environment = dict(os.environ)
    add_package(environment, environment.get("PYTHONPATH"))
    command = [sys.executable, "-m", "shardwright.launch.background", job.to_json()]
    with open(path, "w", encoding="utf-8") as log:
        started = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    return started.pid, path


def log_name(pattern: str) -> str:
    """Replaces ``{hostname}`` in the name of logs; ``{ip}`` is replaced when the job starts."""
    return pattern.replace("{hostname}", socket.gethostname())


if __name__ == "__main__":
    from shardwright.launch.engine import run_job

    raise SystemExit(run_job(Launch.from_json(sys.argv[1])))
