"""Rules of random operators: in every layout the numbers are those of the single device.

Each call becomes two local calls: one that draws for the whole tensor and depends on no rank, and one that takes the piece
(see :mod:`shardwright.rules.random_draw`). The first costs a transient tensor of global shape on every rank; in return
a model trains the same on any number of devices, and generators never drift apart.

Draws that depend on the values of a tensor (``bernoulli`` of probabilities, ``multinomial``, ``poisson``, ...)
run whole on every rank, in the memory order of the single device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from shardwright.ir.instructions import Ref
from shardwright.ir.operator import Operator, TensorMeta
from shardwright.ir.signature import Signature
from shardwright.rules import random_draw
from shardwright.rules.lowering import Local
from shardwright.rules.notation import parse
from shardwright.rules.pieces import local_arguments, piece, piece_of_output, start
from shardwright.rules.registry import replicated_signature, rule_for
from shardwright.rules.traits import Traits, register_traits


def _stride(meta: TensorMeta) -> tuple[int, ...]:
    """Returns the strides of the global tensor; contiguous ones if they are not known."""
    if len(meta.stride) == len(meta.shape):
        return meta.stride
    return tuple(math.prod(meta.shape[d + 1 :]) for d in range(len(meta.shape)))


def _drawn(local: Local, draw: Callable[..., Any], meta: TensorMeta, *args: Any) -> Ref:
    """Emits the draw for a whole tensor like ``meta``."""
    return local.call(draw, meta.shape, _stride(meta), meta.dtype, meta.device, *args)


# -- dropout ----------------------------------------------------------------------------------------------------------


@rule_for("aten.dropout", "aten.feature_dropout", "aten.alpha_dropout", "aten.feature_alpha_dropout")
def _dropout_rule(op: Operator) -> Signature | None:
    return parse("... -> ...", op, None, (), _dropout if _draws(op) else None)


def _draws(op: Operator) -> bool:
    """Tells whether the call draws at all. Eager mode does not if it keeps or drops everything."""
    return bool(op.argument("train")) and 0 < op.argument("p") < 1 and op.inputs[0].numel > 0


def _dropout(local: Local) -> Ref:
    op, (x,), p = local.op, local.inputs, local.op.argument("p")
    meta = op.inputs[0]
    if op.name == "aten.dropout":
        if not local.split:
            return local.call(random_draw.whole_dropout, x, _stride(meta), p)
        noise = piece_of_output(local, _drawn(local, random_draw.dropout_noise, meta, p))
        return local.call(random_draw.apply_dropout, x, noise, p)
    if op.name == "aten.alpha_dropout":
        noise = piece_of_output(local, _drawn(local, random_draw.alpha_noise, meta, p))
        return local.call(random_draw.apply_alpha, x, noise, p)
    drawn = local.call(random_draw.feature_noise, meta.shape, meta.dtype, meta.device, p)
    scale = random_draw.apply_dropout if op.name == "aten.feature_dropout" else random_draw.apply_alpha
    return local.call(scale, x, _piece_of_features(local, drawn), p)


def _piece_of_features(local: Local, noise: Ref) -> Ref:
    """Returns the local piece of noise with size 1 after the first two dims."""
    axes, ndim = local.output_layouts[0].bound, len(local.op.outputs[0].shape)
    if not any(axes[:2]):
        return noise
    starts = [start(local, True, 0, d) if d < 2 else 0 for d in range(ndim)]
    return local.call(piece, noise, starts, [*local.local_shape(True, 0)[:2], *([1] * (ndim - 2))])


@rule_for("aten.native_dropout")
def _native_dropout_rule(op: Operator) -> Signature | None:
    """Splits the two outputs alike: the tensor and its mask."""
    return parse("... -> ..., ...", op, None, (), _native_dropout) if op.inputs[0].numel else None


def _native_dropout(local: Local) -> tuple[Ref, ...]:
    p = local.op.argument("p")
    if local.op.argument("train") is False:
        (x,) = local.inputs
        return local.call(torch.clone, x), local.call(torch.ones_like, x, dtype=torch.bool)
    mask = piece_of_output(local, _drawn(local, random_draw.native_mask, local.op.inputs[0], p), 1)
    return local.call(random_draw.apply_native, local.inputs[0], mask, p), mask


# -- a tensor of random numbers ---------------------------------------------------------------------------------------


@rule_for("aten.rand", "aten.randn", "aten.randint", "aten.randperm")
def _created_rule(op: Operator) -> Signature | None:
    return None if op.inputs else _random_rule(op)


@rule_for("aten.normal")
def _normal_rule(op: Operator) -> Signature | None:
    return _by_value_rule(op) if op.inputs else _random_rule(op)


def _random_rule(op: Operator) -> Signature:
    """Lets the operator itself draw the whole tensor."""
    dims = " ".join(f"d{d}" for d in range(len(op.outputs[0].shape)))
    return parse(f" -> {dims}", op, None, (), lambda local: piece_of_output(local, local.same_call()[0]))


# For operators that only read the shape of a tensor: the in-place method that fills one like it, and the
# names of its arguments.
_FILLS: dict[str, tuple[str, tuple[str, ...]]] = {
    "aten.rand_like": ("uniform_", ()),
    "aten.randn_like": ("normal_", ()),
    "aten.randint_like": ("random_", ("low", "high")),
    "aten.uniform": ("uniform_", ("from", "to")),
    "aten.normal_functional": ("normal_", ("mean", "std")),
    "aten.log_normal": ("log_normal_", ("mean", "std")),
    "aten.cauchy": ("cauchy_", ("median", "sigma")),
    "aten.exponential": ("exponential_", ("lambd",)),
    "aten.geometric": ("geometric_", ("p",)),
    "aten.random": ("random_", ("from", "to")),
    "aten.bernoulli": ("bernoulli_", ("p",)),
}


@rule_for(*_FILLS)
def _fill_rule(op: Operator) -> Signature | None:
    if len(op.inputs) != 1 or (op.name == "aten.bernoulli" and op.argument("p") is None):
        return _by_value_rule(op)
    return parse("... -> ...", op, None, (), _fill)


def _fill(local: Local) -> Ref:
    op = local.op
    method, arguments = _FILLS[op.name]
    values = [value for value in map(op.argument, arguments) if value is not None]
    meta = op.outputs[0]
    drawn = local.call(random_draw.filled, method, meta.shape, _stride(meta), meta.dtype, meta.device, *values)
    return piece_of_output(local, drawn)


# -- drawn according to values ----------------------------------------------------------------------------------------


@rule_for("aten.multinomial", "aten.poisson", "aten.binomial", "aten.rrelu")
def _by_value_rule(op: Operator) -> Signature | None:
    """Keeps every dim whole. The single device's memory order decides the order of the draws."""
    if len(op.outputs) != 1:
        return None
    if op.name == "aten.rrelu" and not op.argument("training"):
        return parse("... -> ...", op)
    whole = replicated_signature(op)
    return Signature(whole.inputs, whole.outputs, whole.sizes, whole.summed, whole.whole, (), _by_value)


def _by_value(local: Local) -> Ref:
    ordered = [local.call(random_draw.in_order, x, _stride(m)) for x, m in zip(local.inputs, local.op.inputs)]
    args, kwargs = local_arguments(local, ordered)
    return local.call(local.op.target, *args, **kwargs)


# -- traits ------------------------------------------------------------------------------------------------------------------


def _drops_nothing(op: Operator) -> bool:
    return bool(op.inputs) and (op.argument("train", True) is False or op.argument("p", 0.5) == 0)


TRAITS = {
    Traits("random", _drops_nothing, computes=False, kernel="dropout"): "dropout",
    Traits("random"): """
        native_dropout alpha_dropout feature_dropout feature_alpha_dropout binomial poisson rand randn rand_like randn_like
        randint randint_like normal_functional log_normal exponential cauchy geometric random rrelu
    """,
    Traits("random", entry_differs=True): "bernoulli uniform normal",
    Traits("sort"): "randperm",
    Traits("sort", has_gradient=False): "multinomial",
}
register_traits(TRAITS)
