"""Joins the job that a launcher describes: makes its process group of ``torch.distributed``."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from shardwright.base.process_groups import backend_of
from shardwright.errors import WorldError
from shardwright.world.distributed.store import HALF_HOUR, joining_time, open_store, wait_for_ranks
from shardwright.world.job.found import find_job
from shardwright.world.job.job import Job
from shardwright.world.job.torchrun import read_environment


def join_job(backend: str | None = None, timeout: timedelta | None = None) -> torch.device:
    """Makes the process group of the job in the environment; returns this rank's device.

    Args:
        backend: a ``torch.distributed`` backend; default NCCL where every rank of this host has a GPU, else gloo.
        timeout: how long a collective may wait for the other ranks; default: torch's.

    Raises:
        WorldError: a variable is missing or makes no sense, or the backend does not fit this host.
    """
    job = find_job(os.environ)
    if job is None:  # what torchrun would have set, and is missing
        rank, size, local_rank, local_size = read_environment(os.environ)
        job = Job("torchrun", rank, size, local_rank, local_size, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    backend = backend or ("nccl" if _has_gpus_for(job.local_rank, job.local_size) else "gloo")
    device = torch.device("cpu")
    if "nccl" in backend:
        if job.local_rank >= torch.cuda.device_count():
            raise WorldError(
                f"LOCAL_RANK is {job.local_rank}, but this host has {torch.cuda.device_count()} CUDA devices: start at "
                "most one rank a device, or use backend='gloo'"
            )
        device = torch.device("cuda", job.local_rank)
        torch.cuda.set_device(device)
    patience = joining_time(timeout, os.environ)
    store = open_store(job, patience)
    wait_for_ranks(store, job, patience)
    store.set_timeout(timeout or HALF_HOUR)  # what comes later may take longer than to join
    try:
        dist.init_process_group(
            backend,
            timeout=timeout,
            store=store,
            rank=job.rank,
            world_size=job.size,
            device_id=device if device.type == "cuda" else None,
        )
    except (RuntimeError, ValueError) as error:
        raise WorldError(
            f"rank {job.rank} could not join the job of {job.size} ranks at {job.address}:{job.port} ({job.launcher}) "
            f"with backend {backend!r}: {error}"
        ) from error
    return device


def check_backend(backend: str | None) -> None:
    """Refuses a backend that the initialised job does not run on.

    Args:
        backend: asked for, of ``torch.distributed``; ``None`` for any.

    Raises:
        WorldError: the job's process group has another backend.
    """
    found = str(dist.get_backend_config(dist.group.WORLD))
    if backend is not None and backend not in found:
        raise WorldError(
            f"backend={backend!r}, but torch.distributed is initialised in this process already, with {found}: drop the "
            f"argument, or call torch.distributed.init_process_group({backend!r})"
        )


def default_device() -> torch.device:
    """Returns the device of a rank in the initialised job: the current CUDA device under NCCL, else the CPU."""
    if torch.cuda.is_available() and backend_of(dist.group.WORLD, "cuda") == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _has_gpus_for(local_rank: int, local_size: int) -> bool:
    if not (torch.cuda.is_available() and dist.is_nccl_available()):
        return False
    return torch.cuda.device_count() >= max(local_size, local_rank + 1)
