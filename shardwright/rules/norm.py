"""Rules of normalisations: the dims whose statistics are taken stay whole, all others are free.

An exception is batch norm over the whole batch: it may be split along the batch too, its sums then meet in one
all-reduce.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shardwright.rules.lowering import Local
from shardwright.rules.operator import Operator, Slot
from shardwright.rules.reduce import has_empty_piece
from shardwright.rules.registry import rule_for
from shardwright.rules.signature import Signature, parse


@rule_for("aten.layer_norm", "aten.rms_norm")
def _last_dims(op: Operator) -> Signature:
    """Over the last dims, which weight and bias have too."""
    dims = " ".join(f"n{i}!" for i in range(len(op.argument("normalized_shape"))))
    scales = "".join(f", {dims}" for _ in op.inputs[1:])
    return parse(f"... {dims}{scales} -> ... {dims}", op)


@rule_for("aten.native_layer_norm")
def _native_layer_norm(op: Operator) -> Signature:
    count = len(op.argument("normalized_shape"))
    dims = " ".join(f"n{i}!" for i in range(count))
    scales = "".join(f", {dims}" for _ in op.inputs[1:])
    statistics = " ".join(["..."] + ["1"] * count)
    return parse(f"... {dims}{scales} -> ... {dims}, {statistics}, {statistics}", op)


@rule_for("aten.group_norm")
def _group_norm(op: Operator) -> Signature:
    """Channels are ``(g c)``: whole groups may be apart."""
    groups, channels = op.argument("num_groups"), op.inputs[0].shape[1]
    spatial = " ".join(f"s{i}!" for i in range(len(op.inputs[0].shape) - 2))
    scales = ", (g c!)" * (len(op.inputs) - 1)
    sizes = {"g": groups, "c": channels // groups}
    return parse(f"n (g c!) {spatial}{scales} -> n (g c!) {spatial}", op, sizes, (), _local_groups)


def _local_groups(local: Local) -> Any:
    channels = local.local_size(False, 0, 1)
    each = local.signature.sizes["c"]
    if not local.axes_of("g"):
        return local.same_call()
    ...
