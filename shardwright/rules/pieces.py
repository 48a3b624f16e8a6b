"""Shared by families of rules: notation from lists of factors, local pieces, empty pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardwright.ir.instructions import PerRank, Ref
from shardwright.ir.operator import Slot
from shardwright.rules.lowering import Local


def names(count: int, prefix: str = "d") -> list[str]:
    """Returns one factor per dim.

    >>> names(3)
    ['d0', 'd1', 'd2']
    """
    return [f"{prefix}{i}" for i in range(count)]


def notation(inputs: Iterable[Sequence[str]], outputs: Iterable[Sequence[str]]) -> str:
    """Returns the written form of a rule, from one list of dims per tensor.

    >>> notation([["m", "k+"], ["k+", "n"]], [["m", "n"]])
    'm k+, k+ n -> m n'
    """
    return f"{', '.join(map(' '.join, inputs))} -> {', '.join(map(' '.join, outputs))}"


def with_dims(dims: Sequence[str], changes: Mapping[int, str]) -> list[str]:
    """Replaces some dims of a list.

    >>> with_dims(["d0", "d1"], {1: "in!"})
    ['d0', 'in!']
    """
    return [changes.get(i, name) for i, name in enumerate(dims)]


# -- sizes and offsets ------------------------------------------------------------------------------------------------


def of_sizes(function: Callable[..., Any], *sizes: PerRank | int) -> PerRank | int:
    """Applies a function to sizes that may differ between ranks.

    >>> of_sizes(lambda a, b: a + b, 1, 2)
    3
    """
    if not any(isinstance(size, PerRank) for size in sizes):
        return int(function(*sizes))
    return PerRank(lambda rank: function(*(s.of(rank) if isinstance(s, PerRank) else s for s in sizes)))


def start(local: Local, tensor_is_output: bool, index: int, dim: int) -> PerRank | int:
    """Returns where the local piece of a dim starts; 0 if the dim is whole.

    Args:
        local: the call.
        tensor_is_output: whether the tensor is an output.
        index: its position among outputs or inputs.
        dim: the dim.
    """
    layout = (local.output_layouts if tensor_is_output else local.input_layouts)[index]
    return local.offset(tensor_is_output, index, dim) if layout.bound[dim] else 0


# -- a piece of something whole ---------------------------------------------------------------------------------------


def piece(whole: Tensor, starts: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Copies the region of ``whole`` that starts at ``starts``, so that ``whole`` can be freed.

    >>> piece(torch.arange(6).view(2, 3), (0, 1), (2, 2))
    tensor([[1, 2],
            [4, 5]])
    """
    if tuple(whole.shape) == tuple(shape):
        return whole
    for dim, (first, size) in enumerate(zip(starts, shape, strict=True)):
        whole = whole.narrow(dim, first, size)
    return whole.clone()


def piece_of_output(local: Local, whole: Ref, index: int = 0) -> Ref:
    """Emits the local piece of output ``index``, given whole; the value itself if the output is not split."""
    ndim = len(local.op.outputs[index].shape)
    if not local.output_layouts[index].split_axes:
        return whole
    starts = [start(local, True, index, dim) for dim in range(ndim)]
    return local.call(piece, whole, starts, local.local_shape(True, index))


# -- empty pieces -----------------------------------------------------------------------------------------------------


def some_piece_is_empty(local: Local, of_inputs: bool = True) -> bool:
    """Tells whether some rank has no elements of an output, or of an input."""
    tensors = [*zip(local.op.outputs, local.output_layouts)]
    tensors += zip(local.op.inputs, local.input_layouts) if of_inputs else ()
    return any(
        any(stop <= first for first, stop in bounds)
        for meta, layout in tensors
        for bounds in layout.bounds(meta.shape).values()
    )


def unless_empty(
    function: Callable[..., Any],
    shapes: Sequence[Sequence[int]],
    dtypes: Sequence[torch.dtype],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Calls ``function(*args)``; returns zeros of these shapes if a tensor is empty and the function would refuse it.

    The zeros depend on the same inputs, so that every rank runs the same backward, with zero gradients here.
    """
    tensors = [a for a in args if isinstance(a, Tensor)]
    if all(t.numel() for t in tensors) and all(0 not in shape for shape in shapes):
        return function(*args, **kwargs)
    parts = [t.sum() for t in tensors if t.is_floating_point() or t.is_complex()]
    zero = 0 * sum(parts[1:], parts[0])
    return tuple(
        zero.to(dtype).expand(shape).clone() if dtype.is_floating_point else zero.new_zeros(shape, dtype=dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )


def unless_result_is_empty(
    function: Callable[..., Any],
    shapes: Sequence[Sequence[int]],
    dtypes: Sequence[torch.dtype],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Calls :func:`unless_empty` if some result is empty, else the function."""
    if all(0 not in shape for shape in shapes):
        return function(*args, **kwargs)
    return unless_empty(function, shapes, dtypes, *args, **kwargs)


def unless_result_is_empty_one(
    function: Callable[..., Tensor], shape: Sequence[int], dtype: torch.dtype, *args: Any, **kwargs: Any
) -> Tensor:
    """Calls :func:`unless_result_is_empty` for a function of one output."""
    result = unless_result_is_empty(function, [shape], [dtype], *args, **kwargs)
    return result if isinstance(result, Tensor) else result[0]


def unless_empty_one(
    function: Callable[..., Tensor], shape: Sequence[int], dtype: torch.dtype, *args: Any, **kwargs: Any
) -> Tensor:
    """Calls :func:`unless_empty` for a function of one output."""
    result = unless_empty(function, [shape], [dtype], *args, **kwargs)
    return result if isinstance(result, Tensor) else result[0]


def call_unless_empty(
    local: Local, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, of_inputs: bool = True
) -> tuple[Ref, ...]:
    """Emits the operator on these arguments, guarded if some rank has no elements.

    Args:
        local: emits the call.
        args, kwargs: local arguments.
        of_inputs: whether an empty input counts too, though the output is not empty: where a summed dim is cut.
    """
    op, target = local.op, local.op.target
    keywords = dict(kwargs or {})
    dtypes = tuple(m.dtype for m in op.outputs)
    if len(op.outputs) > 1:
        if not some_piece_is_empty(local, of_inputs):
            return local.call_many(len(dtypes), target, *args, **keywords)
        shapes = [local.local_shape(True, i) for i in range(len(dtypes))]
        guard = unless_empty if of_inputs else unless_result_is_empty
        return local.call_many(len(dtypes), guard, target, shapes, dtypes, *args, **keywords)
    if not some_piece_is_empty(local, of_inputs):
        return (local.call(target, *args, **keywords),)
    guard_one = unless_empty_one if of_inputs else unless_result_is_empty_one
    return (local.call(guard_one, target, local.local_shape(True, 0), dtypes[0], *args, **keywords),)


def local_arguments(local: Local, tensors: Sequence[Ref] | None = None) -> tuple[list[Any], dict[str, Any]]:
    """Returns the operator's own arguments with local tensors in the place of its inputs."""
    refs = local.inputs if tensors is None else tensors

    def read(value: Any) -> Any:
        if isinstance(value, Slot):
            return refs[value.index]
        if isinstance(value, (list, tuple)):
            return type(value)(read(v) for v in value)
        return value

    return [read(a) for a in local.op.args], {k: read(v) for k, v in local.op.kwargs.items()}


def guarded_same_call(local: Local) -> tuple[Ref, ...]:
    """Lowers an operator that runs as it is, but refuses empty tensors."""
    if not some_piece_is_empty(local, of_inputs=False):
        return local.same_call()
    return call_unless_empty(local, *local_arguments(local), of_inputs=False)
