"""Builds the modules of a graph as a tree, with alike layers folded into one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# An item is either a run of operators, ``[start, stop]``, or a module:
# {"names": of it and of those alike, "start": of the first one's operators, "length": of each, "items": of the first}
Item = Any
Path = tuple[str, ...]


def module_tree(modules: Sequence[str], kinds: Sequence[int]) -> list[Item]:
    """Builds the tree of the nodes in ``modules``, in their order; a module that is entered twice comes twice.

    Numbered modules that follow each other and consist of the same ``kinds`` are folded. Lists of modules, which compute
    nothing themselves, are left out: their layers stand in their place.

    >>> module_tree(["", "layers.0.fc", "layers.0", "layers.1.fc", "layers.1"], [0, 1, 2, 1, 2])[1]["names"]
    ['layers.0', 'layers.1']
    """
    paths = [tuple(module.split(".")) if module else () for module in modules]
    return _items(paths, kinds, 0, len(paths), 0)


def _items(paths: Sequence[Path], kinds: Sequence[int], low: int, high: int, depth: int) -> list[Item]:
    items: list[Item] = []
    before: object = None
    at = low
    while at < high:
        name = _name(paths[at], depth)
        stop = at + 1
        while stop < high and _name(paths[stop], depth) == name:
            stop += 1
        alike = None if name is None else (tuple(kinds[at:stop]), tuple(path[depth + 1 :] for path in paths[at:stop]))
        if name is None:
            items.append([at, stop])
        elif name.isdigit() and alike == before:
            items[-1]["names"].append(name)
        else:
            inner = _items(paths, kinds, at, stop, depth + 1)
            items.append({"names": [name], "start": at, "length": stop - at, "items": inner})
        before = alike if name is not None and name.isdigit() else None
        at = stop
    return [settled for item in items for settled in _settled(item)]


def _name(path: Path, depth: int) -> str | None:
    return path[depth] if len(path) > depth else None


def _settled(item: Item) -> list[Item]:
    """Replaces a list of modules by its children, and a module by its only child; other items stay."""
    if isinstance(item, list) or len(item["names"]) > 1:
        return [item]
    inner = item["items"]
    if any(isinstance(each, list) for each in inner):
        return [item]
    if len(inner) > 1 and not all(name.split(".")[0].isdigit() for each in inner for name in each["names"]):
        return [item]
    prefix = item["names"][0]
    return [{**each, "names": [f"{prefix}.{name}" for name in each["names"]]} for each in inner]
