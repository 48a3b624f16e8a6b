"""Order and precision in which ranks' contributions are combined: the same in every world, whatever moves them.

Element by element, first to last: ``(p0 + p1) + p2 + ...``. Three float16 or bfloat16 values or more are added in float32
and rounded once; so are float8 values, of any number, which torch cannot add. Everything else is added in its own dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from shardwright.errors import WorldError

_COMBINE: dict[str, Any] = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}

Combine = Callable[[Iterable[Tensor], Tensor], Tensor]


def reduce(parts: Iterable[Tensor], op: str) -> Tensor:
    """Combines tensors of one shape and dtype, first to last, by sum, maximum or minimum.

    Args:
        parts: one tensor or more; they stay as they are.
        op: ``sum``, ``max`` or ``min``.

    Returns:
        A new tensor; of one part, that part itself.

    >>> reduce([torch.tensor([1e8]), torch.tensor([-1e8]), torch.tensor([1.0])], "sum")
    tensor([1.])
    """
    first, *rest = parts
    if not rest:
        return first
    if is_widened(first.dtype, op, 1 + len(rest)):
        return _wide([first, *rest], op).to(first.dtype)
    combine = _COMBINE[op]
    _check_shapes(first, *rest)
    total = combine(first, rest[0])
    for part in rest[1:]:
        total = total.add_(part) if op == "sum" else combine(total, part)
    return total  # type: ignore[no-any-return]


def prepare_reduce(dtype: torch.dtype, op: str, count: int, own: int = 0) -> Combine:
    """Prepares :func:`reduce` of ``count`` parts, two or more, that arrive one by one.

    The result is a function of the parts and of the tensor to write to. It asks for a part when it has added those before.

    Args:
        dtype: of the parts.
        op: ``sum``, ``max`` or ``min``.
        count: number of parts.
        own: which of the parts the result's memory holds, counted from 0, if any. Where that is neither of the first
            two, sums are kept in the first part until then.
    """
    if is_widened(dtype, op, count):
        return lambda parts, out: _copied(_wide(parts, op), out)
    combine = _COMBINE[op]

    def into(parts: Iterable[Tensor], out: Tensor) -> Tensor:
        arriving = iter(parts)
        first = total = next(arriving)
        for number, part in enumerate(arriving, 1):
            to = out if number >= own else first
            _check_shapes(total, part, to)
            total = combine(total, part, out=to)
        return total

    return into


def is_widened(dtype: torch.dtype, op: str, count: int) -> bool:
    """Tells whether ``count`` tensors are combined in float32 and rounded once."""
    if not dtype.is_floating_point:
        return False
    return dtype.itemsize == 1 or (dtype.itemsize == 2 and op == "sum" and count > 2)


def _check_shapes(first: Tensor, *others: Tensor) -> None:
    """Refuses tensors of different shapes: torch would broadcast them, and give ``out=`` another shape."""
    if any(other.shape != first.shape for other in others):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (first, *others))
        raise WorldError(f"parts of a reduction have different shapes: {shapes}; the ranks' programs do not fit each other")


def _copied(total: Tensor, out: Tensor) -> Tensor:
    _check_shapes(total, out)
    return out.copy_(total)


def _wide(parts: Iterable[Tensor], op: str) -> Tensor:
    arriving = iter(parts)
    total = next(arriving).float()
    for part in arriving:
        if part.dtype.itemsize == 1:  # float8 does not promote
            part = part.float()
        _check_shapes(total, part)
        total = total.add_(part) if op == "sum" else _COMBINE[op](total, part)
    return total
