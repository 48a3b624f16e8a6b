"""Key-value caches of Hugging Face models as containers of tensors. So models can return them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from shardwright.base.torch_private import pytree

_known: set[type] = set()


@dataclass(frozen=True)
class _Tensor:
    """A place holder for a tensor in a skeleton: the number of the leaf."""

    leaf: int


@dataclass(frozen=True)
class _Object:
    """An object without its tensors."""

    kind: type
    attributes: tuple[tuple[str, Any], ...]


def register_caches() -> None:
    """Registers the cache classes that transformers has defined so far, if it is imported. Costs nothing otherwise."""
    module = sys.modules.get("transformers.cache_utils")
    base = getattr(module, "Cache", None)
    if base is None:
        return
    for kind in _with_subclasses(base):
        if kind not in _known:
            _known.add(kind)
            if kind not in pytree.SUPPORTED_NODES:
                name = f"{kind.__module__}.{kind.__qualname__}"
                pytree.register_pytree_node(kind, _flatten, _unflatten, serialized_type_name=name)


def caches_in(value: Any) -> list[str]:
    """Returns the names of the classes of caches within arguments."""
    leaves = pytree.tree_leaves(value, is_leaf=lambda leaf: type(leaf) in _known)
    return [type(leaf).__name__ for leaf in leaves if type(leaf) in _known]


def _with_subclasses(kind: type) -> Iterator[type]:
    yield kind
    subclasses: list[type] = kind.__subclasses__()
    for sub in subclasses:
        yield from _with_subclasses(sub)


def _flatten(cache: Any) -> tuple[list[Any], Any]:
    leaves: list[Any] = []

    def skeleton(value: Any) -> Any:
        if isinstance(value, Tensor):
            leaves.append(value)
            return _Tensor(len(leaves) - 1)
        if type(value) in (list, tuple):
            return type(value)(map(skeleton, value))
        if type(value) is dict:
            return {key: skeleton(item) for key, item in value.items()}
        if type(value).__module__ == "transformers.cache_utils" or type(value) in _known:
            return _Object(type(value), tuple((name, skeleton(item)) for name, item in vars(value).items()))
        return value

    return leaves, skeleton(cache)


def _unflatten(leaves: Any, context: Any) -> Any:
    held = list(leaves)

    def whole(part: Any) -> Any:
        if isinstance(part, _Tensor):
            return held[part.leaf]
        if type(part) in (list, tuple):
            return type(part)(map(whole, part))
        if type(part) is dict:
            return {key: whole(item) for key, item in part.items()}
        if isinstance(part, _Object):
            made: Any = object.__new__(part.kind)
            vars(made).update({name: whole(item) for name, item in part.attributes})
            return made
        return part

    return whole(context)
