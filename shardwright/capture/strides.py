"""Strides of operators' outputs where torch's shape functions are wrong about them.

Random numbers are drawn in memory order, so a mask depends on the strides of what it is drawn for. For most operators the
shape function knows them; :mod:`shardwright.base.operators` has those whose kernels decide otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardwright.base.operators import memory_order


def strides_made(overload: Any, inputs: Sequence[Tensor], output: Tensor) -> tuple[int, ...] | None:
    """Computes the strides of an operator's first output. Returns ``None`` where the shape function is right.

    >>> x = torch.empty(4, 6, 5, device="meta").transpose(1, 2)
    >>> strides_made(torch.ops.aten.batch_norm.default, [x], torch.empty_like(x))
    (30, 6, 1)
    """
    order = memory_order(overload)
    if order == "as a sum" and len(inputs) == 2:
        first, second = (torch.empty_strided(t.shape, t.stride(), device="meta") for t in inputs)
        return torch.add(first, second).stride()
    if order == "contiguous" and output.device.type != "cuda":
        return torch.empty(output.shape, device="meta").stride()
    if order == "suggested" and inputs and output.device.type != "cuda":
        return torch.empty(output.shape, device="meta", memory_format=_suggested(inputs[0])).stride()
    return None


def _suggested(x: Tensor) -> torch.memory_format:
    """Returns the memory format that torch's kernels derive from a tensor's strides."""
    for ndim, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        like = torch.empty_strided(x.shape, x.stride(), device="meta")
        if x.ndim == ndim and like.is_contiguous(memory_format=memory_format) and not like.is_contiguous():
            return memory_format
    return torch.contiguous_format
