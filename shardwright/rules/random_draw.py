"""Random draws: the random numbers that the single device would draw for the whole tensor.

Each function here draws exactly what the eager operator draws from the default generator of the device, for the whole
tensor of the given shape, strides, dtype and device: the order of draws follows the memory order, and their number the
dtype. Nothing here depends on the rank, so that every rank draws the same and its generator advances alike; each then
takes its own piece.

The cost is a transient tensor of global shape on every rank. Pieces are copies, so it is freed at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def filled(method: str, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: Any, *args: Any) -> Tensor:
    """Fills a new tensor by a random in-place method such as ``normal_``. It has this shape and memory order.

    Args:
        method: its name; positional arguments follow after ``device``.
        shape, stride: global shape and strides.
        dtype, device: of the tensor.

    >>> filled("random_", (2,), (1,), torch.int64, None, 5, 6)
    tensor([5, 5])
    """
    tensor = torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype, device=device)
    result: Tensor = getattr(tensor, method)(*args)
    return result


# -- dropout ----------------------------------------------------------------------------------------------------------


def dropout_noise(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: Any, p: float) -> Tensor:
    """Draws what eager dropout keeps of a tensor like this: ones and zeros in its dtype, or booleans from a fused kernel.

    On a CPU eager dropout is ``empty_like(x).bernoulli_(1 - p)``, on CUDA it is ``native_dropout``, whose draws are its
    own (ATen, ``Dropout.cpp``).

    Args:
        shape, stride: global shape and strides.
        dtype, device: of the tensor.
        p: the probability to drop an element.
    """
    like = torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype, device=device)
    if like.device.type in ("cpu", "mps"):
        return torch.empty_like(like).bernoulli_(1 - p)
    return torch.native_dropout(like, p, True)[1]


def apply_dropout(x: Tensor, noise: Tensor, p: float) -> Tensor:
    """Sets dropped elements of ``x`` to zero and scales the rest, rounding as eager dropout."""
    if noise.dtype == torch.bool:
        return apply_native(x, noise, p)
    return x * (noise / (1 - p))


def whole_dropout(x: Tensor, stride: Sequence[int], p: float) -> Tensor:
    """Computes dropout of a whole tensor that the single device has with these strides."""
    if x.stride() == tuple(stride):
        return torch.dropout(x, p, True)
    return apply_dropout(x, dropout_noise(x.shape, stride, x.dtype, x.device, p), p)


def feature_noise(shape: Sequence[int], dtype: torch.dtype, device: Any, p: float) -> Tensor:
    """Draws what eager feature dropout keeps: one number for each of the first two dims, size 1 in the others.

    Args:
        shape: global shape.
        dtype, device: of the tensor.
        p: the probability to drop a feature.
    """
    size = [*shape[:2], *([1] * (len(shape) - 2))]
    return torch.empty(size, dtype=dtype, device=device).bernoulli_(1 - p)


def alpha_noise(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: Any, p: float) -> Tensor:
    """Draws what eager alpha dropout keeps: ones and zeros.

    Args:
        shape, stride: global shape and strides.
        dtype, device: of the tensor.
        p: the probability to drop an element.
    """
    like = torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype, device=device)
    return torch.empty_like(like).bernoulli_(1 - p)


def apply_alpha(x: Tensor, noise: Tensor, p: float) -> Tensor:
    """Computes alpha dropout of ``x``, in the order in which eager mode computes it.

    Source: Klambauer et al., "Self-Normalizing Neural Networks", 2017; ATen, ``Dropout.cpp``.
    """
    alpha = 1.7580993408473766
    a = 1 / math.sqrt((alpha * alpha * p + 1) * (1 - p))
    shift = (noise - 1).mul_(alpha * a).add_(alpha * a * p)
    return x * (noise * a) + shift


def native_mask(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: Any, p: float) -> Tensor:
    """Draws the boolean mask of ``native_dropout`` for a tensor like this.

    Args:
        shape, stride: global shape and strides.
        dtype, device: of the tensor.
        p: the probability to drop an element.
    """
    like = torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype, device=device)
    if like.device.type == "cpu":
        return torch.empty_like(like, dtype=torch.bool).bernoulli_(1 - p)
    return torch.native_dropout(like, p, True)[1]


def apply_native(x: Tensor, mask: Tensor, p: float) -> Tensor:
    """Computes ``native_dropout`` of ``x`` with this mask; its gradient too."""
    result: Tensor = _NativeDropout.apply(x, mask, 0.0 if p == 1 else 1 / (1 - p))
    return result


class _NativeDropout(torch.autograd.Function):
    """Rounds as ATen's ``native_dropout`` and its backward do. In the forward, a CPU first rounds the scale to the dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.scale = scale
        if x.device.type == "cpu":
            return x * (mask.to(x.dtype) * scale)
        return (x * mask) * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        (mask,) = ctx.saved_tensors
        return torch.ops.aten.native_dropout_backward(gradient, mask, ctx.scale), None, None


# -- draws that depend on values --------------------------------------------------------------------------------------


def in_order(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Copies a tensor to this memory order, in which random operators draw."""
    if x.stride() == tuple(stride):
        return x
    return torch.empty_strided(x.shape, tuple(stride), dtype=x.dtype, device=x.device).copy_(x)


# The functions here that draw and read no tensor.
DRAWS = frozenset({filled, dropout_noise, feature_noise, native_mask, alpha_noise})
