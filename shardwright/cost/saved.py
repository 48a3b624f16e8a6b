"""Saved: finds what autograd saves for an operator's backward, by running the operator on shapes only."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardwright.base.torch_private import fused_attention_choice
from shardwright.ir.operator import Operator, Slot, TensorMeta
from shardwright.rules.traits import traits_of


@dataclass(frozen=True)
class Saved:
    """Tensors that the backward of one operator call needs.

    Args:
        inputs, outputs: positions of the tensors that are saved.
        extra: shape and bytes per element of other tensors that are saved, on the global shapes.
        aliases: output -> the input whose memory it shares.
        guessed: whether the operator could not be run on shapes, and counts all it might save.
    """

    inputs: frozenset[int]
    outputs: frozenset[int]
    extra: tuple[tuple[tuple[int, ...], int], ...]
    aliases: Mapping[int, int]
    guessed: bool = False

    @property
    def extra_bytes(self) -> float:
        """Bytes of saved tensors besides inputs and outputs."""
        return float(sum(math.prod(shape) * size for shape, size in self.extra))


NOTHING = Saved(frozenset(), frozenset(), (), {})

_by_call: dict[tuple[int, tuple[bool, ...], bool, Any], tuple[Operator, Saved]] = {}
_by_structure: dict[Hashable, Saved] = {}
_MOST = 20_000


def saved_by(op: Operator, needs_grad: tuple[bool, ...], device: str = "cpu", autocast: tuple[Any, ...] | None = None) -> Saved:
    """Finds what autograd saves for ``op``, given which inputs need gradients.

    Args:
        op: the operator on global tensors.
        needs_grad: for each input, whether it needs a gradient.
        device: kind of device; others than ``"cpu"`` have kernels that save less for some operators.
        autocast: device, dtype and whether it is on, as a node of a graph carries it.

    Calls that are equal are run only once.

    >>> from shardwright.ir.operator import Slot, TensorMeta
    >>> x, w, y = (TensorMeta(shape, torch.float32) for shape in ((8, 16), (4, 16), (8, 4)))
    >>> product = Operator(torch.ops.aten.linear.default, (Slot(0), Slot(1)), {}, (x, w), (y,))
    >>> sorted(saved_by(product, (False, True)).inputs), sorted(saved_by(product, (True, True)).inputs)
    ([0], [0, 1])
    """
    on_cpu = device == "cpu"
    key = (id(op), needs_grad, on_cpu, autocast)
    found = _by_call.get(key)
    if found is None:
        if len(_by_call) > _MOST:
            _by_call.clear()
        found = _by_call[key] = op, _of_structure(op, needs_grad, on_cpu, autocast)
    return found[1]


def _of_structure(op: Operator, needs_grad: tuple[bool, ...], on_cpu: bool, autocast: tuple[Any, ...] | None) -> Saved:
    key = (op.target, frozen(op.args), frozen(op.kwargs), op.inputs, needs_grad, on_cpu, autocast)
    if key not in _by_structure:
        if len(_by_structure) > _MOST:
            _by_structure.clear()
        _by_structure[key] = _known(op, needs_grad, on_cpu) or _run(op, needs_grad, autocast)
    return _by_structure[key]


def frozen(value: Any) -> Hashable:
    """Converts arguments to a key. Keys are equal only if type and value are; 1, 1.0 and True differ.

    >>> frozen([1, slice(0, 2)]) == frozen((1, slice(0, 2))), frozen(1) == frozen(True)
    (False, False)
    """
    if isinstance(value, (list, tuple)):
        return (type(value), *[frozen(v) for v in value])
    if isinstance(value, dict):
        return tuple((k, frozen(v)) for k, v in value.items())
    if isinstance(value, slice):
        return "slice", frozen(value.start), frozen(value.stop), frozen(value.step)
    if isinstance(value, (bool, int, float)):
        return type(value), value
    return value  # type: ignore[no-any-return]


# -- kernels that the meta device does not have --------------------------------------------------------------------------


def _known(op: Operator, needs_grad: tuple[bool, ...], on_cpu: bool) -> Saved | None:
    """Returns what real devices' kernels save where the meta device decomposes the operator."""
    if not any(needs_grad):
        return None
    rows = op.inputs[0].shape[:-1] if op.inputs else ()
    kernel = traits_of(op).kernel
    if kernel == "norm" and not on_cpu:
        return Saved(frozenset(range(len(op.inputs))), frozenset(), ((rows, 4),), {})
    if kernel == "attention" and _is_flash(op, needs_grad, on_cpu):
        # keeps no scores, only the logarithm of their sums
        return Saved(frozenset(range(len(op.inputs))), frozenset((0,)), ((rows, 4),), {})
    if kernel == "dropout" and not on_cpu and op.argument("train") and 0 < op.argument("p") < 1:
        return Saved(frozenset(), frozenset(), ((op.inputs[0].shape, 1),), {})
    return None


def _is_flash(op: Operator, needs_grad: tuple[bool, ...], on_cpu: bool) -> bool:
    """Tells whether attention runs as one kernel. For a CPU, torch is asked about tensors of these shapes without memory."""
    if not on_cpu:
        return True
    if op.argument("dropout_p", 0.0) > 0.0:
        return False

    def lean(value: Any) -> Any:
        if not isinstance(value, Slot):
            return value
        meta = op.inputs[value.index]
        whole = torch.empty(meta.shape[-1:], dtype=meta.dtype).expand(meta.shape)
        return whole.detach().requires_grad_(needs_grad[value.index] and meta.differentiable)

    try:
        chosen = fused_attention_choice(*map(lean, op.args), **{k: lean(v) for k, v in op.kwargs.items()})
    except Exception:  # whatever it may refuse
        return False
    return int(chosen) == 1


# -- running -------------------------------------------------------------------------------------------------------------


def _run(op: Operator, needs_grad: tuple[bool, ...], autocast: tuple[Any, ...] | None) -> Saved:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    try:
        with torch.enable_grad():
            tensors = [_tensor(meta, needs) for meta, needs in zip(op.inputs, needs_grad)]
            given = [_cast(t, op, autocast) for t in tensors]
            args, kwargs = filled((op.args, op.kwargs), given, "meta")
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                result = op.target(*args, **kwargs)
    except Exception:  # whatever an operator may raise on meta tensors
        floats = frozenset(i for i, meta in enumerate(op.inputs) if meta.differentiable)
        outputs = frozenset(i for i, meta in enumerate(op.outputs) if meta.differentiable)
        return Saved(floats, outputs, (), {}, True) if any(needs_grad) else NOTHING
    results = [t for t in (result if isinstance(result, (tuple, list)) else (result,)) if isinstance(t, Tensor)]
    return _sorted(tensors, results, kept)


def _cast(tensor: Tensor, op: Operator, autocast: tuple[Any, ...] | None) -> Tensor:
    """Casts as autocast would, since autocast of a device does not cast meta tensors."""
    if autocast is None or not autocast[2] or tensor.dtype != torch.float32:
        return tensor
    return tensor.to(autocast[1]) if traits_of(op).half else tensor


def _sorted(tensors: list[Tensor], outputs: list[Tensor], kept: list[Tensor]) -> Saved:
    """Identifies saved tensors by their memory; a view of an input counts as that input."""
    of_input = {storage_key(t): i for i, t in reversed(list(enumerate(tensors)))}
    of_output = {storage_key(t): i for i, t in reversed(list(enumerate(outputs))) if storage_key(t) not in of_input}
    inputs, mine, extra = set(), set(), {}
    for tensor in kept:
        memory = storage_key(tensor)
        if memory in of_input:
            inputs.add(of_input[memory])
        elif memory in of_output:
            mine.add(of_output[memory])
        else:
            nbytes, size = tensor.untyped_storage().nbytes(), tensor.element_size()
            is_all = nbytes in (0, tensor.nbytes)
            extra[memory] = (tuple(tensor.shape) if is_all else (nbytes // size,), size)
    aliases = {i: of_input[storage_key(t)] for i, t in enumerate(outputs) if storage_key(t) in of_input}
    return Saved(frozenset(inputs), frozenset(mine), tuple(extra.values()), aliases)


def storage_key(tensor: Tensor) -> int:
    """Returns a key of a tensor's memory, equal for its views. It is valid while both are alive."""
    return tensor.untyped_storage()._cdata


def _tensor(meta: TensorMeta, needs: bool) -> Tensor:
    if meta.stride and len(meta.stride) == len(meta.shape):
        made = torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device="meta")
    else:
        made = torch.empty(meta.shape, dtype=meta.dtype, device="meta")
    return made.requires_grad_(needs and meta.differentiable)


def filled(value: Any, tensors: Sequence[Tensor], device: str) -> Any:
    """Replaces each :class:`~shardwright.ir.operator.Slot` in arguments by its tensor, and devices by ``device``.

    >>> filled(([Slot(0), 2], {"device": torch.device("cpu")}), [torch.ones(1)], "meta")
    ([tensor([1.]), 2], {'device': device(type='meta')})
    """
    if isinstance(value, Slot):
        return tensors[value.index]
    if isinstance(value, torch.device):
        return torch.device(device)
    if isinstance(value, (list, tuple)):
        items = [filled(v, tensors, device) for v in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, dict):
        return {k: filled(v, tensors, device) for k, v in value.items()}
    return value
