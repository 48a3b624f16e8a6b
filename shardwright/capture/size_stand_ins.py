"""Size stand-ins: what stands for a tensor whose size depends on values, and refuses what it cannot do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardwright.capture.refusals import refuse


class SizeStandIn:
    """A stand-in for a tensor whose size depends on values; most of what a tensor can do is refused.

    Args:
        what: its name, for messages.
        instead: what to write where it is refused.
    """

    what, instead = "", ""
    source = ""  # the user's line that made it

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise cls._refused(getattr(function, "__name__", str(function)))

    @classmethod
    def _refused(cls, name: str) -> Exception:
        return refuse(f"{name} of {cls.what} cannot be captured: its size depends on values", cls.instead)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self._refused(name)


def _refusing(name: str) -> Any:
    def refusing(self: SizeStandIn, *args: Any) -> Any:
        raise self._refused(name)

    return refusing


_OPERATORS = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"]
_BESIDES = [
    "neg",
    "invert",
    "abs",
    "lt",
    "le",
    "gt",
    "ge",
    "eq",
    "ne",
    "bool",
    "int",
    "float",
    "len",
    "iter",
    "getitem",
    "setitem",
]
for _name in (*_OPERATORS, *(f"r{name}" for name in _OPERATORS), *(f"i{name}" for name in _OPERATORS), *_BESIDES):
    setattr(SizeStandIn, f"__{_name}__", _refusing(_name))


def like(tensor: Tensor, shape: Sequence[int], others: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Makes a tensor without values that depends on others.

    Args:
        tensor: has its dtype and device, unless another dtype is given.
        shape: its shape.
        others: what it depends on.
        dtype: its dtype.
    """
    dtype = dtype or tensor.dtype
    total: Any = torch.zeros((), dtype=dtype, device=tensor.device)
    if dtype.is_floating_point or dtype.is_complex:
        total = sum([other.sum().to(dtype) for other in others if other.is_floating_point() or other.is_complex()], total)
    return total.expand(tuple(shape)).clone()  # type: ignore[no-any-return]
