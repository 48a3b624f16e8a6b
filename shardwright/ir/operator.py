"""Operator: one call of a tensor operator, as rules see it: shapes and arguments, no graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from shardwright.base.operators import ALIAS, has_gradient, may_draw, number_without_gradient, statistics_flag

OpOverload = type(ALIAS)


@dataclass(frozen=True)
class TensorMeta:
    """Shape, dtype, strides and device of a global tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...] = ()
    device: torch.device | None = field(default=None, compare=False)

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def differentiable(self) -> bool:
        return self.dtype.is_floating_point or self.dtype.is_complex


@dataclass(frozen=True)
class Slot:
    """A placeholder, within an operator's arguments, for its ``index``-th tensor input."""

    index: int

    def __repr__(self) -> str:
        return f"${self.index}"


@dataclass(frozen=True)
class Operator:
    """One call of an operator on global tensors.

    Args:
        target: the ATen overload (or the Python function) that is called.
        args, kwargs: its arguments, tensors replaced by :class:`Slot`.
        inputs: the tensor inputs, in the order they stand in args and kwargs. A tensor passed twice is two inputs.
        outputs: the tensor outputs.
        returns_sequence: whether the outputs come as a tuple or list, even if there is one.
    """

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[TensorMeta, ...]
    outputs: tuple[TensorMeta, ...]
    returns_sequence: bool = False
    _named: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def name(self) -> str:
        """``aten.linear``: the overload's packet, without the overload."""
        return operator_name(self.target)

    @property
    def draws(self) -> bool:
        """True if the call takes numbers from the generator."""
        if not may_draw(self.target):
            return False
        share = self.argument("dropout_p", self.argument("dropout", 1.0))
        return bool(self.argument("train", True)) and bool(share > 0.0) and self.argument("num_layers", 2) != 1

    @property
    def moves_statistics(self) -> bool:
        """True if the call changes running statistics in place, which its schema does not say."""
        flag = statistics_flag(self.target)
        return flag is not None and bool(self.argument(flag))

    @property
    def has_gradient(self) -> bool:
        """True if a gradient flows back through the call. Its result's dtype must permit one too."""
        library, _, name = self.name.partition(".")
        if library != "aten":
            return True
        number = number_without_gradient(name)
        return has_gradient(name) and (number is None or not isinstance(self.argument(number), float))

    def argument(self, name: str, default: Any = None) -> Any:
        """Returns an argument by its schema name, whether passed by position or keyword; else the schema's default."""
        if not self._named:
            self._named.update(_bind(self))
        return self._named.get(name, default)


@cache
def operator_name(target: Callable[..., Any]) -> str:
    """Returns the short name of an overload or function, such as ``aten.linear``."""
    if isinstance(target, OpOverload):
        return str(target).rsplit(".", 1)[0]
    return getattr(target, "__name__", str(target))


def _bind(op: Operator) -> dict[str, Any]:
    schema = getattr(op.target, "_schema", None)
    if schema is None:
        return dict(op.kwargs)
    bound = {}
    for index, argument in enumerate(schema.arguments):
        if index < len(op.args):
            bound[argument.name] = op.args[index]
        elif argument.name in op.kwargs:
            bound[argument.name] = op.kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound
