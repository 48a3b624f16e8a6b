"""Watch: watches a callable while it is captured, and refuses what a graph cannot keep, with the user's line.

``torch.export`` records operators. It does not record other ways to change gradients or values: a custom backward, a hook, a
write to ``.data``, a random number from Python. These are detected here. Where an exact replacement exists it is used instead
of an error: ``tensor.data`` is read as ``tensor.detach()``, and a checkpointed function is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_forward_pre_hook,
    register_module_parameter_registration_hook,
)

from shardwright.capture.backward_hooks import check_backward_hooks
from shardwright.capture.decisions import Decisions
from shardwright.capture.refusals import refused
from shardwright.capture.stand_ins import replacements
from shardwright.capture.torch_functions import Watch
from shardwright.capture.transformations import transformations


@contextmanager
def watched(module: nn.Module, decisions: Decisions | None) -> Iterator[Watch]:
    """Raises, within the block, a :class:`CaptureError` for what a graph cannot keep.

    Args:
        module: what is captured.
        decisions: those by values of tensors, where they can be kept.
    """
    check_backward_hooks(module)
    watch = Watch(module, decisions)
    with ExitStack() as stack:
        stack.enter_context(watch)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(watch.save, lambda tensor: tensor))
        for owner, name, value in (*replacements(watch), *transformations(watch)):
            stack.enter_context(_replaced(owner, name, value))
        stack.callback(register_module_buffer_registration_hook(watch.note_assigned).remove)
        stack.callback(register_module_parameter_registration_hook(watch.note_assigned).remove)
        stack.callback(register_module_forward_pre_hook(watch.check_called).remove)
        stack.callback(refused.clear)
        yield watch


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    is_owners = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if is_owners:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
