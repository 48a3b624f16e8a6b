"""Converts our meshes to torch's, and registers them for the checks of distributed tensors."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from shardwright.base.torch_private import job_timeout, set_group_timeout
from shardwright.ir.mesh import Mesh
from shardwright.parameters.dtensors import teach
from shardwright.parameters.ours import watch_over


def device_mesh(mesh: Mesh, device_type: str) -> DeviceMesh:
    """Returns the one DeviceMesh of a mesh and a device type. It lives as long as the process group.

    Args:
        mesh: its axis names become the names of the DeviceMesh's dims; its ranks keep their places.
        device_type: ``"cpu"``, ``"cuda"``, ….

    Returns:
        The same object every time. The first call creates process groups, so every rank of the job makes it.
    """
    return _device_mesh(mesh, device_type, dist.group.WORLD)


@lru_cache(maxsize=64)
def _device_mesh(mesh: Mesh, device_type: str, world: object) -> DeviceMesh:
    made = DeviceMesh(device_type, torch.tensor(mesh.ranks).view(mesh.sizes), mesh_dim_names=mesh.axes)
    timeout = job_timeout(device_type)
    if timeout is not None and dist.get_rank() in mesh.ranks:
        for dim in range(made.ndim):
            set_group_timeout(timeout, made.get_group(dim))
    watch_over(made)
    teach()
    return made
