"""Lowering: writes an operator's local calls where they differ from the global call.

A lowering is a function of one argument, the :class:`Local` it writes to. It returns the local outputs, in order, with
the layouts that the signature promised (pending sums included). Where there is no lowering, the same call runs on the
local inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from shardwright.ir.instructions import PerRank, Ref
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.ir.operator import Operator
from shardwright.ir.signature import Signature, Split


class Local(Protocol):
    """Builds the local calls of one operator; a lowering reads its inputs and emits into it."""

    op: Operator
    signature: Signature
    mesh: Mesh
    split: Mapping[str, Split]  # factor -> (axes, explicit piece sizes or None), split factors only
    inputs: tuple[Ref, ...]  # local tensors, laid out as input_layouts
    input_layouts: tuple[Layout, ...]  # over global shapes op.inputs[i].shape
    output_layouts: tuple[Layout, ...]  # as computed: pending sums included
    settled_layouts: tuple[Layout, ...]  # after the operator's own reductions, for signatures with late inputs

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Ref:
        """Emits a local call with one tensor output. Arguments may hold Ref and PerRank at any depth."""
        ...

    def call_many(self, count: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Ref, ...]:
        """Emits a local call that returns a tuple or list of ``count`` tensors."""
        ...

    def same_call(self, **changes: Any) -> tuple[Ref, ...]:
        """Emits the operator's own call on the local inputs. ``changes`` replaces arguments by schema name."""
        ...

    def move(
        self,
        value: Ref,
        shape: tuple[int, ...],
        source: Layout,
        target: Layout,
        partial_gradient: tuple[str, ...] = (),
        dtype: Any = None,
    ) -> Ref:
        """Emits a redistribution of a value.

        Args:
            value: the local value.
            shape: its global shape.
            source, target: layouts before and after.
            partial_gradient: axes over which the gradient at the target is partial.
            dtype: dtype for prices and records; default float32.
        """
        ...

    def settle(self, value: Ref, index: int = 0) -> Ref:
        """Emits the reduction of output ``index`` from its computed layout to its final one."""
        ...

    def axes_of(self, factor: str) -> tuple[str, ...]:
        """Returns the axes that split ``factor``; none if it is whole."""
        ...

    def local_size(self, tensor_is_output: bool, index: int, dim: int) -> PerRank | int:
        """Returns the local size of a dim of an input or output: an int where all ranks agree."""
        ...

    def local_shape(self, tensor_is_output: bool, index: int) -> list[PerRank | int]:
        """Returns the local shape of an input or output: ints where all ranks agree."""
        ...

    def offset(self, tensor_is_output: bool, index: int, dim: int) -> PerRank:
        """Returns the global index at which the local piece of a dim starts."""
        ...


# Functions that lowerings call, and the overload that does the same.
_OVERLOADS: dict[Any, Any] = {
    torch.reshape: torch.ops.aten.reshape.default,
    torch.broadcast_to: torch.ops.aten.expand.default,
    torch.squeeze: torch.ops.aten.squeeze.dims,
}
# Overloads that need certain strides, and the one that does the same with any.
_OF_ANY_STRIDES: dict[Any, Any] = {
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default: torch.ops.aten.reshape.default,
}


def overload_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the overload that does the same as a function. Most functions stay as they are.

    >>> overload_of(torch.reshape)
    <OpOverload(op='aten.reshape', overload='default')>
    """
    found: Callable[..., Any] = _OVERLOADS.get(function, function)
    return found


def overload_for_part(target: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the overload that does the same for any strides. A part may have others."""
    found: Callable[..., Any] = _OF_ANY_STRIDES.get(target, target)
    return found
