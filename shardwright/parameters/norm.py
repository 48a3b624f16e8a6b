"""Computes the norm of all gradients and clips by it, with one small all-reduce. Parameters may have any layouts.

Each rank adds up what it holds; a piece that several ranks hold counts on the first of them. One number is reduced.
``torch.nn.utils.clip_grad_norm_`` is right on DTensors too, but dispatches on each of them, has no largest value of an empty
piece, and rounds the norm of every tensor of half precision to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import utils

from shardwright.base.torch_private import foreach_norm
from shardwright.errors import ShardwrightError
from shardwright.parameters.handles import current
from shardwright.parameters.ours import home_of, is_over_a_stage


class _Piece(NamedTuple):
    """Stand-in for a parameter, which torch clips."""

    grad: Tensor


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scales gradients so that their norm, as of one vector, is at most ``max_norm``.

    For ordinary tensors it is ``torch.nn.utils.clip_grad_norm_``. Of distributed parameters every logical element counts once,
    whichever ranks hold it, and ranks communicate once, or not at all where each holds everything. Every rank of the job makes
    the call.

    Args:
        parameters: with their gradients, whole or in pieces; those without a gradient are left out.
        max_norm: the largest norm allowed.
        norm_type: above 0; ``inf`` for the largest absolute value.
        error_if_nonfinite: whether to raise, on all ranks, where the norm is not finite.
        foreach: as in torch: whether to use the faster implementation; default: where possible.

    Returns:
        The norm before clipping, the same plain tensor on every rank; in float32 for gradients in half precision.

    Raises:
        RuntimeError: the norm is not finite, and ``error_if_nonfinite``. Nothing was changed.
        ShardwrightError: a gradient with a reduction pending; a ``norm_type`` that is not above 0.

    >>> weight = torch.nn.Parameter(torch.ones(4))
    >>> weight.grad = torch.full((4,), 3.0)
    >>> clip_grad_norm_([weight], 1.0), weight.grad.norm()
    (tensor(6.), tensor(1.0000))
    """
    found = [current(p) for p in ([parameters] if isinstance(parameters, Tensor) else parameters)]
    gradients = [p.grad for p in found if p.grad is not None]
    total = get_total_norm(gradients, norm_type, error_if_nonfinite, foreach)
    with torch.no_grad():
        pieces = [_Piece(_local(g)) for g in gradients]
        utils.clip_grads_with_norm_(pieces, max_norm, total, foreach)  # type: ignore[arg-type]
    return total


def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Computes the norm of tensors as of one vector, like ``torch.nn.utils.get_total_norm``.

    Args:
        tensors: ordinary or distributed tensors.
        norm_type, error_if_nonfinite, foreach: see :func:`clip_grad_norm_`.

    Raises:
        ShardwrightError: the order is not above 0. RuntimeError: the norm is not finite and that was to be an error.

    >>> get_total_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
    tensor(5.)
    """
    found = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    if not any(isinstance(t, DTensor) for t in found):
        return utils.get_total_norm(found, norm_type, error_if_nonfinite, foreach)
    norm_type = float(norm_type)
    if not norm_type > 0:
        raise ShardwrightError(f"get_total_norm(norm_type={norm_type}): give 1, 2 or another order above 0, or inf")
    dtype = max((_wide(t.dtype) for t in found), key=lambda d: d.itemsize)
    with torch.no_grad():
        total = _total(found, norm_type, foreach).to(dtype)
    if error_if_nonfinite and not bool(torch.isfinite(total)):
        raise RuntimeError(
            f"The total norm of order {norm_type} of the gradients is {float(total)}, so they cannot be clipped; look for "
            "what overflows, or set error_if_nonfinite=False to scale them all the same"
        )
    return total


def _total(tensors: Sequence[Tensor], order: float, foreach: bool | None) -> Tensor:
    device = _local(tensors[0]).device
    if all(map(_is_everywhere, tensors)):
        norms = _norms([_local(t) for t in tensors], order, foreach, device)
        return torch.linalg.vector_norm(norms, order) if norms.numel() else norms.sum()
    norms = _norms([_local(t) for t in tensors if _counts_here(t)], order, foreach, device)
    if math.isinf(order):
        largest = norms.max() if norms.numel() else norms.new_zeros(())
        both = torch.stack([largest.nan_to_num(0.0, posinf=math.inf), largest.isnan().double()])  # a maximum may lose nan
        dist.all_reduce(both, dist.ReduceOp.MAX)
        return torch.where(both[1] > 0, math.nan, both[0])
    power = norms.pow(order).sum()
    dist.all_reduce(power)
    return power.pow(1.0 / order)


def _norms(pieces: Sequence[Tensor], order: float, foreach: bool | None, device: torch.device) -> Tensor:
    """Computes the norm of each piece, in float64; leaves out those without elements."""
    by_dtype: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for piece in pieces:
        if piece.numel():
            by_dtype.setdefault((piece.dtype, piece.device), []).append(piece)
    norms: list[Tensor] = []
    for (dtype, _), alike in by_dtype.items():
        if foreach is False:
            norms += [torch.linalg.vector_norm(piece, order, dtype=_wide(dtype)) for piece in alike]
        else:
            norms += foreach_norm(alike, order, dtype=_wide(dtype))
    if not norms:
        return torch.empty(0, dtype=torch.float64, device=device)
    return torch.stack([n.to(device, torch.float64) for n in norms])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _is_everywhere(tensor: Tensor) -> bool:
    """Tells whether every rank of the job holds the whole of a tensor."""
    if not isinstance(tensor, DTensor) or tensor.device_mesh.size() != dist.get_world_size():
        return False
    return all(placement.is_replicate() for placement in tensor.placements)


def _counts_here(tensor: Tensor) -> bool:
    """Tells whether this rank is the first that holds its piece of a tensor."""
    if not isinstance(tensor, DTensor):
        return dist.get_rank() == 0
    mesh = tensor.device_mesh
    if any(placement.is_partial() for placement in tensor.placements):
        raise ShardwrightError(
            f"a gradient of shape {list(tensor.shape)} is {tensor.placements}: its sum over ranks is pending; reduce it first"
        )
    places = mesh.get_coordinate()
    if places is None or (is_over_a_stage(tensor) and home_of(tensor).is_copy):
        return False
    return all(place == 0 for place, placement in zip(places, tensor.placements, strict=True) if placement.is_replicate())
