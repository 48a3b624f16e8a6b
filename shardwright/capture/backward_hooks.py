"""Backward hooks of modules. They are refused, because a captured program would never call them."""

from __future__ import annotations

import torch
from torch import nn

from shardwright.base.torch_private import global_backward_hooks
from shardwright.errors import CaptureError


def check_backward_hooks(module: nn.Module) -> None:
    """Refuses hooks that modules, or all modules, run in the backward pass. Without gradients none of them runs.

    Raises:
        CaptureError: there are some; all are named.
    """
    if not torch.is_grad_enabled():
        return
    found = [
        f"{path or type(owner).__name__}: {getattr(hook, '__name__', type(hook).__name__)}"
        for path, owner in module.named_modules()
        for hook in (*owner._backward_hooks.values(), *owner._backward_pre_hooks.values())
    ]
    found += [f"all modules: {getattr(hook, '__name__', type(hook).__name__)}" for hook in global_backward_hooks()]
    if found:
        listed = "; ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")
        raise CaptureError(
            f"modules with backward hooks cannot be captured: the backward pass of a captured module runs operators, not the "
            f"module, so the hooks would never be called ({listed})\n"
            "  Remove the hook; one on a parameter (parameter.register_hook) is called, and so are forward hooks"
        )
