"""Rules of recurrent networks and their cells: samples are free; time, features and parameters are whole.

Dropout between layers draws for the whole batch, of which each rank takes its piece. So a part of the batch runs layer by
layer, with the noise in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardwright.ir.operator import Operator
from shardwright.ir.signature import Signature
from shardwright.rules import random_draw
from shardwright.rules.lowering import Local
from shardwright.rules.notation import parse
from shardwright.rules.pieces import local_arguments, piece, start
from shardwright.rules.pointwise import aten_names
from shardwright.rules.registry import rule_for
from shardwright.rules.traits import Traits, register_traits


@rule_for(*aten_names("gru lstm rnn_tanh rnn_relu"))
def _network(op: Operator) -> Signature | None:
    """Splits the samples of padded sequences.

    It has no rule without a dim of samples, and where a fused kernel drops in an order of its own.
    """
    if op.argument("input") is None or len(op.inputs[0].shape) != 3:
        return None
    drops = _drops(op)
    if drops and (op.inputs[0].device or torch.device("cpu")).type != "cpu":
        return None
    states = len(op.outputs) - 1
    sequence = "b t! {}!" if op.argument("batch_first") else "t! b {}!"
    inputs = [sequence.format("i"), *(f"l{n}! b h{n}!" for n in range(states))]
    outputs = [sequence.format("o"), *(f"l{n}! b h{n}!" for n in range(states))]
    return _parsed(op, inputs, outputs, _with_dropout if drops else None)


@rule_for(*aten_names("gru_cell lstm_cell rnn_tanh_cell rnn_relu_cell"))
def _cell(op: Operator) -> Signature | None:
    if len(op.inputs[0].shape) != 2:
        return None
    states = [f"b h{n}!" for n in range(len(op.outputs))]
    return _parsed(op, ["b i!", *states], states)


def _parsed(op: Operator, inputs: Sequence[str], outputs: Sequence[str], lowering: Any = None) -> Signature:
    """Builds the rule, with the inputs after these whole: the parameters."""
    rest = op.inputs[len(inputs) :]
    whole = [" ".join(f"p{n}_{d}!" for d in range(len(meta.shape))) for n, meta in enumerate(rest)]
    return parse(f"{', '.join([*inputs, *whole])} -> {', '.join(outputs)}", op, None, (), lowering)


def _drops(op: Operator) -> bool:
    return bool(op.argument("train")) and op.argument("dropout") > 0 and op.argument("num_layers") > 1


def _with_dropout(local: Local) -> Any:
    """Emits the layers, with the piece of what is drawn for the whole batch after each but the last."""
    op = local.op
    if not local.split:
        return local.same_call()
    given, made = op.inputs[0], op.outputs[0]
    sample = 0 if op.argument("batch_first") else 1
    shape = (given.shape[1 - sample], given.shape[sample], made.shape[-1])  # layers run with time first
    strides, noises = (shape[1] * shape[2], shape[2], 1), []
    for _ in range(op.argument("num_layers") - 1):
        noise = local.call(random_draw.dropout_noise, shape, strides, made.dtype, made.device, op.argument("dropout"))
        starts, size = [0, start(local, True, 0, sample), 0], local.local_size(True, 0, sample)
        noises.append(local.call(piece, noise, starts, [shape[0], size, shape[2]]))
    args, kwargs = local_arguments(local)
    return local.call_many(len(op.outputs), layers_with_noise, op.target, noises, *args, **kwargs)


def layers_with_noise(
    network: Any, noises: Sequence[Tensor], input: Tensor, hx: Any, params: Sequence[Tensor], has_biases: bool, num_layers: int,
    dropout: float, train: bool, bidirectional: bool, batch_first: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Computes a recurrent network that drops what its layers hand on where the noise is zero.

    Args:
        network: the operator, such as ``aten.gru.input``.
        noises: ones and zeros after each layer but the last, by time, sample and feature.
        input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first: its arguments.
    """
    states = list(hx) if isinstance(hx, (list, tuple)) else [hx]
    ways, each = 1 + bidirectional, len(params) // num_layers
    h, ends = input.transpose(0, 1) if batch_first else input, []
    for layer in range(num_layers):
        own = [state[layer * ways : (layer + 1) * ways] for state in states]
        weights = list(params[layer * each : (layer + 1) * each])
        before = own if isinstance(hx, (list, tuple)) else own[0]
        h, *after = network(h, before, weights, has_biases, 1, 0.0, train, bidirectional, False)
        ends.append(after)
        if layer < num_layers - 1:
            h = random_draw.apply_dropout(h, noises[layer], dropout)
    return h.transpose(0, 1) if batch_first else h, *(torch.cat(parts) for parts in zip(*ends, strict=True))


# -- traits ------------------------------------------------------------------------------------------------------------------


def _weights_per_output(op: Operator) -> float:
    """Computes how many products of weights there are for one element of the result."""
    first = 1 + (len(op.outputs) - 1 if op.argument("num_layers") else len(op.outputs))  # after the states
    weights = sum(meta.numel for meta in op.inputs[first:] if len(meta.shape) == 2)
    return float(weights / max(1, op.outputs[0].shape[-1]))


TRAITS = {
    Traits("matmul", summed=_weights_per_output): "gru lstm rnn_tanh rnn_relu gru_cell lstm_cell rnn_tanh_cell rnn_relu_cell"
}
register_traits(TRAITS)
