"""Ordinary tensors beside distributed ones: their gradients, and models that are called without their net."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from shardwright.base.torch_private import module_call_code
from shardwright.base.user_code import user_source
from shardwright.errors import WorldError
from shardwright.parameters.ours import is_ours
from shardwright.parameters.placements import _like
from shardwright.parameters.whole import whole_value


class _ConvertsGradient:
    """Hook of a tensor that makes its gradient of its own kind: distributed like it, or whole."""

    def __init__(self, like: DTensor | None):
        self.like = like

    def __call__(self, gradient: Tensor) -> Tensor | None:
        if self.like is None:
            return whole_value(gradient, "the gradient") if isinstance(gradient, DTensor) else None
        return None if isinstance(gradient, DTensor) else _like(self.like, gradient)


def let_gradients_pass(tensors: Sequence[Tensor]) -> None:
    """Makes gradients of the kind of their tensors, where ordinary and distributed tensors meet in an operator.

    What autograd computes from both kinds may be of the other; an ordinary tensor's gradient becomes a whole value, a
    distributed one's a piece of it.
    """
    if not torch.is_grad_enabled():
        return
    for tensor in tensors:
        if tensor.requires_grad and len(hooks_of_user(tensor)) == len(tensor._backward_hooks or ()):
            like: Any = tensor.detach() if isinstance(tensor, DTensor) else None
            tensor.register_hook(_ConvertsGradient(like))


def hooks_of_user(tensor: Tensor) -> dict[int, Any]:
    """Returns the hooks of a tensor's gradient that are the user's, in a table like torch's."""
    found: Any = tensor._backward_hooks or {}
    return OrderedDict((key, hook) for key, hook in found.items() if not isinstance(hook, _ConvertsGradient))


def check_no_plain_call(operator: str) -> None:
    """Refuses an operator of a module that holds distributed parameters and is called without its net.

    Args:
        operator: the operator's name.

    Raises:
        WorldError: it is.
    """
    frame: FrameType | None = sys._getframe(1)
    outermost: Any = None
    while frame is not None:
        if frame.f_code is module_call_code:
            module = frame.f_locals["self"]
            if any(is_ours(p) for p in module.parameters(recurse=False)):
                outermost = outermost or module
            elif outermost is not None:
                outermost = module
        frame = frame.f_back
    if outermost is None:
        return
    name = type(outermost).__name__
    raise WorldError(
        f"{name}(...) was called beside its AutoParallel ({operator}, at {user_source()}), and this rank holds pieces of its "
        "parameters: call net(...), or, on every rank, `with net.whole(): model(...)`"
    )
