"""Stand-ins for fused kernels that other devices have and CPUs do not.

Local calls are run on fake CPU tensors, where such an operator is decomposed and keeps more than the kernel does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shardwright.ir.operator import OpOverload
from shardwright.rules.traits import traits_of


class _FusedKernel(torch.autograd.Function):
    """Keeps its tensors, its result where asked, and one number per row."""

    @staticmethod
    def forward(ctx: Any, keeps_result: bool, *tensors: Tensor | None) -> Tensor:
        first = tensors[0]
        assert first is not None
        last = tensors[2] if keeps_result and tensors[2] is not None else first
        result = first.new_empty((*first.shape[:-1], last.shape[-1]))
        rows = first.new_empty(first.shape[:-1], dtype=torch.float32)
        ctx.count = len(tensors)
        ctx.save_for_backward(*tensors, rows, *([result] if keeps_result else []))
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors[: ctx.count]
        return None, *(t.new_empty(t.shape) if t is not None and t.requires_grad else None for t in tensors)


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *given: Any, **named: Any) -> Any:
    return _FusedKernel.apply(True, query, key, value, named.get("attn_mask", mask))  # type: ignore[no-untyped-call]


def _rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, *given: Any, **named: Any) -> Any:
    return _FusedKernel.apply(False, x, named.get("weight", weight))  # type: ignore[no-untyped-call]


_STAND_INS: dict[str, Callable[..., Any]] = {"attention": _attention, "norm": _rms_norm}


def stand_in(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that makes and keeps as much as one kernel would; for most functions, themselves."""
    return _STAND_INS.get(traits_of(function).kernel, function) if isinstance(function, OpOverload) else function
