"""Builds the operator call that computes one part of a batch.

Its arguments are those that the operator's rule gives to one of several ranks: the rule's lowering is run on a mesh with one
rank per copy, and the calls that it emits are examined. A call on tensors alone stays as it is, sizes become those of the
part, and where the rule emits anything else there is no such call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from shardwright.base.torch_private import pytree
from shardwright.ir.instructions import PerRank, Ref
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.ir.operator import Operator, OpOverload, Slot, TensorMeta
from shardwright.ir.signature import Signature
from shardwright.rules.lowering import overload_for_part, overload_of

AXIS = "copy"


class Unfit(Exception):
    """Raised where the operator has no such call; says why."""


def operator_of_one_copy(
    op: Operator, signature: Signature, factor: str, copies: int, inputs: Sequence[TensorMeta]
) -> Operator:
    """Returns the call for one of ``copies`` parts along ``factor``.

    Args:
        op: the operator call.
        signature: its rule's factors.
        factor: the factor of the batch.
        copies: number of parts.
        inputs: the tensors that it is called on: parts of those that have the factor, wholes of the others.

    Raises:
        Unfit: the rule does not let copies be computed each by itself.
    """
    local = _Parts(op, signature, factor, copies)
    if signature.lowering is None:
        target, args, kwargs = op.target, op.args, op.kwargs
    else:
        results = signature.lowering(local)
        results = (results,) if isinstance(results, Ref) else tuple(results)
        if local.emitted is None or results != local.emitted[3]:
            raise Unfit("its rule computes something else for a part of the batch")
        target, args, kwargs = local.emitted[:3]
    target = overload_for_part(target)
    outputs = _outputs(target, args, kwargs, inputs)
    wanted = [local.shape(True, i) for i in range(len(op.outputs))]
    if [list(meta.shape) for meta in outputs] != wanted:
        raise Unfit(f"for a part of the batch it makes {[list(m.shape) for m in outputs]}, not {wanted}")
    return Operator(target, tuple(args), dict(kwargs), tuple(inputs), outputs, op.returns_sequence)


def _outputs(target: Any, args: Any, kwargs: Any, inputs: Sequence[TensorMeta]) -> tuple[TensorMeta, ...]:
    """Computes the outputs of a call on tensors without memory."""
    fakes = [torch.empty_strided(meta.shape, strides(meta), dtype=meta.dtype, device="meta") for meta in inputs]
    args, kwargs = pytree.tree_map(lambda leaf: fakes[leaf.index] if isinstance(leaf, Slot) else leaf, (args, kwargs))
    try:
        with torch.no_grad():
            made = target(*args, **kwargs)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise Unfit(f"torch cannot say what it makes of a part: {str(error).splitlines()[0]}") from error
    device = inputs[0].device if inputs else None
    return tuple(meta_of(tensor, device) for tensor in (made if isinstance(made, (list, tuple)) else [made]))


def meta_of(tensor: torch.Tensor, device: torch.device | None) -> TensorMeta:
    """Describes a tensor, as if it lay on ``device``."""
    return TensorMeta(tuple(tensor.shape), tensor.dtype, tuple(tensor.stride()), device)


def strides(meta: TensorMeta) -> tuple[int, ...]:
    """Returns the strides of a tensor; contiguous where they are not known."""
    if len(meta.stride) == len(meta.shape):
        return meta.stride
    return tuple(math.prod(meta.shape[dim + 1 :]) for dim in range(len(meta.shape)))


class _Parts:
    """Receives a lowering, with the copies as its ranks; see :class:`shardwright.rules.lowering.Local`."""

    def __init__(self, op: Operator, signature: Signature, factor: str, copies: int):
        self.op, self.signature = op, signature
        self.mesh = Mesh((AXIS,), (copies,))
        self.split: Mapping[str, Any] = {factor: ((AXIS,), None)}
        self.inputs = tuple(Ref(f"{i}") for i in range(len(op.inputs)))
        self.input_layouts, self.output_layouts = signature.layouts(self.mesh, self.split)
        self.settled_layouts = self.output_layouts
        self.emitted: tuple[Any, tuple[Any, ...], dict[str, Any], tuple[Ref, ...]] | None = None

    # -- emitting: one call is kept, a second one is too many ---------------------------------------------------------

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Ref:
        return self._keep(function, args, kwargs, 1)[0]

    def call_many(self, count: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Ref, ...]:
        return self._keep(function, args, kwargs, count)

    def same_call(self, **changes: Any) -> tuple[Ref, ...]:
        args, kwargs = list(self.op.args), dict(self.op.kwargs)
        names = [argument.name for argument in self.op.target._schema.arguments]  # type: ignore[attr-defined]
        for name, value in changes.items():
            position = names.index(name) if name in names else len(args)
            if position < len(args):
                args[position] = value
            else:
                kwargs[name] = value
        return self._keep(self.op.target, tuple(args), kwargs, len(self.op.outputs))

    def _keep(self, function: Callable[..., Any], args: Any, kwargs: Any, count: int) -> tuple[Ref, ...]:
        target = overload_of(function)
        if self.emitted is not None or not isinstance(target, OpOverload):
            raise Unfit("its rule runs several calls for a part of the batch")

        def plain(leaf: Any) -> Any:
            if isinstance(leaf, PerRank):
                raise Unfit("parts of the batch differ in what they are called with")
            return Slot(int(leaf.name)) if isinstance(leaf, Ref) else leaf

        args, kwargs = pytree.tree_map(plain, (tuple(args), kwargs))
        results = tuple(Ref(f"result{i}") for i in range(count))
        self.emitted = (target, args, kwargs, results)
        return results

    def move(self, *args: Any, **kwargs: Any) -> Ref:
        raise Unfit("its result depends on all samples of the batch")

    def settle(self, value: Ref, index: int = 0) -> Ref:
        raise Unfit("its result depends on all samples of the batch")

    # -- reading ------------------------------------------------------------------------------------------------------

    def axes_of(self, factor: str) -> tuple[str, ...]:
        return self.split[factor][0] if factor in self.split else ()

    def shape(self, tensor_is_output: bool, index: int) -> list[int]:
        meta = (self.op.outputs if tensor_is_output else self.op.inputs)[index]
        layout = (self.output_layouts if tensor_is_output else self.input_layouts)[index]
        return list(layout.local_shape(meta.shape, 0))

    def local_size(self, tensor_is_output: bool, index: int, dim: int) -> PerRank | int:
        return self.shape(tensor_is_output, index)[dim]

    def local_shape(self, tensor_is_output: bool, index: int) -> list[PerRank | int]:
        return list(self.shape(tensor_is_output, index))

    def offset(self, tensor_is_output: bool, index: int, dim: int) -> PerRank:
        meta = (self.op.outputs if tensor_is_output else self.op.inputs)[index]
        layout: Layout = (self.output_layouts if tensor_is_output else self.input_layouts)[index]
        bounds = layout.bounds(meta.shape)
        return PerRank(lambda rank: bounds[rank][dim][0])
