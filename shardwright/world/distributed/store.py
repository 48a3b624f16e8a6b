"""The store where the ranks of a job meet: opens it, waits for all ranks, and names those that do not come."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

from shardwright.base.text import numbers_text
from shardwright.errors import WorldError
from shardwright.launch.job import ATTEMPT, TIMEOUT
from shardwright.world.job.job import Job

HALF_HOUR = timedelta(minutes=30)  # torch's own patience


def joining_time(timeout: timedelta | None, variables: Mapping[str, str]) -> timedelta:
    """Returns how long ranks wait for each other to join: as ``init`` says, else as the launcher says, else half an hour.

    Raises:
        WorldError: the launcher's variable is no number of seconds.

    >>> joining_time(None, {"SHARDWRIGHT_TIMEOUT": "60"}).seconds
    60
    """
    if timeout is not None or not variables.get(TIMEOUT):
        return timeout or HALF_HOUR
    try:
        seconds = float(variables[TIMEOUT])
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 1e9:
        raise WorldError(f"{TIMEOUT} is {variables[TIMEOUT]!r}: set it to a number of seconds, {TIMEOUT}=60, or unset it")
    return timedelta(seconds=seconds)


def open_store(job: Job, patience: timedelta) -> dist.Store:
    """Opens the store where the job's ranks meet: rank 0 keeps it, or torchrun's agent, which keeps it over restarts.

    Raises:
        WorldError: nobody listens where ranks meet, or rank 0 cannot.
    """
    is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and job.launcher == "torchrun"
    is_kept_here = job.rank == 0 and not is_agents
    if job.launcher == "Slurm" and not _is_known(job.address):  # of Kubernetes' services names may come later
        raise WorldError(
            f"rank {job.rank} cannot find the address of {job.address}, the first of the step's nodes: export MASTER_ADDR=<a "
            "host name or address of that node> before srun"
        )
    try:
        store = dist.TCPStore(
            job.address, job.port, job.size, is_kept_here, patience, wait_for_workers=False, multi_tenant=True
        )
    except (RuntimeError, ValueError) as error:
        place, said = f"{job.address}:{job.port} ({job.launcher})", str(error).splitlines()[0]
        if is_kept_here:
            raise WorldError(
                f"rank 0 cannot listen at {place}: another program may be there; set MASTER_PORT to a free port on all "
                f"ranks; {said}"
            ) from error
        raise WorldError(
            f"rank {job.rank} has waited {patience.total_seconds():g} s for rank 0 at {place}: check that rank 0 runs "
            f"there, and that a network leads to it; {said}"
        ) from error
    # what ranks of an attempt that failed have written must not be read by those of the next one
    attempt = os.environ.get(ATTEMPT) or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if is_agents else "0"
    return dist.PrefixStore(f"attempt_{attempt}", store)


def _is_known(host: str) -> bool:
    try:
        return bool(socket.getaddrinfo(host, None))
    except OSError:
        return False


def wait_for_ranks(store: dist.Store, job: Job, patience: timedelta) -> None:
    """Waits until all ranks have come.

    Raises:
        WorldError: some have not come in time; they are named.
    """
    store.set(f"came/{job.rank}", socket.gethostname())
    store.add("came", 1)
    until = time.monotonic() + patience.total_seconds()
    pause, ended = 0.001, 0
    while store.add("came", 0) < job.size:
        if time.monotonic() > until:
            missing = [rank for rank in range(job.size) if not store.check([f"came/{rank}"])]
            if not missing:
                return
            raise WorldError(
                f"rank {job.rank} has waited {patience.total_seconds():g} s to join the job: {job.size - len(missing)} of "
                f"{job.size} ranks came, {numbers_text('rank', missing)} missing; see what they do before sw.init(), or give "
                "more time, sw.init(timeout=...) or shardwright run --timeout"
            )
        if store.add("ended", 0) > ended:  # as the launcher says; a rank may have joined before
            ended = store.add("ended", 0)
            gone = [rank for rank in range(job.size) if store.check([f"ended/{rank}"]) and not store.check([f"came/{rank}"])]
            if gone:
                raise WorldError(
                    f"rank {job.rank} waits to join the job, but rank {gone[0]} has ended without joining it: call sw.init() "
                    "on every rank"
                )
        time.sleep(pause)
        pause = min(0.05, pause * 1.5)
