"""Helpers on fx nodes: map their arguments, describe their tensors, and find their modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from shardwright.ir.operator import TensorMeta


def map_arguments(function: Callable[[Any], Any], value: Any) -> Any:
    """Applies a function to every leaf of nested arguments. The nesting stays."""
    if isinstance(value, (list, tuple)):
        mapped = [map_arguments(function, v) for v in value]
        return tuple(mapped) if isinstance(value, tuple) else mapped
    if isinstance(value, dict):
        return {k: map_arguments(function, v) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(*(map_arguments(function, v) for v in (value.start, value.stop, value.step)))
    return function(value)


def meta_of(value: Any) -> TensorMeta:
    """Returns the shape, dtype, strides and device of a tensor."""
    shape, stride = tuple(int(s) for s in value.shape), tuple(int(s) for s in value.stride())
    return TensorMeta(shape, value.dtype, stride, value.device)


def storage_of(value: Any) -> Any:
    """Returns an identifier of the memory of a tensor; views of one tensor have the same."""
    try:
        return value.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return id(value)


def attribute_at(owner: Any, path: str) -> Any:
    """Returns the attribute at a dotted path."""
    for part in path.split("."):
        owner = getattr(owner, part)
    return owner


def with_dense_gradient(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns an operator's arguments with ``sparse=False``. Ranks cannot add sparse gradients, and the values are the same."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    if "sparse" not in names:
        return node.args, node.kwargs
    at = names.index("sparse")
    kwargs = {name: value for name, value in node.kwargs.items() if name != "sparse"}
    return tuple(False if i == at else a for i, a in enumerate(node.args)), kwargs


def input_name(kind: str, target: Any, fallback: str) -> str:
    """Returns a readable name for a graph input."""
    if kind == "USER_INPUT":
        return fallback
    return str(target).replace(".", "_")


def module_path(node: fx.Node) -> str:
    """Returns the path of the innermost module around a node."""
    stack = node.meta.get("nn_module_stack") or {}
    last: Any = list(stack.values())[-1] if stack else ("", "")
    return str(last[0])


def module_calls(node: fx.Node) -> tuple[tuple[str, int], ...]:
    """Returns path and call number of every module around a node, first calls left out."""
    stack = node.meta.get("nn_module_stack") or {}
    found = [(str(entry[0]), key.rpartition("@")[2]) for key, entry in stack.items() if "@" in key]
    return tuple((path, int(number)) for path, number in found if number.isdigit())
