"""Operations: which family an operator is of, and how many operations it does."""

from __future__ import annotations

import math

from shardwright.cost.convolution import is_transposed
from shardwright.ir.operator import Operator
from shardwright.rules.traits import family

# -- operations -----------------------------------------------------------------------------------------------------------


def flops(op: Operator) -> float:
    """Operations of the forward on the whole tensors; a multiplication and an addition are two.

    Causal attention counts half of the pairs of positions. Families that memory bounds count none.

    >>> import torch
    >>> from shardwright.ir.operator import Slot, TensorMeta
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
        query, key, value = (meta.shape for meta in op.inputs[:3])
        pairs = math.prod(query[:-1]) * key[-2] * (0.5 if op.argument("is_causal", False) else 1.0)
        return 2.0 * pairs * (query[-1] + value[-1])
    if kind == "conv":
        # each output value is a product over a filter; a transposed convolution does one for each input value
        values, weight = op.inputs[0].numel if is_transposed(op) else op.outputs[0].numel, op.inputs[1]
        return 2.0 * values * weight.numel / max(1, weight.shape[0])
    return 0.0


def _summed(op: Operator) -> float:
    """The size of the dims that a product sums over."""
    name = op.name.rsplit(".", 1)[-1]
    if name in ("outer", "ger"):
        return 1.0
    if name == "einsum":
        return _summed_by_einsum(op)
    if name == "bilinear":
        return float(op.inputs[0].shape[-1] * op.inputs[1].shape[-1])
    if name == "tensordot":
        return math.sqrt(op.inputs[0].numel * op.inputs[1].numel / max(1, op.outputs[0].numel))
    left = op.inputs[-2 if name in ("addmm", "addmv", "addbmm", "baddbmm") else 0].shape
    return float(math.prod(left[-1:]) * (left[0] if name == "addbmm" else 1))


def _summed_by_einsum(op: Operator) -> float:
    inputs, arrow, output = str(op.argument("equation", "")).replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    for term, meta in zip(inputs.split(","), op.inputs):
        leading, _, trailing = term.partition("...")
        found = [*zip(leading, meta.shape), *zip(reversed(trailing), reversed(meta.shape))]
        for letter, size in found:
            sizes[letter] = max(size, sizes.get(letter, 1))
    if not arrow:  # then the letters that stand there once are the output's
        output = "".join(letter for letter in sizes if inputs.count(letter) == 1)
    return float(math.prod(size for letter, size in sizes.items() if letter not in output))
