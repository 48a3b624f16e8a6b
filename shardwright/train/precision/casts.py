"""Finds the inputs of an operator that autocast casts. It runs the operator on fake tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shardwright.base.operators import TO_COPY
from shardwright.base.torch_private import FakeTensorMode, TorchDispatchMode, pytree
from shardwright.cost.saved import filled
from shardwright.ir.operator import Operator, TensorMeta

Casts = tuple["torch.dtype | None", ...]

_known: dict[Any, Casts] = {}


def cast_by_autocast(op: Operator, autocast: tuple[Any, ...]) -> Casts:
    """Returns the dtype that autocast casts each tensor input to, ``None`` where it casts nothing.

    Args:
        op: the operator.
        autocast: device, dtype, whether it is on, and whether it caches, as a node of a graph carries it.

    >>> from shardwright.ir.operator import Slot, TensorMeta
    >>> x, w, y = (TensorMeta(shape, torch.float32) for shape in ((8, 16), (4, 16), (8, 4)))
    >>> product = Operator(torch.ops.aten.linear.default, (Slot(0), Slot(1)), {}, (x, w), (y,))
    >>> cast_by_autocast(product, ("cpu", torch.bfloat16, True, True))
    (torch.bfloat16, torch.bfloat16)
    """
    key = (op.target, repr(op.args), repr(op.kwargs), op.inputs, autocast)
    if key not in _known:
        try:
            _known[key] = _run(op, autocast)
        except Exception:  # whatever an operator may raise on fake tensors
            _known[key] = (None,) * len(op.inputs)
    return _known[key]


def _run(op: Operator, autocast: tuple[Any, ...]) -> Casts:
    device, dtype, enabled, _ = autocast
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = [_fake(meta, device) for meta in op.inputs]
        args, kwargs = filled((op.args, op.kwargs), fakes, device)
        watch = _Watch(fakes)
        with torch.no_grad(), torch.autocast(device, dtype, enabled, False), watch:
            op.target(*args, **kwargs)
    return tuple(next(iter(to)) if len(to) == 1 else None for to in watch.read_as)


def _fake(meta: TensorMeta, device: str) -> Tensor:
    """Makes a fake tensor of a description, contiguous where it has no strides."""
    if len(meta.stride) == len(meta.shape):
        return torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device=device)
    return torch.empty(meta.shape, dtype=meta.dtype, device=device)


class _Watch(TorchDispatchMode):
    """Records in which dtypes tensors are read, beneath autocast."""

    def __init__(self, tensors: list[Tensor]):
        super().__init__()
        self.position = {id(t): i for i, t in enumerate(tensors)}
        self.read_as: list[set[torch.dtype | None]] = [set() for _ in tensors]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves((args, kwargs)):
            at = self.position.get(id(leaf))
            if at is not None and function.namespace != "prim":  # those ask for a property
                is_cast = function is TO_COPY
                self.read_as[at].add(result.dtype if is_cast else None)
        return result
