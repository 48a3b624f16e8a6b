"""Opaque functions: one whose forward and backward work element by element is split like any pointwise operator.

Whether it does is seen by running both on tensors without values, and comparing what runs on the whole shape with what runs on
the shape of a piece: the same pointwise operators with the same numbers. Any other function runs whole, on every rank, unless a
rule of its name says how it may be split.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shardwright.base.opaque import OpaqueFunction
from shardwright.base.operators import may_draw, operator_of
from shardwright.base.torch_private import FakeTensorMode, TorchDispatchMode, disable_current_modes, pytree
from shardwright.errors import StrategyError
from shardwright.ir.instructions import PerRank, Ref
from shardwright.ir.operator import Operator, OpOverload, TensorMeta
from shardwright.ir.signature import Signature
from shardwright.rules.lowering import Local
from shardwright.rules.notation import parse
from shardwright.rules.registry import rule_for

Trace = tuple[Any, ...]  # what ran on a shape, with the shape left out

_SHAPE = "the shape"
# Operators that torch does not tag as pointwise, and that leave every element where it is if they keep the shape.
_KEEP_PLACES = frozenset(
    [
        "alias",
        "detach",
        "clone",
        "contiguous",
        "view",
        "_unsafe_view",
        "reshape",
        "expand",
        "_to_copy",
        "lift_fresh",
        "zeros_like",
        "ones_like",
        "full_like",
        "empty_like",
        "new_zeros",
        "new_ones",
        "new_full",
        "new_empty",
        "zeros",
        "ones",
        "full",
        "empty",
    ]
)


@rule_for("opaque")
def _rule(op: Operator) -> Signature | None:
    """Frees every dim where the function was seen to work element by element."""
    function: Any = op.target
    shape = next((meta.shape for meta in op.inputs if meta.shape), ())
    whole = trace_of(function, op.inputs, shape)
    if whole is None or any(trace_of(function, op.inputs, piece) != whole for piece in _pieces(shape)):
        return None
    dims = ["..." if meta.shape else "" for meta in (*op.inputs, *op.outputs)]
    inputs, outputs = dims[: len(op.inputs)], dims[len(op.inputs) :]
    return parse(f"{', '.join(inputs)} -> {', '.join(outputs)}", op, None, (), _on_pieces)


def _pieces(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Returns shapes of pieces, one per dim: what reads a size does something else on one of them."""
    return [tuple((s + 1) // 2 if i == d else s for i, s in enumerate(shape)) for d, size in enumerate(shape) if size > 1]


def _on_pieces(local: Local) -> tuple[Ref, ...]:
    """Calls the function on every piece, if it does on each rank's shape what it does on the whole."""
    op, function = local.op, local.op.target
    assert isinstance(function, OpaqueFunction)
    at = next(i for i, meta in enumerate(op.inputs) if meta.shape)
    whole = trace_of(function, op.inputs, op.inputs[at].shape)
    sizes = local.local_shape(False, at)
    for shape in {tuple(s.of(rank) if isinstance(s, PerRank) else s for s in sizes) for rank in local.mesh.ranks}:
        if trace_of(function, op.inputs, shape) != whole:
            raise StrategyError(
                f"{function}: its forward or backward does something else on a piece of {list(shape)} than on the whole "
                f"{list(op.inputs[at].shape)}, so it cannot be split; give its call a strategy that leaves its inputs whole"
            )
    return local.same_call()


def trace_of(function: OpaqueFunction, inputs: Sequence[TensorMeta], shape: Sequence[int]) -> Trace | None:
    """Returns what a function's forward and backward run on inputs of one shape; ``None`` if it is not element by element.

    Args:
        inputs: the tensors of the call; those of 0 dims stay as they are.
        shape: the shape that the others get.

    >>> double = OpaqueFunction("double", lambda x: x * 2)
    >>> double.may_be_split = True
    >>> meta = TensorMeta((4, 6), torch.float32)
    >>> trace_of(double, [meta], (4, 6)) == trace_of(double, [meta], (2, 6)) != None
    True
    """
    if not function.may_be_split or len({meta.shape for meta in inputs if meta.shape}) != 1:
        return None
    key = (tuple(shape), tuple((not meta.shape, meta.dtype, meta.device) for meta in inputs))
    if key not in function.traces:
        function.traces[key] = _trace(function, inputs, tuple(shape))
    return function.traces[key]  # type: ignore[no-any-return]


def _trace(function: OpaqueFunction, inputs: Sequence[TensorMeta], shape: tuple[int, ...]) -> Trace | None:
    watch = _Watch(shape)
    alive: list[weakref.ref[Tensor]] = []
    try:
        with disable_current_modes(), warnings.catch_warnings(), FakeTensorMode(), torch.enable_grad():
            warnings.simplefilter("ignore")
            _run(function.call, inputs, shape, watch, alive)
    except Exception:  # whatever it cannot do without values
        return None
    if any(reference() is not None for reference in alive):
        gc.collect()  # in cycles, it may be; it takes a second where the heap is large
    if any(reference() is not None for reference in alive):  # somebody keeps a gradient, and means the whole one
        return None
    return tuple(watch.calls) if watch.is_pointwise else None


def _run(
    call: Callable[..., Any], inputs: Sequence[TensorMeta], shape: tuple[int, ...], watch: _Watch, alive: list[Any]
) -> None:
    """Runs a function forward and backward under the watch."""
    tensors = [torch.empty(shape if m.shape else (), dtype=m.dtype, device=m.device or "cpu") for m in inputs]
    tensors = [t.requires_grad_() if t.is_floating_point() or t.is_complex() else t for t in tensors]
    with watch:
        results = [leaf for leaf in pytree.tree_leaves(call(*tensors)) if isinstance(leaf, Tensor)]
        if any(tuple(result.shape) != shape for result in results):
            watch.is_pointwise = False
        differentiable = [result for result in results if result.requires_grad]
        if differentiable and watch.is_pointwise:
            gradients = [torch.empty_like(result) for result in differentiable]
            alive += [weakref.ref(tensor) for tensor in (*tensors, *results, *gradients)]
            wanted = [tensor for tensor in tensors if tensor.requires_grad]
            watch.calls.append("backward")
            made = torch.autograd.grad(differentiable, wanted, gradients, allow_unused=True)
            alive += [weakref.ref(gradient) for gradient in made if gradient is not None]
            watch.calls.append(tuple(gradient is None for gradient in made))


class _Watch(TorchDispatchMode):
    """Notes what runs, the shape left out, and whether all of it is element by element.

    Args:
        shape: of the tensors that the function is called on.
    """

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.shape = shape
        self.calls: list[Any] = []
        self.is_pointwise = True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if not isinstance(function, OpOverload):
            self.is_pointwise = False
            return made
        if function.namespace == "prim":  # asks for the device, and computes nothing
            return made
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs, made)) if isinstance(leaf, Tensor)]
        of_shape = all(tuple(t.shape) in (self.shape, ()) for t in tensors)
        works = torch.Tag.pointwise in function.tags or operator_of(function) in _KEEP_PLACES
        if not of_shape or not works or may_draw(function):
            self.is_pointwise = False
        self.calls.append((function, self._text(args), self._text(kwargs or {})))
        return made

    def _text(self, value: Any) -> str:
        """Returns an argument's text, with tensors and the shape of the function's tensors left out."""
        if isinstance(value, Tensor):
            return "0 dims" if not value.shape else _SHAPE
        if isinstance(value, (list, tuple)):
            if value and all(isinstance(v, int) for v in value) and tuple(value) == self.shape:
                return _SHAPE
            return f"[{', '.join(map(self._text, value))}]"
        if isinstance(value, dict):
            return ", ".join(f"{name}={self._text(v)}" for name, v in value.items())
        return repr(value)
