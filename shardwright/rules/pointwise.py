"""Rules of pointwise operators: every dim of the output is free, and inputs broadcast against it.

One rule serves them all: each dim of an input is the output's dim it lines up with from the right, or, where its size
is 1 and the output's is not, a dim that every rank holds whole.
"""

from __future__ import annotations

import torch

from shardwright.ir.operator import Operator, Slot
from shardwright.ir.signature import Signature
from shardwright.rules.notation import parse
from shardwright.rules.registry import rule_for
from shardwright.rules.traits import Traits, lies_in_order, register_traits


def aten_names(text: str) -> tuple[str, ...]:
    """Returns the full names of ATen operators.

    >>> aten_names("add mul")
    ('aten.add', 'aten.mul')
    """
    return tuple(f"aten.{name}" for name in text.split())


UNARY = aten_names("""
    abs absolute acos acosh alias angle arccos arccosh arcsin arcsinh arctan arctanh asin asinh atan atanh bitwise_not
    ceil celu clip clone contiguous cos cosh deg2rad detach digamma elu erf erfc erfinv exp exp2 expm1 fix floor frac
    gelu hardshrink hardsigmoid hardswish hardtanh i0 isfinite isinf isnan isneginf isposinf isreal leaky_relu lgamma
    lift_fresh_copy log log10 log1p log2 log_sigmoid logical_not logit mish nan_to_num neg negative positive rad2deg
    reciprocal relu relu6 round rsqrt selu sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink special_erf
    special_erfc special_erfcx special_expit special_expm1 special_log1p special_log_ndtr special_ndtr special_psi sqrt
    square tan tanh threshold trunc _to_copy zeros_like ones_like full_like empty_like
""")

BINARY = aten_names("""
    __and__ __lshift__ __or__ __rshift__ __xor__ add arctan2 atan2 bitwise_and bitwise_left_shift bitwise_or
    bitwise_right_shift bitwise_xor complex copysign div divide eq fill float_power floor_divide fmax fmin fmod ge
    greater greater_equal gt heaviside hypot isclose ldexp le less less_equal logaddexp logaddexp2 logical_and
    logical_or logical_xor lt masked_fill maximum minimum mul multiply ne nextafter not_equal polar pow remainder rsub
    special_xlog1py special_xlogy sub subtract true_divide xlogy
""")

DIVIDE = torch.ops.aten.div.Tensor
PAST_AUTOGRAD = ("shardwright_opaque.written_past_autograd",)
TERNARY = aten_names("addcdiv addcmul clamp clamp_max clamp_min lerp where")

KEEPS_VALUES = aten_names("alias clone contiguous detach neg negative positive to _to_copy lift_fresh_copy zeros_like")
SCALES = aten_names("mul multiply div divide true_divide")
ADDS = aten_names("add sub subtract rsub")


@rule_for(*UNARY, *BINARY, *TERNARY, *PAST_AUTOGRAD)
def pointwise(op: Operator) -> Signature | None:
    """Returns the rule of a pointwise call with any number of tensor inputs."""
    if not op.inputs or len(op.outputs) != 1:
        return None
    return parse(f"{', '.join(['...'] * len(op.inputs))} -> ...", op, None, _linear(op))


def _linear(op: Operator) -> tuple[tuple[int, ...], ...]:
    """Returns the inputs in which the call is linear: no cast, no broadcasting, no constant term."""
    output = op.outputs[0]
    if any(meta.dtype != output.dtype or meta.shape != output.shape for meta in op.inputs):
        return ()
    if op.name in ADDS and len(op.inputs) == 2:
        return ((0, 1),)
    if len(op.inputs) != 1:
        return ()
    scales = op.name in SCALES and op.argument("rounding_mode") is None and isinstance(op.args[0], Slot)
    return ((0,),) if scales or op.name in KEEPS_VALUES else ()


def is_linear_alone(op: Operator, index: int) -> bool:
    """Tells whether an operator is linear in one input while the others stay as they are: a product, a quotient, a cast."""
    if op.name in SCALES and op.argument("rounding_mode") is None:
        slots = [argument.index for argument in op.args if isinstance(argument, Slot)]
        return index in (
            slots if op.name in ("aten.mul", "aten.multiply") else slots[:1] if isinstance(op.args[0], Slot) else ()
        )
    return op.name in ("aten.to", "aten._to_copy") and op.inputs[0].differentiable and op.outputs[0].differentiable


def adds_constant(op: Operator) -> int | None:
    """Returns the position of the number that an operator adds to its only tensor input; ``None`` if it adds none."""
    if op.name not in ADDS or len(op.inputs) != 1:
        return None
    return next((at for at, argument in enumerate(op.args[:2]) if isinstance(argument, (int, float))), None)


@rule_for("aten.to", "aten.type_as")
def _cast(op: Operator) -> Signature | None:
    """Splits the first input. The second, of which only the dtype matters, follows if it has the same dims, else is whole."""
    if len(op.inputs) == 1 or op.inputs[1].shape == op.inputs[0].shape:
        return pointwise(op)
    other = " ".join(f"w{i}!" for i in range(len(op.inputs[1].shape)))
    return parse(f"..., {other} -> ...", op)


@rule_for("aten.prelu")
def _prelu(op: Operator) -> Signature:
    """Splits a slope per channel, which are dim 1, with the channels; one slope for all is whole."""
    ndim, slope = len(op.inputs[0].shape), op.inputs[1]
    dims = [f"d{i}" for i in range(ndim)]
    shared = slope.numel == 1
    weight = " ".join(("1" if shared else "d1") for _ in slope.shape)
    return parse(f"{' '.join(dims)}, {weight} -> {' '.join(dims)}", op)


@rule_for("aten.glu")
def _glu(op: Operator) -> Signature:
    """Keeps the dim whole whose halves meet elementwise."""
    ndim = len(op.inputs[0].shape)
    dim = op.argument("dim", -1) % ndim
    before = " ".join("both!" if i == dim else f"d{i}" for i in range(ndim))
    after = " ".join("half!" if i == dim else f"d{i}" for i in range(ndim))
    return parse(f"{before} -> {after}", op)


# -- traits ------------------------------------------------------------------------------------------------------------------


def _keeps_dtype(op: Operator) -> bool:
    return bool(op.inputs and op.outputs) and op.inputs[0].dtype == op.outputs[0].dtype


# All others are pointwise, and nothing else is known about them.
TRAITS = {
    Traits(backward="handed on", linear=True): "add subtract",
    Traits(backward="handed on", linear=True, entry_differs=True): "sub rsub",
    Traits(linear=True): "neg negative",
    Traits(entry_differs=True): "clamp div pow where",
    Traits(has_gradient=False): """
        eq ge greater greater_equal gt isclose isfinite isinf isnan isneginf isposinf isreal le less less_equal
        logical_and logical_not logical_or logical_xor lt ne not_equal signbit
    """,
    Traits("copy", backward="handed on", linear=True, computes=False): "clone",
    Traits("copy", lies_in_order, linear=True, computes=False): "contiguous",
    Traits("copy", _keeps_dtype, linear=True, computes=False, entry_differs=True): "to",
    Traits("copy", _keeps_dtype, linear=True, entry_differs=True): "type_as",
    Traits("copy", linear=True, entry_differs=True): "_to_copy",
    Traits("copy", linear=True): "lift_fresh_copy",
    Traits("create"): "zeros_like ones_like full_like",
    Traits("create", entry_differs=True): "fill",
    Traits("view", linear=True): "alias detach",
    Traits("view"): "empty_like",
}
register_traits(TRAITS)
