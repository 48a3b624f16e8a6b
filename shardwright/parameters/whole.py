"""Gathers whole values of parameters, or materialises those that are delayed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shardwright.agreement.job_watch import note, why_alone
from shardwright.errors import WorldError
from shardwright.ir.layout import Layout
from shardwright.parameters.delayed.recorder import is_delayed
from shardwright.parameters.delayed.replay import materialise
from shardwright.parameters.handles import current
from shardwright.parameters.ours import home_of, is_ours, is_over_a_stage, is_part, view_of
from shardwright.parameters.placements import layout_of
from shardwright.parameters.places import place_of_spec


def materialise_whole(root: nn.Module) -> None:
    """Gives delayed parameters and buffers their whole values, as the simulated world holds global tensors."""
    wanted = {n: t for n, t in [*root.named_parameters(), *root.named_buffers()] if is_delayed(t)}
    if not wanted:
        return
    values = materialise(wanted, lambda name, value: value.clone())
    for name, tensor in wanted.items():
        if isinstance(tensor, nn.Parameter):
            made = nn.Parameter(values[name], requires_grad=tensor.requires_grad)
            made.__class__ = type(tensor)  # with what the user hung on it
            vars(made).update(vars(tensor))
            torch.utils.swap_tensors(tensor, made)
        else:
            torch.utils.swap_tensors(tensor, values[name])


def full_value(parameter: torch.Tensor) -> torch.Tensor:
    """Returns the whole tensor, detached, on every rank; every rank of the mesh makes this call.

    Args:
        parameter: a DTensor of any placements. An ordinary tensor is returned as it is, detached.

    Returns:
        A tensor of the global shape.

    >>> full_value(nn.Parameter(torch.ones(2)))
    tensor([1., 1.])
    """
    return whole_value(current(parameter), "full_value")


def whole_buffers(root: nn.Module) -> None:
    """Gives a module whole ordinary buffers in the place of those that were computed from distributed parameters."""
    for module in root.modules():
        for key, buffer in module._buffers.items():
            if is_ours(buffer):
                module._buffers[key] = whole_value(buffer, f"buffer {key}").clone()  # type: ignore[arg-type]


def whole_value(value: torch.Tensor, what: str) -> torch.Tensor:
    """Returns the whole value of a tensor, detached; where ranks hold parts of it, every rank of its mesh makes this call.

    Args:
        value: a DTensor of any placements, or an ordinary tensor.
        what: what the value is needed for, which other ranks are told if they wait for this one in vain.

    Returns:
        New memory where ranks hold parts, else the tensor's own.

    Raises:
        WorldError: another rank does not take part.
    """
    if not isinstance(value, DTensor):
        return value.detach()
    view = view_of(value)
    if view is not None:
        return view.of_whole(whole_value(view.base, what))
    if is_over_a_stage(value):
        return _whole_of_stage(value, what)
    local = value._local_tensor.detach()
    if not is_part(value):
        return local
    if value.device_mesh.size() == dist.get_world_size():
        note(f"{what} of a distributed tensor {list(value.shape)}")
    layout = layout_of(value)
    try:
        if layout is not None:
            return _gathered(local, layout, tuple(value.shape), value.device_mesh)
        return _reduced(value)
    except RuntimeError as error:  # of communication: another rank has gone, or does something else
        said = why_alone(error)
        if not said:
            raise
        raise WorldError(f"{what} of a distributed tensor {list(value.shape)} needs every rank: {said}") from error


def _whole_of_stage(value: DTensor, what: str) -> torch.Tensor:
    """Gathers a tensor on the ranks of its stage, and sends it to all others."""
    note(f"{what} of a distributed tensor {list(value.shape)}")
    layout, shape = layout_of(value), tuple(value.shape)
    whole = torch.empty(shape, dtype=value.dtype, device=value._local_tensor.device)
    if value.device_mesh.get_coordinate() is not None:
        assert layout is not None
        local = value._local_tensor.detach()
        whole.copy_(_gathered(local, layout, shape, value.device_mesh) if is_part(value) else local)
    dist.broadcast(whole.view(-1).view(torch.uint8), home_of(value).rank)
    return whole


def _gathered(piece: torch.Tensor, layout: Layout, shape: tuple[int, ...], mesh: DeviceMesh) -> torch.Tensor:
    """Undoes the splits of every dim, least significant axis first, with one gather each."""
    rank, dims = dist.get_rank(), [list(axes) for axes in layout.bound]
    for dim, axes in enumerate(dims):
        while axes:
            here, axis = Layout.of(layout.mesh, dims), axes.pop()
            group = layout.mesh.group_of(rank, (axis,))
            shapes = [here.local_shape(shape, member) for member in group]
            sent = piece.new_zeros(max(map(math.prod, shapes)))
            sent[: piece.numel()] = piece.flatten()
            parts = [torch.empty_like(sent) for _ in group]
            process_group = mesh.get_group(layout.mesh.axes.index(axis))
            dist.all_gather([part.view(torch.uint8) for part in parts], sent.view(torch.uint8), group=process_group)
            piece = torch.cat([part[: math.prod(s)].view(s) for part, s in zip(parts, shapes)], dim)
    return piece


def whole_numbers(numbers: Sequence[torch.Tensor], what: str) -> dict[int, torch.Tensor]:
    """Returns whole values of numbers of which ranks hold terms, such as norms, with one gather for all.

    Args:
        numbers: any tensors; those with dims, and those of which ranks hold all, are left out.
        what: see :func:`whole_value`.

    Returns:
        The values by id of the tensor. Nothing where there is at most one.
    """
    alike: dict[Any, list[DTensor]] = {}
    for tensor in numbers:
        place = place_of_spec(tensor) if isinstance(tensor, DTensor) else None
        if place is not None and place.is_part and not place.is_cut and not tensor.dim():
            alike.setdefault((place, tensor.dtype), []).append(tensor)  # type: ignore[arg-type]
    found: dict[int, torch.Tensor] = {}
    for tensors in alike.values():
        if len(tensors) > 1:
            terms = torch.stack([t._local_tensor.detach() for t in tensors])
            mesh, split = tensors[0].device_mesh, tensors[0].placements
            values = whole_value(DTensor.from_local(terms, mesh, split, run_check=False), what)
            found.update(zip(map(id, tensors), values.unbind()))
    return found


# How terms that ranks hold become the value, by the name of the reduction.
_REDUCTIONS = {"sum": torch.sum, "avg": torch.mean, "max": torch.amax, "min": torch.amin, "product": torch.prod}


def _reduced(value: DTensor) -> torch.Tensor:
    """Gathers the terms of a value of which ranks hold terms, such as norms, and reduces them."""
    found = value._local_tensor.detach()
    if not all(p.is_partial() or p.is_replicate() for p in value.placements):
        with torch.no_grad():
            return DTensor.full_tensor(value)
    for dim, placement in enumerate(value.placements):
        if placement.is_partial():
            terms = [torch.empty_like(found) for _ in range(value.device_mesh.size(dim))]
            dist.all_gather(terms, found.contiguous(), group=value.device_mesh.get_group(dim))
            order = getattr(placement, "norm_type", None)
            if order is not None:
                found = torch.linalg.vector_norm(torch.stack(terms), order, dim=0)
            else:
                found = _REDUCTIONS[placement.reduce_op](torch.stack(terms), dim=0)  # type: ignore[attr-defined,operator]
    return found
