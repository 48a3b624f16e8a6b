"""Traits of operators that have no rule yet, or need none. They run whole on every rank, or only inside others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from shardwright.ir.operator import Operator
from shardwright.rules.traits import Traits, register_traits


def _both_inner(op: Operator) -> float:
    return float(op.inputs[0].shape[-1] * op.inputs[1].shape[-1])


def _shared_elements(op: Operator) -> float:
    return math.sqrt(op.inputs[0].numel * op.inputs[1].numel / max(1, op.outputs[0].numel))


def _convolution_backward_workspace(args: Sequence[Any], results: Sequence[Tensor]) -> float:
    return float(sum(t.nbytes for t in args[:3]))


def _batch_norm_backward_workspace(args: Sequence[Any], results: Sequence[Tensor]) -> float:
    """Returns the bytes of a second input, where gradient and input lie in memory alike."""
    gradient, given = args[:2]
    return float(given.nbytes) if gradient.stride() == given.stride() else 0.0


TRAITS = {
    Traits("matmul", summed=_both_inner): "bilinear",
    Traits("matmul", summed=_shared_elements): "tensordot",
    Traits("norm"): "_fused_rms_norm native_group_norm native_batch_norm",
    Traits("softmax"): "nll_loss_forward",
    Traits("view", linear=True): "real imag",
    Traits("copy", linear=True): "column_stack",
    Traits(entry_differs=True): "copy",
    Traits("conv", workspace=_convolution_backward_workspace): "convolution_backward",
    Traits(workspace=_batch_norm_backward_workspace): "native_batch_norm_backward",
}
register_traits(TRAITS)
