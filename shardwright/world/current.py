"""The current world: the only global state of the package."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Union

from shardwright.errors import WorldError
from shardwright.world.simulated import SimulatedWorld

if TYPE_CHECKING:
    from shardwright.world.distributed import DistributedWorld

World = Union[SimulatedWorld, "DistributedWorld"]

_current: list[World] = []


def init(devices: int | None = None) -> World:
    """Sets up the world: ``devices`` simulated ranks in this process, or the real job that this process is part of.

    Args:
        devices: number of ranks to simulate. Default: the job that ``torchrun`` describes in the environment, else
            ``SHARDWRIGHT_DEVICES`` simulated ranks, else one. Within a real job the job's size wins; asking for
            another is an error.

    Returns:
        The world, with ``size``, ``rank`` and ``is_simulated``.

    Raises:
        WorldError: not a positive int, or not the size of the job.

    >>> init(devices=8).size
    8
    """
    if devices is not None and (not isinstance(devices, int) or isinstance(devices, bool) or devices < 1):
        raise WorldError(f"devices={devices!r}: give the number of ranks to simulate, init(devices=8)")
    world = _found(devices)
    _current[:] = [world]
    return world


def _found(devices: int | None) -> World:
    if _in_job():
        from shardwright.world.distributed import DistributedWorld

        world = DistributedWorld.from_environment()
        if devices is not None and devices != world.size:
            raise WorldError(
                f"init(devices={devices}) within a job of {world.size} ranks: drop the argument, or start {devices} ranks"
            )
        return world
    if devices is None:
        text = os.environ.get("SHARDWRIGHT_DEVICES", "1")
        if not text.isdigit() or int(text) < 1:
            raise WorldError(f"SHARDWRIGHT_DEVICES={text!r}: set it to the number of ranks to simulate")
        devices = int(text)
    return SimulatedWorld(devices)


def _in_job() -> bool:
    import torch.distributed as dist

    started = dist.is_available() and dist.is_initialized()
    return started or {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ)


def current_world() -> World:
    """The world that :func:`init` set up; found from the environment at the first use."""
    if not _current:
        init()
    return _current[0]
