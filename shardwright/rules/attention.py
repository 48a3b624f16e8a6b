"""Rules of attention: samples and heads are free, the sequence of queries where no causal mask counts positions.

Causal attention can be cut along its sequence into slices that run one after the other: each has its own queries, and the keys
and values of all positions up to its end. See :func:`in_slices`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shardwright.ir.instructions import PerRank, Ref
from shardwright.ir.operator import Operator, Slot
from shardwright.ir.signature import Signature
from shardwright.rules import random_draw
from shardwright.rules.lowering import Local
from shardwright.rules.notation import parse
from shardwright.rules.pieces import local_arguments, of_sizes, piece, start
from shardwright.rules.reduce import wide
from shardwright.rules.registry import rule_for
from shardwright.rules.traits import Traits, register_traits

SAFE_SOFTMAX = torch.ops.aten._safe_softmax  # rows without any key become zeros


@rule_for("aten.scaled_dot_product_attention")
def _attention(op: Operator) -> Signature | None:
    """Splits queries ``... h l e``, keys ``... h s e``, values ``... h s v`` and a mask that broadcasts to ``... h l s``.

    With grouped queries (``enable_gqa``) a key's head serves ``r`` heads of queries. Dropout draws for the whole tensor of
    weights, of which each rank takes its piece. It has no rule where a fused kernel draws in an order of its own.
    """
    if op.argument("dropout_p") and (op.inputs[0].device or torch.device("cpu")).type != "cpu":
        return None
    length = "l!" if op.argument("is_causal") else "l"
    heads, served, sizes = "", "", {}
    if op.argument("enable_gqa"):
        heads, served = "(h r)", "h"
        sizes = {"h": op.inputs[1].shape[-3], "r": op.inputs[0].shape[-3] // op.inputs[1].shape[-3]}
    texts = [f"... {heads} {length} e!", f"... {served} s! e!", f"... {served} s! v"]
    if isinstance(op.argument("attn_mask"), Slot):
        texts.append(_mask(op.inputs[3].shape, heads, length))
    return parse(
        f"{', '.join(texts)} -> ... {heads} {length} v", op, sizes, (), _with_dropout if op.argument("dropout_p") else None
    )


def _with_dropout(local: Local) -> Any:
    """Emits attention whose dropout is the piece of what is drawn for the whole tensor of weights."""
    op = local.op
    if not local.split or not op.outputs[0].numel:
        return local.same_call()
    shape = (*op.outputs[0].shape[:-1], op.inputs[1].shape[-2])
    noise = _noise(local, shape)
    if local.output_layouts[0].split_axes:
        noise = _piece_of_noise(local, noise, shape[-1])
    return (local.call(attention_with_noise, noise, **_given(local)),)


def _noise(local: Local, shape: tuple[int, ...]) -> Ref:
    """Emits the draw for the whole tensor of weights."""
    meta, strides = local.op.inputs[0], tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
    p = local.op.argument("dropout_p")
    return local.call(random_draw.dropout_noise, shape, strides, wide(meta.dtype), meta.device, p)


def _piece_of_noise(local: Local, noise: Ref, keys: PerRank | int) -> Ref:
    """Emits the local piece of the noise: that of the output's samples, heads and queries, and of the first keys."""
    dims = range(len(local.op.outputs[0].shape) - 1)
    starts = [*(start(local, True, 0, d) for d in dims), 0]
    return local.call(piece, noise, starts, [*local.local_shape(True, 0)[:-1], keys])


def _given(local: Local) -> dict[str, Any]:
    args, kwargs = local_arguments(local, local.inputs)
    return dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args)) | dict(kwargs)


def attention_with_noise(
    noise: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Computes attention that drops the weights where the noise is zero.

    Args:
        noise: ones and zeros, ``... h l s``.
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa: as of ``scaled_dot_product_attention``.
    """
    dtype, factor = query.dtype, query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = (t.to(wide(dtype)) for t in (query, key, value))
    if enable_gqa:
        served = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(served, -3), value.repeat_interleave(served, -3)
    root = math.sqrt(abs(factor))  # each side takes a root of it, as eager attention does
    weights = (query * math.copysign(root, factor)) @ (key.transpose(-2, -1) * root)
    if is_causal:
        attn_mask = causal_mask(weights.shape[-2], weights.shape[-1], weights.device)
    if attn_mask is not None:
        weights = weights.where(attn_mask, -math.inf) if attn_mask.dtype == torch.bool else weights + attn_mask
    return (random_draw.apply_dropout(SAFE_SOFTMAX(weights, -1), noise, dropout_p) @ value).to(dtype)


def causal_mask(queries: int, keys: int, device: Any = None) -> Tensor:
    """Makes the mask of queries whose last one is at the position of the last key.

    >>> causal_mask(1, 3), causal_mask(2, 2)
    (tensor([[True, True, True]]), tensor([[ True, False],
            [ True,  True]]))
    """
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


# -- slices of a sequence ---------------------------------------------------------------------------------------------


def attends_causally(op: Operator) -> bool:
    """Tells whether a call is causal attention of a sequence to itself."""
    if op.name != "aten.scaled_dot_product_attention" or not op.argument("is_causal"):
        return False
    return op.inputs[0].shape[-2] == op.inputs[1].shape[-2]


def is_attention(op: Operator) -> bool:
    """Tells whether a call is attention of queries to keys and values."""
    return op.name == "aten.scaled_dot_product_attention"


def mask_of(op: Operator) -> int | None:
    """Returns the position of the mask among the inputs of attention; ``None`` if there is none."""
    mask = op.argument("attn_mask") if op.name == "aten.scaled_dot_product_attention" else None
    return mask.index if isinstance(mask, Slot) else None


def without_mask(op: Operator) -> Operator:
    """Makes the causal attention that attention with a causal mask is."""
    names = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    kwargs = {name: op.argument(name) for name in names} | {"attn_mask": None, "is_causal": True}
    return Operator(op.target, (Slot(0), Slot(1), Slot(2)), kwargs, op.inputs[:3], op.outputs)


def in_slices(op: Operator, signature: Signature) -> Signature:
    """Returns the rule of causal attention whose sequence is cut into slices.

    Places on the axes that cut it run one after the other. Keys and values are cut as the queries are (factor ``l``); see
    :func:`sliced_causal_attention`.

    Args:
        op: the attention.
        signature: its rule.
    """
    keys = tuple(tuple(("l",) if dim == ("s",) else dim for dim in tensor) for tensor in signature.inputs)
    return replace(signature, inputs=keys, whole=signature.whole - {"l", "s"}, lowering=_of_slice)


def _of_slice(local: Local) -> Ref:
    """Emits the attention of a slice, with its piece of the noise that is drawn for whole sequences."""
    op, given, noise = local.op, _given(local), None
    keys, dim = op.inputs[1].shape[-2], len(op.inputs[1].shape) - 2
    if op.argument("dropout_p"):
        noise = _noise(local, (*op.outputs[0].shape[:-1], keys))
        end = of_sizes(lambda at, count: at + count, start(local, False, 1, dim), local.local_size(False, 1, dim))
        noise = _piece_of_noise(local, noise, end)
    (axis,) = local.axes_of("l")
    place = PerRank(lambda rank: local.mesh.coordinates(rank)[axis])
    options = {name: given[name] for name in ("dropout_p", "scale", "enable_gqa") if name in given}
    return local.call(sliced_causal_attention, *local.inputs, place, noise, **options)


def sliced_causal_attention(
    query: Tensor, key: Sequence[Tensor], value: Sequence[Tensor], place: int, noise: Tensor | None = None,
    dropout_p: float = 0.0, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Computes causal attention of a slice of a sequence.

    Args:
        query: that of the slice, ``... h l e``.
        key, value: those of each slice up to this one, ``... h l e``. Programs say the slice's own, and whoever runs slices one
            after the other puts those of the earlier ones before it.
        place: number of the slice.
        noise: what dropout keeps of the weights, if there is dropout.
        dropout_p, scale, enable_gqa: as of ``scaled_dot_product_attention``.
    """
    assert len(key) == len(value) == place + 1, "a slice of a sequence without the slices before it"
    keys, values = (torch.cat(list(each), -2) if place else each[0] for each in (key, value))
    if noise is not None:
        return attention_with_noise(noise, query, keys, values, None, dropout_p, True, scale, enable_gqa)
    mask = causal_mask(query.shape[-2], keys.shape[-2], query.device)
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(query, keys, values, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)


def _mask(shape: tuple[int, ...], heads: str, length: str) -> str:
    """Returns the notation of a mask, which broadcasts to ``... h l s``."""
    if len(shape) == 2 or not heads:
        return f"... {length} s!"
    return f"... {'1' if shape[-3] == 1 else heads} {length} s!"


# -- traits ------------------------------------------------------------------------------------------------------------------

TRAITS = {
    Traits("attention", fused=True, kernel="attention", half=True): "scaled_dot_product_attention sliced_causal_attention",
}
register_traits(TRAITS)
