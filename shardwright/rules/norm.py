"""Rules of normalisations: the dims whose statistics are taken stay whole, all others are free.

Batch norm in training takes its statistics over the batch, which may still be split: each rank's mean and squared deviation
are gathered and merged into those of the whole batch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from shardwright.ir.instructions import Ref, writes
from shardwright.ir.layout import Layout
from shardwright.ir.operator import Operator, Slot
from shardwright.ir.signature import Signature
from shardwright.rules.lowering import Local
from shardwright.rules.notation import parse
from shardwright.rules.pieces import call_unless_empty, guarded_same_call, local_arguments, of_sizes
from shardwright.rules.reduce import wide
from shardwright.rules.registry import rule_for
from shardwright.rules.traits import Traits, register_traits

# -- over the last dims -------------------------------------------------------------------------------------------


@rule_for("aten.layer_norm", "aten.rms_norm", "aten.native_layer_norm")
def _last_dims(op: Operator) -> Signature:
    """Keeps the last dims whole, which weight and bias have too. Mean and deviation, where returned, have size 1 there."""
    count = len(op.argument("normalized_shape"))
    dims = " ".join(f"n{i}!" for i in range(count))
    scales = f", {dims}" * (len(op.inputs) - 1)
    statistics = f", ... {' '.join(['1'] * count)}" * (len(op.outputs) - 1)
    return parse(f"... {dims}{scales} -> ... {dims}{statistics}", op)


# -- over groups of channels ----------------------------------------------------------------------------------------


@rule_for("aten.group_norm")
def _group_norm(op: Operator) -> Signature:
    """Makes channels ``(g c)``: whole groups may be on different ranks."""
    groups, shape = op.argument("num_groups"), op.inputs[0].shape
    dims = f"n (g c!) {_spatial(shape, '!')}"
    sizes = {"g": groups, "c": shape[1] // groups}
    return parse(f"{dims}{', (g c!)' * (len(op.inputs) - 1)} -> {dims}", op, sizes, (), _local_groups)


def _spatial(shape: tuple[int, ...], mark: str) -> str:
    """Returns the dims after samples and channels."""
    return " ".join(f"s{i}{mark}" for i in range(len(shape) - 2))


def _local_groups(local: Local) -> Any:
    """Emits the call with the groups of the local channels; at least one, since torch refuses none."""
    args, kwargs = local_arguments(local)
    args[1] = of_sizes(lambda channels: channels // local.signature.sizes["c"], local.local_size(False, 0, 1))
    return call_unless_empty(local, args, kwargs)


# -- over each channel of each sample -------------------------------------------------------------------------------


@rule_for("aten.instance_norm")
def _instance_norm(op: Operator) -> Signature | None:
    """Frees samples and channels, unless running statistics are to be updated."""
    fixed = not op.argument("use_input_stats")
    if isinstance(op.argument("running_mean"), Slot) and not fixed:
        return None
    dims = f"n c {_spatial(op.inputs[0].shape, '' if fixed else '!')}"
    return parse(f"{dims}{', c' * (len(op.inputs) - 1)} -> {dims}", op, None, (), guarded_same_call)


# -- over the whole batch -------------------------------------------------------------------------------------------


@rule_for("aten.batch_norm")
def _batch_norm(op: Operator) -> Signature:
    """Frees everything if statistics are given. In training a lowering lets the batch be split.

    Running statistics are updated in place: each rank then holds them whole, so channels stay whole.
    """
    training, running = op.argument("training"), isinstance(op.argument("running_mean"), Slot)
    channel = "c!" if training and running else "c"
    dims = f"n {channel} {_spatial(op.inputs[0].shape, '!' if training else '')}"
    lowering = _whole_batch_statistics if training else guarded_same_call
    return parse(f"{dims}{f', {channel}' * (len(op.inputs) - 1)} -> {dims}", op, None, (), lowering)


def _whole_batch_statistics(local: Local) -> Any:
    if not local.axes_of("n"):
        return guarded_same_call(local)
    op, x = local.op, local.inputs[0]
    counts, pieces = _counts(local), _pieces_layout(local)
    shape, dtype = (len(counts), 2, op.inputs[0].shape[1]), wide(op.inputs[0].dtype)
    whole = Layout.of(local.mesh, ((), *pieces.bound[1:]), (), pieces.sizes)
    gathered = local.move(local.call(piece_statistics, x), shape, pieces, whole, (), dtype)
    mean, variance = _optional(local, "running_mean"), _optional(local, "running_var")
    if mean is not None and variance is not None:
        local.call(update_running, mean, variance, gathered, counts, op.argument("momentum"))
    gathered = local.move(gathered, shape, whole, whole, local.axes_of("n"), dtype)
    weight, bias = _optional(local, "weight"), _optional(local, "bias")
    return (local.call(normalised, x, gathered, counts, weight, bias, op.argument("eps")),)


def _optional(local: Local, name: str) -> Ref | None:
    slot = local.op.argument(name)
    return local.inputs[slot.index] if isinstance(slot, Slot) else None


def _counts(local: Local) -> list[int]:
    """Counts the elements per channel of each piece of the batch, in order."""
    shape = local.op.inputs[0].shape
    return [piece * math.prod(shape[2:]) for piece in local.input_layouts[0].pieces(0, shape[0])]


def _pieces_layout(local: Local) -> Layout:
    """Returns the layout of the statistics of all pieces, of global shape ``(pieces, 2, C)``."""
    layout = local.input_layouts[0]
    return Layout.of(local.mesh, (local.axes_of("n"), (), layout.bound[1]), (), (None, None, layout.sizes[1]))


def piece_statistics(x: Tensor) -> Tensor:
    """Computes mean and squared deviation per channel, as ``(1, 2, C)``. A piece without elements gives zeros."""
    dims = [d for d in range(x.ndim) if d != 1]
    x = x.to(wide(x.dtype))
    if not x.numel():
        return torch.stack((x.sum(dims), x.sum(dims))).unsqueeze(0)
    variance, mean = torch.var_mean(x, dims, correction=0)
    return torch.stack((mean, variance * (x.numel() // x.shape[1]))).unsqueeze(0)


def merged_statistics(pieces: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """Merges statistics of several pieces into mean and variance.

    They have shape ``(pieces, 2, C)``, of ``counts`` elements each.

    Source: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.
    """
    means, deviations = pieces.unbind(1)
    weights = torch.tensor(counts, dtype=pieces.dtype, device=pieces.device).unsqueeze(1)
    mean = (means * weights).sum(0) / sum(counts)
    deviation = deviations.sum(0) + ((means - mean).square() * weights).sum(0)
    return mean, deviation / sum(counts)


def normalised(x: Tensor, pieces: Tensor, counts: list[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Computes ``(x - mean) / sqrt(variance + eps)``, scaled and shifted, from all pieces' statistics.

    Args:
        x: the local input.
        pieces: statistics of shape ``(pieces, 2, C)``.
        counts: elements per channel in each piece.
        weight, bias: one number per channel, or None.
        eps: is added to the variance.
    """
    mean, variance = merged_statistics(pieces, counts)
    result = (x.to(mean.dtype) - channels_of(mean, x)) * channels_of((variance + eps).rsqrt(), x)
    if weight is not None:
        result = result * channels_of(weight, x)
    return (result if bias is None else result + channels_of(bias, x)).to(x.dtype)


def channels_of(value: Tensor, x: Tensor) -> Tensor:
    """Shapes a tensor of one element per channel to broadcast against ``x``."""
    return value.view([1, x.shape[1]] + [1] * (x.ndim - 2))


@torch.no_grad()
@writes(0, 1)
def update_running(running_mean: Tensor, running_var: Tensor, pieces: Tensor, counts: list[int], momentum: float) -> Tensor:
    """Moves the running statistics in place, with the unbiased variance, as ``batch_norm`` does. Returns the mean.

    Args:
        running_mean, running_var: one number per channel.
        pieces: statistics of shape ``(pieces, 2, C)``.
        counts: elements per channel in each piece.
        momentum: weight of the new statistics.
    """
    mean, variance = merged_statistics(pieces, counts)
    unbiased = variance * (sum(counts) / max(sum(counts) - 1, 1))
    running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    return running_mean.lerp_(mean.to(running_mean.dtype), momentum)


# -- traits ------------------------------------------------------------------------------------------------------------------

TRAITS = {
    Traits("norm", fused=True): "layer_norm group_norm",
    Traits("norm", fused=True, kernel="norm"): "rms_norm",
    Traits("norm", fused=True, user_order=(0, 3, 4, 1, 2)): "batch_norm",
    Traits("norm"): "native_layer_norm instance_norm",
    Traits(has_gradient=False): "update_running",  # called by the lowering above
}
register_traits(TRAITS)
