"""Saved: what autograd keeps of an operator for its backward, found by running the operator on shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardwright.rules.operator import Operator, Slot, TensorMeta


@dataclass(frozen=True)
class Saved:
    """What the backward of one operator call needs.

    Args:
        inputs, outputs: positions of the tensors that are kept.
        extra: bytes of other tensors that are kept, on the global shapes.
        aliases: output -> the input whose memory it shares.
        guessed: whether the operator could not be run on shapes, and keeps all it might.
    """

    inputs: frozenset[int]
    outputs: frozenset[int]
    extra: float
    aliases: Mapping[int, int]
    guessed: bool = False


NOTHING = Saved(frozenset(), frozenset(), 0.0, {})

_known: dict[tuple[int, tuple[bool, ...], bool], tuple[Operator, Saved]] = {}


def saved_by(op: Operator, needs_grad: tuple[bool, ...], device: str = "cpu") -> Saved:
    """What autograd keeps of ``op``, given which inputs need gradients.

    Args:
        device: kind of device; others than ``"cpu"`` have kernels that keep less of some operators.

    >>> from shardwright.rules.operator import Slot, TensorMeta
    >>> x, w, y = (TensorMeta(shape, torch.float32) for shape in ((8, 16), (4, 16), (8, 4)))
    >>> product = Operator(torch.ops.aten.linear.default, (Slot(0), Slot(1)), {}, (x, w), (y,))
    >>> sorted(saved_by(product, (False, True)).inputs), sorted(saved_by(product, (True, True)).inputs)
    ([0], [0, 1])
    """
    key = (id(op), needs_grad, device == "cpu")
    if key not in _known:
        if len(_known) > 20_000:
            _known.clear()
        fused = None if device == "cpu" or not any(needs_grad) else _fused(op)
        _known[key] = (op, fused or _run(op, needs_grad))
    return _known[key][1]


def _fused(op: Operator) -> Saved | None:
    """What kernels keep of operators that the CPU takes apart: a norm its input, its weight and one number a row."""
    if op.name == "aten.rms_norm":
        rows = op.inputs[0].numel // max(1, op.inputs[0].shape[-1])
        return Saved(frozenset(range(len(op.inputs))), frozenset(), 4.0 * rows, {})
    return None


def _run(op: Operator, needs_grad: tuple[bool, ...]) -> Saved:
    if op.name == "aten.scaled_dot_product_attention" and any(needs_grad) and not op.argument("dropout_p", 0.0):
        # real devices have kernels that keep no scores; on the meta device it would be decomposed
        rows = op.inputs[0].numel // max(1, op.inputs[0].shape[-1])
        return Saved(frozenset(range(len(op.inputs))), frozenset((0,)), 4.0 * rows, {})
    kept: list[Tensor] = []
    try:
        with torch.enable_grad():
            tensors = [_tensor(meta, needs) for meta, needs in zip(op.inputs, needs_grad)]
            args, kwargs = _filled((list(op.args), dict(op.kwargs)), tensors)

            def keep(tensor: Tensor) -> Tensor:
                kept.append(tensor)
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                result = op.target(*args, **kwargs)
    except Exception:  # whatever an operator may raise on meta tensors
        floats = frozenset(i for i, meta in enumerate(op.inputs) if meta.differentiable)
        return Saved(floats, frozenset(range(len(op.outputs))), 0.0, {}, True) if any(needs_grad) else NOTHING
    outputs = [t for t in (result if isinstance(result, (tuple, list)) else (result,)) if isinstance(t, Tensor)]
    return _sorted(tensors, outputs, kept)


def _sorted(tensors: list[Tensor], outputs: list[Tensor], kept: list[Tensor]) -> Saved:
    of_input = {_memory(t): i for i, t in reversed(list(enumerate(tensors)))}
    of_output = {_memory(t): i for i, t in reversed(list(enumerate(outputs))) if _memory(t) not in of_input}
    inputs, mine, extra, seen = set(), set(), 0.0, set()
    for tensor in kept:
        memory = _memory(tensor)
        if memory in of_input:
            inputs.add(of_input[memory])
        elif memory in of_output:
            mine.add(of_output[memory])
        elif memory not in seen:
            seen.add(memory)
            extra += tensor.untyped_storage().nbytes() if tensor.untyped_storage().nbytes() else tensor.nbytes
    aliases = {i: of_input[_memory(t)] for i, t in enumerate(outputs) if _memory(t) in of_input}
    return Saved(frozenset(inputs), frozenset(mine), extra, aliases)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensor(meta: TensorMeta, needs: bool) -> Tensor:
    if meta.stride and len(meta.stride) == len(meta.shape):
        made = torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device="meta")
    else:
        made = torch.empty(meta.shape, dtype=meta.dtype, device="meta")
    return made.requires_grad_(needs and meta.differentiable)


def _filled(value: Any, tensors: list[Tensor]) -> Any:
    """The arguments with tensors in their places, on the meta device."""
    if isinstance(value, Slot):
        return tensors[value.index]
    if isinstance(value, torch.device):
        return torch.device("meta")
    if isinstance(value, (list, tuple)):
        filled = [_filled(v, tensors) for v in value]
        return tuple(filled) if isinstance(value, tuple) else filled
    if isinstance(value, dict):
        return {k: _filled(v, tensors) for k, v in value.items()}
    return value
