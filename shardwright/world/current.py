"""Current world, the only global state of the package."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from shardwright.errors import ArgumentTypeError, WorldError
from shardwright.world.job.found import find_job
from shardwright.world.job.mpi import is_started_by_mpirun
from shardwright.world.simulated.world import SimulatedWorld
from shardwright.world.world import World as World

_BACKENDS = ("nccl", "gloo", "mpi")

_current: list[World] = []


def init(
    devices: int | None = None,
    timeout: float | timedelta | None = None,
    check_weights: int | None = None,
    backend: str | None = None,
) -> World:
    """Sets up the world: ``devices`` simulated ranks in this process, or the job that this process is part of.

    Args:
        devices: number of ranks to simulate. Default: the job that a launcher describes in the environment (torchrun,
            a rank table, a dynamic cluster, mpirun, Slurm), else ``SHARDWRIGHT_DEVICES`` simulated ranks, else one. In a
            real job it may only be the job's size.
        timeout: how long a rank of a real job waits for the others, in seconds or as a ``timedelta``: in any collective, and
            where ranks compare what they do. Default: torch's, half an hour. Of no effect on simulated ranks.
        check_weights: after how many calls of nets the ranks of a real job compare all weights that each of them holds
            whole; one that differs is refused by name. Default: an eighth of them at every 64th call.
        backend: what moves the tensors of a real job: ``"nccl"``, ``"gloo"``, or ``"mpi"`` for tensors on the CPU in a job that
            mpirun has started. Default: NCCL where every rank has a GPU, else gloo.

    Returns:
        The world, with ``size``, ``rank`` and ``is_simulated``.

    Raises:
        WorldError: not a positive int, or not the size of the job; an invalid timeout or number of calls; some of a
            job's variables missing; an unknown backend, or one that this job cannot have.

    >>> init(devices=8).size
    8
    """
    if devices is not None and (not isinstance(devices, int) or isinstance(devices, bool) or devices < 1):
        raise WorldError(f"devices={devices!r}: give the number of ranks to simulate, init(devices=8)")
    is_count = isinstance(check_weights, int) and not isinstance(check_weights, bool) and check_weights > 0
    if check_weights is not None and not is_count:
        raise WorldError(f"init(check_weights={check_weights!r}): give a number of calls above 0, init(check_weights=8)")
    if backend not in (None, *_BACKENDS):
        named = ", ".join(f"init(backend={name!r})" for name in _BACKENDS)
        raise WorldError(f"init(backend={backend!r}): there is no such backend; write {named}, or leave it out")
    world = _found(devices, _checked_timeout(timeout), check_weights, backend)
    _current[:] = [world]
    return world


def _checked_timeout(timeout: Any) -> timedelta | None:
    if timeout is None:
        return None
    is_number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    if not is_number and not isinstance(timeout, timedelta):
        raise ArgumentTypeError(f"init(timeout={timeout!r}): give seconds, init(timeout=120), or a timedelta")
    seconds = timeout if is_number else timeout.total_seconds()
    if not 0.001 <= seconds <= 1e9:  # a NaN is refused too
        raise WorldError(f"init(timeout={timeout!r}): give a number of seconds above 0, init(timeout=120)")
    return timedelta(seconds=seconds)


def _found(devices: int | None, timeout: timedelta | None, check_weights: int | None, backend: str | None) -> World:
    if _in_job():
        from shardwright.world.distributed.world import DistributedWorld

        world = DistributedWorld.from_environment(backend, timeout)
        world.check_weights = check_weights
        if devices is not None and devices != world.size:
            raise WorldError(
                f"init(devices={devices}) within a job of {world.size} ranks: drop the argument, or start {devices} ranks"
            )
        return world
    if backend == "mpi" and not is_started_by_mpirun(os.environ):
        raise WorldError(
            "init(backend='mpi') needs a job that mpirun has started: mpirun -n 4 python train.py, with pip install "
            "'shardwright[mpi]'; without the argument, ranks are simulated"
        )
    if devices is None:
        text = os.environ.get("SHARDWRIGHT_DEVICES", "1")
        if not text.isdigit() or int(text) < 1:
            raise WorldError(f"SHARDWRIGHT_DEVICES={text!r}: set it to the number of ranks to simulate")
        devices = int(text)
    return SimulatedWorld(devices)


def _in_job() -> bool:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return True
    return find_job(os.environ) is not None


def current_world() -> World:
    """Returns the world that :func:`init` set up; without one, sets it up from the environment."""
    if not _current:
        init()
    return _current[0]
