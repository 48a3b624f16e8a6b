"""Closures: the modules and parameters that a function reads from outside, held by one module."""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shardwright.base.torch_private import pytree
from shardwright.base.user_code import globals_read

_CONTAINERS = (list, tuple, set)


class FunctionModule(nn.Module):
    """A function as a module, which owns what the function closes over.

    Modules keep the name the function uses for them; so ``net.fc1.weight`` is the name of a parameter of ``net``.
    """

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.__dict__["function"] = function
        self.__dict__["direct"] = []  # (name, tensor) that the function reads directly, not through a module
        reached = closed_over(function)
        self.__dict__["reached"] = [value for _, value in reached]
        for name, value in reached:
            name = _free_name(self, name)
            if isinstance(value, nn.Module):
                self.add_module(name, value)
                continue
            self.__dict__["direct"].append((name, value))
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value, persistent=False)

    def is_up_to_date(self) -> bool:
        """Tells whether the function still reaches the same modules and tensors as at the beginning."""
        now, before = [value for _, value in closed_over(self.__dict__["function"])], self.__dict__["reached"]
        return len(now) == len(before) and all(map(operator.is_, now, before))

    @property
    def name(self) -> str:
        """The function's own name."""
        return getattr(self.__dict__["function"], "__name__", "function")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.__dict__["direct"]:
            return self.__dict__["function"](*args, **kwargs)
        with _Substitute({id(tensor): getattr(self, name) for name, tensor in self.__dict__["direct"]}):
            return self.__dict__["function"](*args, **kwargs)


class _Substitute(TorchFunctionMode):
    """Replaces, within the block, each given tensor by its stand-in in every torch function."""

    def __init__(self, stand_ins: dict[int, Tensor]):
        super().__init__()
        self.stand_ins = stand_ins

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def stand_in(leaf: Any) -> Any:
            return self.stand_ins.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf

        args, kwargs = pytree.tree_map(stand_in, (args, kwargs or {}))
        return function(*args, **kwargs)


def closed_over(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    """Lists the modules, parameters and tensors that a function can reach. It looks at closure, globals, defaults and self."""
    found: list[tuple[str, Any]] = []
    seen: set[int] = set()
    for name, value in _reachable(function, seen):
        if not any(value is v for _, v in found):
            found.append((name, value))
    return found


def reaches(function: Callable[..., Any], wanted: tuple[type, ...]) -> bool:
    """Tells whether a function can reach an object of one of the types."""
    seen: set[int] = set()
    return any(True for _ in _walk_function(function, seen, wanted))


def _reachable(function: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    yield from _walk_function(function, seen, (nn.Module, Tensor))


def _walk_function(function: Any, seen: set[int], wanted: tuple[type, ...]) -> Iterator[tuple[str, Any]]:
    if id(function) in seen:
        return
    seen.add(id(function))
    if isinstance(function, functools.partial):
        yield from _walk_value("argument", function.args, seen, wanted)
        yield from _walk_value("argument", dict(function.keywords), seen, wanted)
        yield from _walk_function(function.func, seen, wanted)
        return
    if isinstance(function, types.MethodType):
        yield from _walk_value(type(function.__self__).__name__.lower(), function.__self__, seen, wanted, deep=True)
        function = function.__func__
    if not isinstance(function, types.FunctionType):
        seen.discard(id(function))  # an object with __call__ is walked as a value
        yield from _walk_value("callable", function, seen, wanted, deep=not isinstance(function, nn.Module))
        return
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield from _walk_value(name, cell.cell_contents, seen, wanted)
        except ValueError:
            continue  # a cell that is not filled yet
    for name in globals_read(code):
        if name in function.__globals__:
            yield from _walk_value(name, function.__globals__[name], seen, wanted)
    for value in function.__defaults__ or ():
        yield from _walk_value("default", value, seen, wanted)


def _walk_value(
    name: str, value: Any, seen: set[int], wanted: tuple[type, ...], deep: bool = False
) -> Iterator[tuple[str, Any]]:
    if isinstance(value, wanted):
        yield name, value
        return
    if isinstance(value, (nn.Module, Tensor, type, types.ModuleType)) or id(value) in seen:
        return
    if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
        module = getattr(value, "__module__", "") or ""
        if not module.startswith(("torch.", "shardwright.")) and module != "torch":
            yield from _walk_function(value, seen, wanted)
        return
    seen.add(id(value))
    if isinstance(value, _CONTAINERS):
        for i, item in enumerate(value):
            yield from _walk_value(f"{name}_{i}", item, seen, wanted)
    elif isinstance(value, dict):
        for key, item in list(value.items()):
            yield from _walk_value(f"{name}_{key}", item, seen, wanted)
    elif hasattr(value, "__wrapped_function__"):
        yield from _walk_function(value.__wrapped_function__, seen, wanted)
    elif (deep or type(value).__module__ == "__main__") and hasattr(value, "__dict__"):
        for key, item in list(vars(value).items()):
            yield from _walk_value(key, item, seen, wanted)


def _free_name(module: nn.Module, name: str) -> str:
    name = "".join(c if c.isalnum() or c == "_" else "_" for c in name) or "value"
    base, count = name, 1
    while hasattr(module, name):
        count += 1
        name = f"{base}_{count}"
    return name


def attribute_of(root: nn.Module, value: Tensor) -> tuple[dict[str, Any], str] | None:
    """Finds where a root's modules have a tensor as an attribute: returns the attributes of that module, and the name."""
    for module in root.modules():
        for name, held in vars(module).items():
            if held is value:
                return vars(module), name
    return None
