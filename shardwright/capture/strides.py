"""Strides: the memory order of what an operator makes, where the shape functions of torch say another.

Random numbers are drawn in memory order, so a mask depends on the strides of what it is drawn for. For most operators the
shape function knows them; here are those whose kernels decide otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

# Operators that make new memory on a CPU in the format that their input suggests: channels last, or else contiguous.
_IN_SUGGESTED_FORMAT = frozenset({
    "batch_norm", "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_functional",
    "_batch_norm_with_update",
    "channel_shuffle", "max_pool1d", "max_unpool2d",
})  # fmt: skip
# Operators of two tensors whose kernels order dims as those of a sum do.
_AS_A_SUM = frozenset({
    "copysign", "floor_divide", "heaviside", "logaddexp", "logaddexp2", "logical_and", "logical_or", "logical_xor",
    "special_xlog1py", "special_xlogy", "xlogy", "div", "divide",
})  # fmt: skip


def strides_made(overload: Any, inputs: Sequence[Tensor], output: Tensor) -> tuple[int, ...] | None:
    """The strides of an operator's first output; ``None`` where the shape function is right.

    >>> x = torch.empty(4, 6, 5, device="meta").transpose(1, 2)
    >>> strides_made(aten.batch_norm.default, [x], torch.empty_like(x))
    (30, 6, 1)
    """
    name = overload.overloadpacket.__name__
    if name in _AS_A_SUM and len(inputs) == 2:
        first, second = (torch.empty_strided(t.shape, t.stride(), device="meta") for t in inputs)
        return torch.add(first, second).stride()
    if name == "log_sigmoid" and output.device.type != "cuda":
        return torch.empty(output.shape, device="meta").stride()
    if name in _IN_SUGGESTED_FORMAT and inputs and output.device.type != "cuda":
        return torch.empty(output.shape, device="meta", memory_format=_suggested(inputs[0])).stride()
    return None


def _suggested(x: Tensor) -> torch.memory_format:
    """The memory format that torch's kernels read off a tensor's strides."""
    for ndim, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        like = torch.empty_strided(x.shape, x.stride(), device="meta")
        if x.ndim == ndim and like.is_contiguous(memory_format=memory_format) and not like.is_contiguous():
            return memory_format
    return torch.contiguous_format
