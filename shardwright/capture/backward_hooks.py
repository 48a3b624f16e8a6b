"""Old-style backward hooks of modules, which get the gradients of a module's last operator: refused. Others are captured."""

from __future__ import annotations

import torch
from torch import nn

from shardwright.base.torch_private import module_calls
from shardwright.errors import CaptureError


def check_backward_hooks(module: nn.Module) -> None:
    """Refuses the hooks of ``register_backward_hook``. Without gradients none of them runs.

    Raises:
        CaptureError: there are some; all are named.
    """
    if not torch.is_grad_enabled():
        return
    found = [
        f"{path or type(owner).__name__}: {getattr(hook, '__name__', type(hook).__name__)}"
        for path, owner in module.named_modules()
        if owner._is_full_backward_hook is False
        for hook in owner._backward_hooks.values()
    ]
    if module_calls._global_is_full_backward_hook is False:
        hooks = module_calls._global_backward_hooks.values()
        found += [f"all modules: {getattr(hook, '__name__', type(hook).__name__)}" for hook in hooks]
    if found:
        listed = "; ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")
        raise CaptureError(
            "modules with hooks of register_backward_hook cannot be captured: what such a hook is given depends on the last "
            f"operator of the module ({listed})\n"
            "  Register them with register_full_backward_hook, whose hooks are given the gradients of the module's inputs and "
            "results"
        )
