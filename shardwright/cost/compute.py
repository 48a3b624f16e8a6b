"""Compute: what operators cost a rank, by the roofline of their family.

An operator takes the longer of its operations at the rate its family reaches and its bytes at the memory's bandwidth
(Williams, Waterman and Patterson, "Roofline", 2009), and a launch. Its backward takes: a product one product for each
operand that needs a gradient, attention two and a half times its forward (five products instead of two), the others the
bytes of the gradients and of what they kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from shardwright.cost.machine import Machine
from shardwright.rules.operator import Operator

Array = np.ndarray[Any, Any]

_PRODUCTS = {"linear", "matmul", "mm", "bmm", "mv", "dot", "vdot", "outer", "ger", "addmm", "addmv", "addbmm", "baddbmm",
             "einsum", "bilinear", "tensordot"}  # fmt: skip
_VIEWS = {"view", "_unsafe_view", "expand", "expand_as", "transpose", "permute", "t", "unsqueeze", "squeeze", "select", "slice",
          "split", "split_with_sizes", "chunk", "unbind", "detach", "alias", "unflatten", "flatten", "movedim", "narrow",
          "view_as", "numpy_T", "mT", "swapaxes", "diagonal", "real", "imag", "tensor_split"}  # fmt: skip
_NORMS = {"layer_norm", "native_layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm", "_fused_rms_norm"}
_SOFTMAX = {"softmax", "_softmax", "log_softmax", "_log_softmax", "cross_entropy_loss", "logsumexp", "nll_loss", "nll_loss_nd"}
_INDEX = {"embedding", "gather", "index_select", "index", "take", "take_along_dim", "scatter", "scatter_add", "index_add",
          "index_copy", "index_put", "topk", "sort", "argsort", "one_hot"}  # fmt: skip
_RANDOM = {"dropout", "native_dropout", "bernoulli", "rand", "randn", "rand_like", "randn_like", "uniform", "normal"}
_REDUCE = {
    "sum",
    "mean",
    "max",
    "min",
    "amax",
    "amin",
    "var",
    "std",
    "prod",
    "norm",
    "cumsum",
    "argmax",
    "argmin",
    "any",
    "all",
}

# Passes over their tensors that families of several passes make, against one read and one write.
_PASSES = {"norm": 2.0, "softmax": 2.0, "random": 2.0, "index": 1.0}


def family(op: Operator) -> str:
    """The family that an operator's cost follows.

    ``matmul``, ``attention``, ``conv``, ``norm``, ``softmax``, ``index``, ``random``, ``reduce``, ``view`` (free) or
    ``pointwise``, which all others count as.
    """
    name = op.name.rsplit(".", 1)[-1]
    if name in _PRODUCTS:
        return "matmul"
    if "attention" in name:
        return "attention"
    if name.startswith("conv") or name.startswith("_conv"):
        return "conv"
    for kind, names in (("view", _VIEWS), ("norm", _NORMS), ("softmax", _SOFTMAX), ("index", _INDEX), ("random", _RANDOM),
                        ("reduce", _REDUCE)):  # fmt: skip
        if name in names:
            return kind
    if name in ("reshape", "contiguous") and _same_order(op):
        return "view"
    return "pointwise"


def _same_order(op: Operator) -> bool:
    """Whether a reshape of its input moves nothing in memory."""
    if not op.inputs:
        return False
    shape, stride = op.inputs[0].shape, op.inputs[0].stride
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride)):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def flops(op: Operator) -> float:
    """Operations of the forward on the whole tensors; a multiplication and an addition are two.

    >>> import torch
    >>> from shardwright.rules.operator import Slot, TensorMeta
    >>> a, b, c = (TensorMeta(shape, torch.float32) for shape in ((8, 16), (4, 16), (8, 4)))
    >>> flops(Operator(torch.ops.aten.linear.default, (Slot(0), Slot(1)), {}, (a, b), (c,)))
    1024.0
    """
    kind = family(op)
    if not op.inputs or not op.outputs:
        return 0.0
    if kind == "matmul":
        return 2.0 * op.outputs[0].numel * _summed(op)
    if kind == "attention":
        query, key = op.inputs[0].shape, op.inputs[1].shape
        value = op.inputs[2].shape
        causal = 0.5 if op.argument("is_causal", False) else 1.0
        pairs = math.prod(query[:-1]) * key[-2] * causal
        return 2.0 * pairs * (query[-1] + value[-1])
    if kind == "conv":
        weight = op.inputs[1]
        # each output value is a product over a filter; a transposed convolution does so for each input value
        values = op.inputs[0].numel if op.argument("transposed", False) or "transpose" in op.name else op.outputs[0].numel
        return 2.0 * values * weight.numel / max(1, weight.shape[0])
    return 0.0


def _summed(op: Operator) -> float:
    """The size of the dims that a product sums over."""
    name = op.name.rsplit(".", 1)[-1]
    inputs = [m for m in op.inputs if m.shape]
    if name in ("outer", "ger"):
        return 1.0
    if name in ("addmm", "addmv", "addbmm", "baddbmm"):
        first = inputs[-2].shape
        return float(first[-1] * (first[0] if name == "addbmm" else 1))
    if name == "einsum":
        return _einsum_sum(op)
    return float(inputs[0].shape[-1]) if inputs else 1.0


def _einsum_sum(op: Operator) -> float:
    equation = str(op.argument("equation", "")).replace(" ", "").replace("...", "")
    left, _, right = equation.partition("->")
    sizes: dict[str, int] = {}
    for term, meta in zip(left.split(","), op.inputs):
        for letter, size in zip(reversed(term), reversed(meta.shape)):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return float(math.prod(size for letter, size in sizes.items() if letter not in right))


def local_seconds(
    op: Operator,
    machine: Machine,
    fraction: Array,
    input_bytes: Array,
    output_bytes: Array,
    needs_grad: Sequence[bool],
) -> tuple[Array, Array]:
    """Seconds of the forward and of the backward, for each of ``C`` choices.

    Args:
        fraction: ``(C,)``, share of the operator's work that a rank does.
        input_bytes, output_bytes: ``(I, C)`` and ``(O, C)``, what a rank holds of each tensor.
    """
    kind = family(op)
    if kind == "view":
        # the backward of a slice writes zeros around it; a mere view costs its call
        none = np.zeros(len(fraction))
        return none + machine.operator_launch / 2, none + (machine.operator_launch / 2 if any(needs_grad) else 0.0)
    dtype = str(op.inputs[0].dtype if op.inputs else op.outputs[0].dtype).removeprefix("torch.")
    work = flops(op) * fraction / machine.rate(kind, dtype)
    read, written = input_bytes.sum(axis=0), output_bytes.sum(axis=0)
    if kind == "index" and len(op.inputs) > 1 and op.inputs[0].numel > op.outputs[0].numel:
        read = input_bytes[1:].sum(axis=0) + written  # a lookup reads only the rows it takes
    traffic = (read + written) * _PASSES.get(kind, 1.0) / machine.bandwidth_of(kind)
    forward = np.maximum(work, traffic) + machine.operator_launch
    wanted = sum(needs_grad)
    if not wanted:
        return forward, np.zeros_like(forward)
    if kind in ("matmul", "conv"):
        products = sum(bool(needs) for needs, meta in zip(needs_grad, op.inputs) if len(meta.shape) > 1 or kind == "conv")
        products = max(1, min(2, products))
        backward = products * (np.maximum(work, traffic) + machine.operator_launch)
    elif kind == "attention":
        backward = 2.5 * np.maximum(work, traffic) + machine.operator_launch
    else:
        # reads the output's gradient and what was kept, writes a gradient for each input that needs one
        grads = input_bytes[np.asarray(needs_grad, dtype=bool)].sum(axis=0)
        backward = (read + written + grads) * _PASSES.get(kind, 1.0) / machine.bandwidth_of(kind) + machine.operator_launch
    return forward, backward


def optimizer_seconds(parameter_bytes: Array, states: float, machine: Machine) -> Array:
    """Seconds of an optimizer's step over what a rank stores: reads and writes parameters and states, reads gradients.

    Optimizers update all tensors together, so no launch is counted for one.
    """
    return parameter_bytes * (3 + 2 * states) / machine.bandwidth_of("optimizer")
