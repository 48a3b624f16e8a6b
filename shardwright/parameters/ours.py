"""Tells distributed tensors over our meshes from those of others, and keeps what views of them were made of.

A view of a distributed tensor cannot share the memory of pieces that other ranks hold. It holds a copy, and remembers what it
was made of and how: whoever reads it makes it anew, and what is written into it is written into that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shardwright.base.torch_private import StorageWeakRef

_meshes: set[DeviceMesh] = set()
_homes: dict[int, tuple[StorageWeakRef, StageHome]] = {}  # by memory
OF_ALL = ("all_ranks",)  # the name of the dim of the mesh of a whole job
_MOST_HOMES = 4096  # after which those of memory that is gone are forgotten
_VIEW, _WHOLE, _HOME = "_shardwright_view_of", "_shardwright_whole", "_shardwright_home"


class View(NamedTuple):
    """Origin of a view: what it was made of, and the function that makes it from the whole value of that."""

    base: DTensor
    of_whole: Callable[[Tensor], Tensor]


class StageHome(NamedTuple):
    """The first rank of the stage that a parameter is at home in, and whether this rank's stage only has a copy of it."""

    rank: int
    is_copy: bool


def remember_home(value: DTensor, home: StageHome) -> None:
    """Records where a parameter, or its gradient, is at home. What shares its memory is at home there too."""
    vars(value)[_HOME] = home
    if len(_homes) > _MOST_HOMES:
        for key, (known, _) in list(_homes.items()):
            if known.expired():
                del _homes[key]
    reference = StorageWeakRef(value._local_tensor.untyped_storage())
    _homes[reference.cdata] = reference, home


def has_homes() -> bool:
    """Tells whether this rank has copies of what other stages have."""
    return bool(_homes)


def at_home_with(value: DTensor, other: DTensor) -> None:
    """Records that a value, computed of another one, is at home where that is: other ranks send and receive it so."""
    home = home_of(other) if is_over_a_stage(other) and is_over_a_stage(value) else None
    if home is not None and home.rank != _first_rank(value):
        remember_home(value, home)


def _first_rank(value: DTensor) -> int:
    return int(value.device_mesh.mesh.flatten()[0])


def home_of(value: DTensor) -> StageHome:
    """Returns where a tensor over the ranks of a stage is at home."""
    found: StageHome | None = vars(value).get(_HOME)
    if found is None and _homes:
        reference, home = _homes.get(value._local_tensor.untyped_storage()._cdata, (None, None))
        found = home if reference is not None and not reference.expired() else None
    return found or StageHome(_first_rank(value), False)


def is_over_a_stage(value: DTensor) -> bool:
    """Tells whether a tensor is over one of our meshes that has not all ranks of the job: a stage of a pipeline."""
    return value.device_mesh in _meshes and value.device_mesh.size() != dist.get_world_size()


def watch_over(mesh: DeviceMesh) -> None:
    """Registers a mesh as ours."""
    _meshes.add(mesh)


def mesh_of_all_ranks(device_type: str) -> DeviceMesh:
    """Returns the mesh of all ranks of the job in a row, which jobs with stages have."""
    return next(m for m in _meshes if m.mesh_dim_names == OF_ALL and m.device_type == device_type)


def is_ours(value: Any) -> bool:
    """Tells whether a tensor is distributed over one of our meshes."""
    return isinstance(value, DTensor) and value.device_mesh in _meshes


def is_part(value: DTensor) -> bool:
    """Tells whether a rank holds less than the value of a distributed tensor: a piece, or a term of a sum."""
    mesh = value.device_mesh
    return any(not p.is_replicate() and mesh.size(i) > 1 for i, p in enumerate(value.placements))


def view_of(value: Tensor) -> View | None:
    """Returns what a view that holds a copy was made of; ``None`` for other tensors."""
    found: View | None = vars(value).get(_VIEW)
    return found


def remember_view(value: Tensor, view: View) -> None:
    """Records what a view was made of."""
    vars(value)[_VIEW] = view


def is_whole_copy(value: Any) -> bool:
    """Tells whether a parameter stands for a distributed one within a block of ``net.whole()``."""
    return isinstance(value, Tensor) and vars(value).get(_WHOLE) is True


def remember_whole_copy(value: Tensor) -> None:
    """Records that a parameter stands for a distributed one."""
    vars(value)[_WHOLE] = True
