"""Handles: parameters that a model held before they were distributed, and what they are now."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

# Attributes of a moved parameter, and of a module or optimizer that has our hooks.
_MOVED_TO, _HOOKED = "_shardwright_moved_to", "_shardwright_hooked"


class MovedParameter(nn.Parameter):
    """Parameter from before the distribution. It stands for the new one wherever it is used.

    Every function that gets it works on the new parameter: ``old.grad``, ``old.norm()``, ``old.requires_grad_()``,
    ``clip_grad_norm_([old], 1.0)``, ``copy.deepcopy(old)``. Only ``id``, ``hash`` and ``is`` tell them apart.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*current(args), **current(kwargs or {}))

    def __getattr__(self, name: str) -> Any:  # of DTensor, and what users hung on the parameter
        return getattr(current(self), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(current(self), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(current(self), name)

    def __copy__(self) -> Any:
        return copy.copy(current(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(current(self), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return current(self).__reduce_ex__(protocol)

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(current(self))


def current(value: Any) -> Any:
    """Replaces parameters from before by the new ones, also within lists, tuples and dicts; returns others as they are.

    >>> current([1, int])
    [1, <class 'int'>]
    """
    kind = type(value)
    if kind is MovedParameter:
        return vars(value)[_MOVED_TO]
    if kind in (list, tuple):
        return kind(map(current, value))
    if kind is dict:
        return {key: current(item) for key, item in value.items()}
    return value
