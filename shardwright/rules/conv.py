"""Rules of convolutions, pooling and resampling: batch and channels are free, spatial dims are whole.

Input channels of a convolution are summed, so splitting them leaves a partial sum, to which the bias is added after its
reduction. With groups, the groups are what is split: ``(g c)`` in, ``(g o)`` out.

Unpooling, fractional pooling and ``affine_grid_generator`` have no rule, so they run whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from shardwright.ir.instructions import Ref
from shardwright.ir.operator import Operator
from shardwright.ir.signature import Signature
from shardwright.rules.lowering import Local
from shardwright.rules.notation import parse
from shardwright.rules.pieces import (
    call_unless_empty,
    guarded_same_call,
    local_arguments,
    names,
    notation,
    of_sizes,
)
from shardwright.rules.registry import rule_for
from shardwright.rules.traits import Traits, register_traits

# -- convolutions -----------------------------------------------------------------------------------------------------


@rule_for("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution")
@rule_for("aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d")
def _convolution_rule(op: Operator) -> Signature | None:
    """Builds ``n c+ spatial, o c+ kernel, o -> n o spatial``. A transposed convolution has its weight as ``c o kernel``."""
    if any(meta.numel == 0 for meta in (*op.inputs, *op.outputs)):
        return None
    spatial = len(op.inputs[1].shape) - 2
    batch = ["n"] * (len(op.inputs[0].shape) - spatial - 1)
    before, kernel, after = ([f"{side}{i}!" for i in range(spatial)] for side in "xky")
    groups = op.argument("groups", 1)
    if groups == 1:
        channels, features, sizes = "c+", "o", {}
        weight = [channels, features] if _is_transposed(op) else [features, channels]
    else:
        channels, features = "(g c!)", "(g o!)"
        sizes = {"g": groups, "c": _channels(op, batch) // groups, "o": op.outputs[0].shape[len(batch)] // groups}
        weight = [channels, "o!"] if _is_transposed(op) else [features, "c!"]
    bias = [[features]] if len(op.inputs) == 3 else []
    inputs = [[*batch, channels, *before], [*weight, *kernel], *bias]
    late = [2] if bias and groups == 1 else []
    return parse(notation(inputs, [[*batch, features, *after]]), op, sizes, (), _convolution, late)


def _is_transposed(op: Operator) -> bool:
    return "transpose" in op.name or bool(op.argument("transposed"))


def _channels(op: Operator, batch: Sequence[str]) -> int:
    return op.inputs[0].shape[len(batch)]


def _convolution(local: Local) -> tuple[Ref, ...]:
    args, kwargs = local_arguments(local)
    if "g" in local.split:
        return call_unless_empty(local, *_replaced(local.op, args, kwargs, groups=_local_groups(local)))
    if "c" not in local.split:
        return call_unless_empty(local, args, kwargs)
    if len(local.inputs) < 3:
        return call_unless_empty(local, args, kwargs)
    (part,) = call_unless_empty(local, *_replaced(local.op, args, kwargs, bias=None))
    spatial = len(local.op.inputs[1].shape) - 2
    return (local.call(add_channel_bias, local.settle(part), local.inputs[2], spatial),)


def _local_groups(local: Local) -> Any:
    """Counts the groups that the rank has; 1 if it has none, and nothing to convolve."""
    dim = len(local.op.outputs[0].shape) - len(local.op.inputs[1].shape) + 1
    each = local.signature.sizes["o"]
    return of_sizes(lambda size: max(1, size // each), local.local_size(True, 0, dim))


def _replaced(op: Operator, args: Sequence[Any], kwargs: dict[str, Any], **changes: Any) -> tuple[list[Any], Any]:
    """Returns the arguments with some replaced by their schema name."""
    args, kwargs = list(args), dict(kwargs)
    order = [argument.name for argument in op.target._schema.arguments]  # type: ignore[attr-defined]
    for name, value in changes.items():
        if order.index(name) < len(args):
            args[order.index(name)] = value
        else:
            kwargs[name] = value
    return args, kwargs


def add_channel_bias(x: Tensor, bias: Tensor, spatial: int) -> Tensor:
    """Adds one number per channel to ``x``, in the dtype of ``x``. Channels stand before ``spatial`` dims."""
    return x + bias.to(x.dtype).reshape(-1, *([1] * spatial))


# -- pooling and resampling -------------------------------------------------------------------------------------------


@rule_for("aten.max_pool1d", "aten.avg_pool1d", "aten.adaptive_avg_pool1d", "aten.adaptive_max_pool1d")
@rule_for("aten.max_pool1d_with_indices", "aten.upsample_linear1d", "aten.upsample_nearest1d")
@rule_for("aten._upsample_nearest_exact1d")
def _planes_1d(op: Operator) -> Signature | None:
    return _planes(op, 1)


@rule_for("aten.max_pool2d", "aten.avg_pool2d", "aten.adaptive_avg_pool2d", "aten.adaptive_max_pool2d")
@rule_for("aten.max_pool2d_with_indices", "aten.upsample_nearest2d", "aten.upsample_bilinear2d")
@rule_for("aten.upsample_bicubic2d", "aten._upsample_nearest_exact2d", "aten._upsample_bilinear2d_aa")
@rule_for("aten._upsample_bicubic2d_aa")
def _planes_2d(op: Operator) -> Signature | None:
    return _planes(op, 2)


@rule_for("aten.max_pool3d", "aten.avg_pool3d", "aten.adaptive_avg_pool3d", "aten.adaptive_max_pool3d")
@rule_for("aten.max_pool3d_with_indices", "aten.upsample_nearest3d", "aten.upsample_trilinear3d")
@rule_for("aten._upsample_nearest_exact3d")
def _planes_3d(op: Operator) -> Signature | None:
    return _planes(op, 3)


def _planes(op: Operator, spatial: int) -> Signature | None:
    """Builds the rule of an operator that treats each plane (line, volume) separately: batch and channels are free."""
    if len(op.inputs) != 1 or op.inputs[0].numel == 0:
        return None
    outside = names(len(op.inputs[0].shape) - spatial)
    before, after = ([*outside, *(f"{side}{i}!" for i in range(spatial))] for side in "xy")
    return parse(notation([before], [after] * len(op.outputs)), op, None, (), guarded_same_call)


# -- space and channels -----------------------------------------------------------------------------------------------


@rule_for("aten.pixel_shuffle", "aten.pixel_unshuffle")
def _pixel_shuffle_rule(op: Operator) -> Signature | None:
    """Builds ``(c p q) h w -> c (h p) (w q)`` and its inverse. Channels and both sides of the picture are free."""
    packed, wide = (op.inputs[0], op.outputs[0]) if op.name == "aten.pixel_shuffle" else (op.outputs[0], op.inputs[0])
    if packed.numel == 0:
        return None
    outside = names(len(packed.shape) - 3)
    by = wide.shape[-1] // packed.shape[-1]
    sizes = {"c": wide.shape[-3], "h": packed.shape[-2], "w": packed.shape[-1], "p": by, "q": by}
    sides = [[*outside, "(c p! q!)", "h", "w"], [*outside, "c", "(h p!)", "(w q!)"]]
    before, after = sides if op.name == "aten.pixel_shuffle" else sides[::-1]
    return parse(notation([before], [after]), op, sizes, (), guarded_same_call)


@rule_for("aten.channel_shuffle")
def _channel_shuffle_rule(op: Operator) -> Signature | None:
    """Keeps channels whole; everything else is free."""
    if op.inputs[0].numel == 0:
        return None
    dims = names(len(op.inputs[0].shape))
    before, after = ([dims[0], channel, *dims[2:]] for channel in ("in!", "out!"))
    return parse(notation([before], [after]), op, None, (), guarded_same_call)


@rule_for("aten.im2col", "aten.col2im")
def _columns_rule(op: Operator) -> Signature | None:
    """Builds ``n c h w -> n (c k) l`` and its inverse. Batch and channels are free."""
    picture, columns = (op.inputs[0], op.outputs[0]) if op.name == "aten.im2col" else (op.outputs[0], op.inputs[0])
    if picture.numel == 0 or columns.numel == 0:
        return None
    batch = ["n"] * (len(columns.shape) - 2)
    sizes = {"c": picture.shape[-3], "k": columns.shape[-2] // picture.shape[-3]}
    sides = [[*batch, "c", "h!", "w!"], [*batch, "(c k!)", "l!"]]
    before, after = sides if op.name == "aten.im2col" else sides[::-1]
    return parse(notation([before], [after]), op, sizes, (), guarded_same_call)


@rule_for("aten.grid_sampler")
def _grid_sampler_rule(op: Operator) -> Signature | None:
    """Splits the points, which each rank samples from whole pictures."""
    spatial = len(op.inputs[0].shape) - 2
    read, points = [f"x{i}!" for i in range(spatial)], names(spatial, "p")
    inputs = [["n", "c", *read], ["n", *points, "coordinates!"]]
    return parse(notation(inputs, [["n", "c", *points]]), op, None, (), guarded_same_call)


# -- traits ------------------------------------------------------------------------------------------------------------------


def _workspace(args: Sequence[Any], results: Sequence[Tensor]) -> float:
    transposed = args[6]
    return float(sum(t.nbytes for t in (*args[:2], results[0]))) if transposed else float(results[0].nbytes)


TRAITS = {
    Traits("conv", new_gradients=True, half=True): "conv1d conv2d conv3d",
    Traits("conv", new_gradients=True, half=True, workspace=_workspace): "convolution",
    Traits("conv", transposed=True): "conv_transpose1d conv_transpose2d conv_transpose3d",
    Traits("copy"): "im2col col2im pixel_shuffle pixel_unshuffle channel_shuffle",
}
register_traits(TRAITS)
