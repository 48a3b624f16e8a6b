"""Local functions of per-rank programs.

No rank may leave out a part of the backward pass: others wait for what it sends there. So a value that a rank does not use
gets a gradient of zeros, where autograd would give none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def copy_for(x: Tensor, rank: int) -> Tensor:
    """Copies a tensor for one rank."""
    return x.clone()


@torch.no_grad()
def scaled_value(x: Tensor, scale: float) -> Tensor:
    """Multiplies a tensor by a number, without a gradient."""
    return x * scale


def chosen(index: int, *values: Tensor) -> Tensor:
    """Returns one of several values; the others get a gradient of zeros, for other ranks wait for theirs."""
    result: Tensor = _Chosen.apply(index, *values)
    return result


class _Chosen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, index: int, *values: Tensor) -> Tensor:
        ctx.index, ctx.shapes = index, [value.shape for value in values]
        return values[index].view_as(values[index])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return None, *(gradient if i == ctx.index else gradient.new_zeros(s) for i, s in enumerate(ctx.shapes))


def next_seed() -> Tensor:
    """Draws a number that is the same on all ranks."""
    return torch.randint(1 << 62, (), device="cpu")


def drawn(function: Any, seed: Tensor, stream: int, *args: Any, **kwargs: Any) -> Any:
    """Calls a function whose random numbers come from a seed and a stream; the generators are left as they were."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(int(seed) + stream)
        return function(*args, **kwargs)


def shared(x: Tensor, share: float) -> Tensor:
    """Returns the tensor itself, whose gradient is divided: several ranks each take a share of it."""
    result: Tensor = _Shared.apply(x, share)
    return result


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        ctx.share = share
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.share, None
