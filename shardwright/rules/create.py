"""Rules of operators that create tensors: every dim of the output is free, each rank makes its own piece.

Sequences of floats are made whole and cut, because their values depend on how many are made at a time. ``new_zeros``
and similar ones read no values of their input, so that input may be split in any way. Without a rule, so that they run whole:
windows, index lists (``tril_indices``), ``logspace`` and ``vander``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shardwright.ir.instructions import Ref
from shardwright.ir.operator import Operator
from shardwright.ir.signature import Signature
from shardwright.rules.lowering import Local
from shardwright.rules.notation import parse
from shardwright.rules.pieces import of_sizes, piece_of_output, start
from shardwright.rules.registry import rule_for
from shardwright.rules.traits import Traits, register_traits

_VALUES: dict[str, Callable[..., Any]] = {
    "zeros": torch.zeros,
    "ones": torch.ones,
    "full": torch.full,
    "empty": torch.empty,
}


@rule_for("aten.zeros", "aten.ones", "aten.full", "aten.empty")
@rule_for("aten.new_zeros", "aten.new_ones", "aten.new_full", "aten.new_empty")
@rule_for("aten.empty_strided", "aten.empty_permuted", "aten.new_empty_strided")
def _constant_rule(op: Operator) -> Signature | None:
    """Builds the rule of a tensor with one value, or with none. Each piece of the latter has its own strides."""
    return _created(op, _constant)


@rule_for("aten.zero")
def _zero_rule(op: Operator) -> Signature | None:
    return parse("... -> ...", op)


@rule_for("aten.arange", "aten.range", "aten.linspace")
def _sequence_rule(op: Operator) -> Signature | None:
    return _created(op, _sequence)


@rule_for("aten.eye")
def _eye_rule(op: Operator) -> Signature | None:
    return _created(op, _eye)


@rule_for("aten.scalar_tensor")
def _scalar_rule(op: Operator) -> Signature | None:
    return _created(op, None)


def _created(op: Operator, lowering: Any) -> Signature | None:
    """Builds a rule with free output dims. Inputs whose values are not read have inner dims."""
    if len(op.outputs) != 1 or len(op.inputs) > 1:
        return None
    inputs = ", ".join(" ".join(f"i{n}_{d}~" for d in range(len(m.shape))) for n, m in enumerate(op.inputs))
    outputs = " ".join(f"d{d}" for d in range(len(op.outputs[0].shape)))
    return parse(f"{inputs} -> {outputs}", op, None, (), lowering)


def _constant(local: Local) -> tuple[Ref, ...]:
    """Emits a tensor made from a shape only. It must not depend on a tensor of which only dtype and device are read."""
    op, meta = local.op, local.op.outputs[0]
    if not local.split:
        return local.same_call()
    make = _VALUES[op.name.removeprefix("aten.").removeprefix("new_").partition("_")[0]]
    value = (op.argument("fill_value"),) if make is torch.full else ()
    device = op.argument("device") or meta.device
    return (local.call(make, local.local_shape(True, 0), *value, dtype=meta.dtype, device=device),)


def _sequence(local: Local) -> tuple[Ref, ...]:
    if local.op.name == "aten.arange" and _is_whole_numbers(local.op) and local.split:
        return (_arange(local),)
    return (piece_of_output(local, local.same_call()[0]),)


def _is_whole_numbers(op: Operator) -> bool:
    numbers = [op.argument(name, 0) for name in ("start", "end", "step")]
    return not op.outputs[0].dtype.is_floating_point and all(isinstance(n, int) for n in numbers)


def _arange(local: Local) -> Ref:
    """Emits the numbers of the piece, from its own first to its own last."""
    first, step = local.op.argument("start", 0), local.op.argument("step", 1)
    at, size = start(local, True, 0, 0), local.local_size(True, 0, 0)
    begin = of_sizes(lambda a: first + step * a, at)
    end = of_sizes(lambda a, n: first + step * (a + n), at, size)
    kwargs = {"dtype": local.op.outputs[0].dtype, "device": local.op.argument("device")}
    return local.call(torch.arange, begin, end, step, **kwargs)


def _eye(local: Local) -> tuple[Ref, ...]:
    if not local.split:
        return local.same_call()
    rows, columns = local.local_shape(True, 0)
    diagonal = of_sizes(lambda r, c: r - c, start(local, True, 0, 0), start(local, True, 0, 1))
    dtype, device = local.op.outputs[0].dtype, local.op.argument("device")
    return (local.call(eye_block, rows, columns, diagonal, dtype, device),)


def eye_block(rows: int, columns: int, diagonal: int, dtype: torch.dtype, device: Any = None) -> Tensor:
    """Computes a block of an identity matrix, with its ones on this diagonal.

    Args:
        rows, columns: size of the block.
        diagonal: number of the block's diagonal with the ones, 0 for the main one.
        dtype, device: of the result.

    >>> eye_block(2, 3, 1, torch.int64)
    tensor([[0, 1, 0],
            [0, 0, 1]])
    """
    block = torch.zeros(rows, columns, dtype=dtype, device=device)
    block.diagonal(diagonal).fill_(1)
    return block


# -- traits ------------------------------------------------------------------------------------------------------------------

TRAITS = {
    Traits("create"): "zeros ones full arange range linspace eye scalar_tensor zero",
    Traits("create", entry_differs=True): "new_zeros new_ones new_full",
    Traits("view"): "empty empty_permuted empty_strided new_empty_strided",
    Traits("view", entry_differs=True): "new_empty",
}
register_traits(TRAITS)
