"""Operations: counts the operations of an operator."""

from __future__ import annotations

import math

from shardwright.cost.convolution import is_transposed
from shardwright.ir.operator import Operator
from shardwright.rules.traits import family, traits_of

# -- operations -----------------------------------------------------------------------------------------------------------


def flops(op: Operator) -> float:
    """Counts the operations of the forward on the whole tensors. A multiplication and an addition are two.

    Causal attention counts half of the pairs of positions. Families that are bound by memory count none.

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
    """Returns the size of the dims that a product sums over."""
    traits = traits_of(op)
    return traits.summed(op) if traits.summed is not None else float(math.prod(op.inputs[traits.operands].shape[-1:]))
