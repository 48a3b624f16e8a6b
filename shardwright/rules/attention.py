"""Rules of attention: samples and heads are free, the sequence of queries where no causal mask counts positions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from shardwright.ir.operator import Operator, Slot
from shardwright.ir.signature import Signature
from shardwright.rules import random_draw
from shardwright.rules.lowering import Local
from shardwright.rules.notation import parse
from shardwright.rules.pieces import local_arguments, piece, start
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
    dtype = wide(op.inputs[0].dtype)
    p, device = op.argument("dropout_p"), op.inputs[0].device
    strides = tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
    noise = local.call(random_draw.dropout_noise, shape, strides, dtype, device, p)
    if local.output_layouts[0].split_axes:
        dims = range(len(shape) - 1)
        starts = [*(start(local, True, 0, d) for d in dims), 0]
        noise = local.call(piece, noise, starts, [*local.local_shape(True, 0)[:-1], shape[-1]])
    args, kwargs = local_arguments(local, local.inputs)
    given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args)) | dict(kwargs)
    return (local.call(attention_with_noise, noise, **given),)


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
        attn_mask = torch.ones(weights.shape[-2:], dtype=torch.bool, device=weights.device).tril()
    if attn_mask is not None:
        weights = weights.where(attn_mask, -math.inf) if attn_mask.dtype == torch.bool else weights + attn_mask
    return (random_draw.apply_dropout(SAFE_SOFTMAX(weights, -1), noise, dropout_p) @ value).to(dtype)


def _mask(shape: tuple[int, ...], heads: str, length: str) -> str:
    """Returns the notation of a mask, which broadcasts to ``... h l s``."""
    if len(shape) == 2 or not heads:
        return f"... {length} s!"
    return f"... {'1' if shape[-3] == 1 else heads} {length} s!"


# -- traits ------------------------------------------------------------------------------------------------------------------

TRAITS = {Traits("attention", fused=True, kernel="attention", half=True): "scaled_dot_product_attention"}
register_traits(TRAITS)
