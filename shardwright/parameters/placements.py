"""Converts layouts to DTensor placements, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from shardwright.base.torch_private import StridedShard
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.ir.pieces import chunk_pieces
from shardwright.parameters.handles import current


@lru_cache(maxsize=65536)
def placements(layout: Layout, shape: tuple[int, ...]) -> tuple[Placement, ...] | None:
    """Returns the DTensor placements, one per mesh axis, that mean the same as a layout.

    Args:
        layout: where the pieces of the tensor are.
        shape: global shape.

    Returns:
        ``Shard``, ``Replicate`` and, for axes in another order than the mesh's, ``_StridedShard``. ``None`` where
        DTensor has no words for it: explicit piece sizes, pending reductions, a split over an axis along which the
        ranks do not ascend (process groups order their ranks), some uneven splits in another order.

    Raises:
        LayoutError: the layout has another number of dims than the shape.

    >>> layout = Layout((2, 2), ("dp", "mp"))
    >>> placements(layout("mp", "None"), (4, 4))
    (Replicate(), Shard(dim=0))
    >>> placements(layout("mp>dp", "None"), (4, 4))
    (_StridedShard(dim=0, sf=2), Shard(dim=0))
    """
    layout.bounds(shape)
    layout, mesh = layout.normal(shape), layout.mesh
    if layout.partial or any(sizes is not None for sizes in layout.sizes):
        return None
    if not all(_ascends(mesh, axis) for axis in layout.split_axes):
        return None
    found: list[Placement] = [Replicate() for _ in mesh.axes]
    for dim, axes in enumerate(layout.bound):
        order = [mesh.axes.index(axis) for axis in axes]
        factors = [math.prod(mesh.sizes[j] for j in order[:i] if j > at) for i, at in enumerate(order)]
        for at, factor in zip(order, factors):
            found[at] = Shard(dim) if factor == 1 else StridedShard(dim, split_factor=factor)
        steps = sorted((at, mesh.sizes[at], factor) for at, factor in zip(order, factors))
        if order != sorted(order) and not _same_pieces(layout, dim, shape, steps):
            return None
    return tuple(found)


def _ascends(mesh: Mesh, axis: str) -> bool:
    return all(group == sorted(group) for group in mesh.groups((axis,)))


def _same_pieces(layout: Layout, dim: int, shape: tuple[int, ...], steps: Sequence[tuple[int, int, int]]) -> bool:
    """Tells whether DTensor's strided splits of ``dim`` give the layout's pieces.

    Args:
        layout: the layout.
        dim: the dim.
        shape: global shape.
        steps: the splits, as (place in the mesh, count, factor).
    """
    pieces = [torch.arange(shape[dim])]
    for _, count, factor in steps:
        pieces = [piece for whole in pieces for piece in _strided_split(whole, count, factor)]
    mesh = layout.mesh
    for rank, bounds in layout.bounds(shape).items():
        at, coordinates = 0, mesh.coordinates(rank)
        for place, count, _ in steps:
            at = at * count + coordinates[mesh.axes[place]]
        if not torch.equal(pieces[at], torch.arange(*bounds[dim])):
            return False
    return True


def _strided_split(whole: torch.Tensor, count: int, factor: int) -> list[torch.Tensor]:
    parts = whole.split(chunk_pieces(len(whole), (factor,)))
    split = [part.split(chunk_pieces(len(part), (count,))) for part in parts]
    return [torch.cat([pieces[i] for pieces in split]) for i in range(count)]


def storable(layout: Layout, shape: Sequence[int]) -> Layout:
    """Returns the layout itself if DTensor can express it, else the nearest possible.

    Nearest means: first without explicit piece sizes, then with the axes of every dim in the mesh's order, then without the
    axes along which ranks do not ascend. The caller redistributes from it where the parameter is used.

    >>> layout = Layout.parse("mp[3 1],None @ dp=2,mp=2")
    >>> storable(layout, (4, 2)).short()
    'mp,None'
    """
    shape, mesh = tuple(shape), layout.mesh
    plain = Layout.of(mesh, layout.bound)
    ordered = Layout.of(mesh, [mesh.ordered(axes) for axes in layout.bound])
    for candidate in (layout, plain, ordered):
        if placements(candidate, shape) is not None:
            return candidate
    return Layout.of(mesh, [[a for a in axes if _ascends(mesh, a)] for axes in ordered.bound])


def stored_layouts(root: nn.Module) -> dict[str, Layout]:
    """Returns the layout of every distributed parameter of a module, under each of its names."""
    named = root.named_parameters(remove_duplicate=False)
    return {name: layout for name, parameter in named if (layout := layout_of(parameter))}


def layout_of(parameter: torch.Tensor) -> Layout | None:
    """Returns the layout in which a DTensor is stored, without axes of size 1; ``None`` for any other tensor.

    It is read from the DTensor itself, so it stays right whatever replaced the parameter: a cast, a copy, a checkpoint.
    """
    parameter = current(parameter)
    if not isinstance(parameter, DTensor):
        return None
    return _layout_of(parameter.device_mesh, parameter.placements, parameter.dim())


@lru_cache(maxsize=4096)
def _layout_of(mesh: DeviceMesh, split: tuple[Placement, ...], ndim: int) -> Layout | None:
    """Inverts :func:`placements`; ``None`` for meshes without names and placements that no layout means."""
    dims: list[list[int]] = [[] for _ in range(ndim)]
    for at in reversed(range(len(split))):
        placement = split[at]
        if not isinstance(placement, (Shard, StridedShard)):
            if not placement.is_replicate():
                return None
            continue
        factor = int(placement.split_factor) if isinstance(placement, StridedShard) else 1
        order, place = dims[placement.dim], 0
        while place < len(order) and math.prod(mesh.size(i) for i in order[:place]) < factor:
            place += 1
        if math.prod(mesh.size(i) for i in order[:place]) != factor:
            return None
        order.insert(place, at)
    names = mesh.mesh_dim_names or ()
    if len(names) != mesh.ndim:
        return None
    over = Mesh(names, tuple(mesh.shape), tuple(mesh.mesh.flatten().tolist()))
    return Layout.of(over, [[names[i] for i in order if mesh.size(i) > 1] for order in dims])


def _slice(value: torch.Tensor, layout: Layout, device: torch.device) -> torch.Tensor:
    """Copies this rank's piece of a whole value."""
    bounds = layout.bounds(value.shape).get(dist.get_rank())
    if bounds is None:  # another stage's
        return value.new_empty(0, device=device)
    piece = value.detach()[tuple(slice(*ends) for ends in bounds)]
    return piece.to(device, copy=True, memory_format=torch.contiguous_format)


def _as_dtensor(piece: torch.Tensor, layout: Layout, shape: torch.Size, mesh: DeviceMesh) -> DTensor:
    split = placements(layout, tuple(shape))
    strides = [math.prod(max(size, 1) for size in shape[dim + 1 :]) for dim in range(len(shape))]
    return _over(piece, mesh, split, shape, strides)


def _over(
    piece: torch.Tensor, mesh: DeviceMesh, split: Sequence[Placement] | None, shape: Sequence[int], strides: Sequence[int]
) -> DTensor:
    """Makes a DTensor of a local tensor; on ranks outside of the mesh one without elements, or a number 0."""
    wanted = torch.Size(shape)
    made = DTensor.from_local(piece, mesh, split, run_check=False, shape=wanted, stride=tuple(strides))
    if wanted or mesh.get_coordinate() is not None:
        return made
    spec = copy(made._spec)  # of a scalar, where another stage holds it: from_local takes shape=() for none
    assert spec.tensor_meta is not None
    spec.tensor_meta = spec.tensor_meta._replace(shape=wanted, stride=tuple(strides))
    return DTensor(piece.new_zeros(()), spec, requires_grad=False)  # type: ignore[call-arg]


def _like(parameter: torch.Tensor, value: torch.Tensor) -> DTensor:
    """Makes a DTensor of a whole value that all ranks have. It is sliced like the parameter if it has its shape."""
    assert isinstance(parameter, DTensor)
    layout = layout_of(parameter)
    assert layout is not None
    if value.shape != parameter.shape:
        layout = Layout.replicated(layout.mesh, value.dim())
    device = parameter.to_local().device
    return _as_dtensor(_slice(value, layout, device), layout, value.shape, parameter.device_mesh)


def _alike(parameter: DTensor, piece: torch.Tensor) -> DTensor:
    """Makes a DTensor of a local tensor, with the parameter's shape and placements; differentiable."""
    shape, stride = parameter.shape, parameter.stride()
    mesh, split = parameter.device_mesh, parameter.placements
    return _over(piece, mesh, split, shape, stride)
