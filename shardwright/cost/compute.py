"""Compute: prices operators on one rank, by the roofline of their family.

An operator takes the longer of its operations at the rate its family reaches and its bytes at the memory's bandwidth
(Williams, Waterman and Patterson, "Roofline: an insightful visual performance model", 2009), and a launch. Its backward
takes: a product one product for each operand that needs a gradient, attention two and a half times its forward (five
products for two: Dao et al., "FlashAttention", 2022), the others the bytes of the gradients and of what they kept.
Convolutions are products that work on whole blocks of channels (:mod:`shardwright.cost.convolution`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from shardwright.cost.convolution import Channels, channels_of, is_product, padding
from shardwright.cost.operations import flops
from shardwright.ir.machine import Machine
from shardwright.ir.operator import Operator
from shardwright.rules.traits import family, traits_of

Array = np.ndarray[Any, Any]

# Passes of families over their tensors, relative to one read and one write.
_PASSES = {"norm": 2.0, "softmax": 2.0, "random": 2.0, "sort": 8.0}
# Cost of attention's backward, relative to its forward; other backwards follow from operands and bytes.
_ATTENTION_BACKWARD = 2.5


# -- seconds --------------------------------------------------------------------------------------------------------------


def local_seconds(
    op: Operator,
    machine: Machine,
    fraction: Array,
    input_bytes: Array,
    output_bytes: Array,
    needs_grad: Sequence[bool],
    channels: Channels | None = None,
) -> tuple[Array, Array]:
    """Prices the forward and the backward, in seconds, for each of ``C`` choices.

    Args:
        op: the operator on global tensors.
        machine: the machine.
        fraction: ``(C,)``, share of the operator's work that a rank does.
        input_bytes, output_bytes: ``(I, C)`` and ``(O, C)``, bytes that a rank holds of each tensor.
        needs_grad: for each input, whether its gradient is needed.
        channels: channels of a convolution on a rank, ``(C,)``; default: all of them.
    """
    kind = family(op)
    if kind == "view":
        return _view_seconds(op, machine, input_bytes, output_bytes, len(fraction), any(needs_grad))
    traffic, launch = traffic_seconds(op, machine, input_bytes, output_bytes), machine.operator_launch
    if kind == "conv" and not is_product(op):
        work = work_seconds(op, machine) * fraction
        return _convolution_seconds(machine, work, traffic, needs_grad, channels or channels_of(op))
    forward = np.maximum(work_seconds(op, machine) * fraction, traffic)
    if not any(needs_grad):
        return forward + launch, np.zeros_like(forward)
    if kind in ("matmul", "conv"):
        products = _operands_with_gradient(op, needs_grad)
        if products:
            return forward + launch, products * (forward + launch)
    if kind == "attention":
        return forward + launch, _ATTENTION_BACKWARD * forward + launch
    return forward + launch, _memory_bound_backward(op, machine, input_bytes, output_bytes, needs_grad) + launch


def _convolution_seconds(
    machine: Machine, work: Array, traffic: Array, needs_grad: Sequence[bool], channels: Channels
) -> tuple[Array, Array]:
    """Prices the forward, and one product per gradient, each with its own padding.

    The gradient of a bias comes with the weight's.
    """
    launch = machine.operator_launch + machine.convolution_launch
    forward, *products = (np.maximum(work * more, traffic) + launch for more in padding(channels, machine.channel_block))
    wanted = [seconds for seconds, needed in zip(products, needs_grad) if needed]
    bias_alone = traffic + machine.operator_launch if any(needs_grad) else np.zeros_like(forward)
    return forward, np.sum(wanted, axis=0) if wanted else bias_alone


def _memory_bound_backward(
    op: Operator, machine: Machine, input_bytes: Array, output_bytes: Array, needs_grad: Sequence[bool]
) -> Array:
    """Prices a backward by memory. It reads the output's gradient and saved tensors, and writes the inputs' gradients."""
    if traits_of(op).backward == "handed on":
        summed = [meta.numel < op.outputs[0].numel and wanted for meta, wanted in zip(op.inputs, needs_grad)]
        is_broadcast = family(op) != "reduce"
        return output_bytes.sum(axis=0) * (sum(summed) * is_broadcast) / machine.bandwidth_of("reduce")
    written = input_bytes[np.asarray(needs_grad, dtype=bool)].sum(axis=0)
    if family(op) == "random":  # the random numbers exist already
        return (output_bytes.sum(axis=0) + 2 * written) / machine.bandwidth_of("pointwise")
    return traffic_seconds(op, machine, input_bytes, output_bytes, written)


def work_seconds(op: Operator, machine: Machine) -> float:
    """Prices the forward's operations on the whole tensors, without a limit by memory, in seconds."""
    meta = op.inputs[0] if op.inputs else op.outputs[0]
    work, kind = flops(op), family(op)
    if kind == "conv" and is_product(op):
        kind = "matmul"
    return work / machine.rate(kind, str(meta.dtype).removeprefix("torch.")) if work else 0.0


def traffic_seconds(
    op: Operator, machine: Machine, input_bytes: Array, output_bytes: Array, more: Array | float = 0.0
) -> Array:
    """Prices reading the inputs and writing the outputs and ``more`` bytes, in seconds, ``(C,)``.

    Args:
        op: the operator on global tensors.
        machine: the machine.
        input_bytes, output_bytes: ``(I, C)`` and ``(O, C)``, bytes that a rank holds of each tensor.
        more: further bytes, ``(C,)``.
    """
    kind = family(op)
    written = output_bytes.sum(axis=0)
    if kind == "index" and len(op.inputs) > 1 and op.outputs and op.inputs[0].numel > op.outputs[0].numel:
        read = input_bytes[1:].sum(axis=0) + written  # a lookup reads only the rows it takes
    else:
        read = input_bytes.sum(axis=0)
    return np.asarray((read + written + more) * _PASSES.get(kind, 1.0) / machine.bandwidth_of(kind))


def _view_seconds(
    op: Operator, machine: Machine, input_bytes: Array, output_bytes: Array, count: int, grad: bool
) -> tuple[Array, Array]:
    """Prices a view, which is free except for the call on a CPU. Some gradients are copied."""
    forward = np.full(count, machine.operator_launch / 2 if machine.device == "cpu" else 0.0)
    if not grad:
        return forward, np.zeros(count)
    kind, backward = traits_of(op).backward, forward
    if kind == "in zeros" and len(output_bytes) == 1 and op.outputs[0].numel < op.inputs[0].numel:
        copied = input_bytes.sum(axis=0) + 2 * output_bytes.sum(axis=0)
        backward = copied / machine.bandwidth_of("copy") + machine.operator_launch
    elif kind == "in zeros" and len(output_bytes) > 1:
        backward = 2 * output_bytes.sum(axis=0) / machine.bandwidth_of("copy") + machine.operator_launch
    elif kind == "summed" and op.inputs and op.outputs[0].numel > op.inputs[0].numel:
        summed = input_bytes.sum(axis=0) + output_bytes.sum(axis=0)
        backward = summed / machine.bandwidth_of("reduce") + machine.operator_launch
    return forward, backward


def _operands_with_gradient(op: Operator, needs_grad: Sequence[bool]) -> int:
    """Counts the operands of a product, out of two, that need a gradient. Biases are no operands."""
    first = traits_of(op).operands
    return sum(map(bool, list(needs_grad)[first : first + 2]))


def optimizer_seconds(parameter_bytes: Array, optimizer_bytes_per_byte: float, machine: Machine) -> Array:
    """Prices an optimizer's step over what a rank stores: it reads and writes parameters and states, and reads gradients.

    Args:
        parameter_bytes: bytes of parameters, any shape.
        optimizer_bytes_per_byte: bytes of optimizer state per byte of parameter: 2 for Adam, 1 for momentum, 0 for SGD.
        machine: the machine.

    ``machine.optimizer_launch`` seconds per parameter come on top; 0 if optimizers update all tensors together.
    """
    return machine.optimizer_launch + parameter_bytes * (3 + 2 * optimizer_bytes_per_byte) / machine.bandwidth_of("optimizer")
