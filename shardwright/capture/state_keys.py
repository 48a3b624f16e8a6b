"""State keys: how values of a Python state are compared, by what they hold or by which object they are."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


class ByIdentity:
    """A key for an object compared by identity. It keeps the object alive, so that no other can get its id."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, ByIdentity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def numpy_array() -> Any:
    """Returns the class of NumPy's arrays; none where NumPy is not imported."""
    numpy = sys.modules.get("numpy")
    return () if numpy is None else numpy.ndarray


class ArrayBytes:
    """A copy of a NumPy array's bytes, to compare its values with later."""

    def __init__(self, array: Any):
        self.array = array

    def __eq__(self, seen: Any) -> bool:
        return bool(self.array.tobytes() == seen)

    __hash__ = None  # type: ignore[assignment]


class Globals:
    """Values of some names of a module, which compare with a tuple of earlier values."""

    def __init__(self, scope: dict[str, Any], read: Callable[[Any], tuple[Any, ...]]):
        self.scope, self.read = scope, read

    def __eq__(self, seen: Any) -> bool:
        return bool(self.read(self.scope) == seen)

    __hash__ = None  # type: ignore[assignment]


def hashable(value: Any) -> Any:
    """Returns the value, or its replacement in a key. The type tells 1 from 1.0 and from True."""
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple([hashable(v) for v in value])
    if isinstance(value, slice):
        return ("slice", value.start, value.stop, value.step)
    try:
        hash(value)
    except TypeError:
        return ByIdentity(value)
    return (type(value), value)
