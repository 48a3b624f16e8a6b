"""Python state: everything besides its arguments that a captured callable reads.

A capture takes Python values for constants: attributes of modules, which submodules and hooks there are, globals and what
functions close over. :class:`PythonState` checks at every call whether they have changed, by a few comparisons that run in C.

Invariants:

- Equal versions mean equal values: a capture under a version is valid whenever the state returns to that version.
- Tensors that are attributes of modules are compared by shape, dtype and device only, because a tensor that is a constant of
  a graph is read at every call (:func:`shardwright.capture.closure.attribute_of`).
"""

from __future__ import annotations

import argparse
import enum
import functools
import operator
import sys
import sysconfig
import types
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from shardwright.base.torch_private import module_calls
from shardwright.base.user_code import globals_read
from shardwright.capture.closure import FunctionModule
from shardwright.capture.numbers import Number
from shardwright.capture.state_keys import ArrayBytes, ByIdentity, Globals, hashable, numpy_array

_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size, enum.Enum, slice, range)
CONTAINERS = (dict, list, set, deque)
HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LONGEST = 4096  # elements of a container; one with more is a data set, and counts by identity and length
_DEEPEST = 4  # containers within containers
_MOST_VERSIONS = 64  # that are known again
_missing = object()


class PythonState:
    """Python values that a root module, or the function that it holds, reads.

    Args:
        root: the module that is captured.
    """

    def __init__(self, root: nn.Module):
        self.root = root
        self.versions: dict[Any, int] = {}  # the latest last; they keep alive what counts by identity
        self._made = 0
        self.changing: set[str] = set()  # attributes that are numbers of a call, and no part of the state
        self.outdated = False  # whether a function reaches modules or tensors that were not there when the root was made
        self._look()

    def version(self) -> int:
        """Returns the number of the current state. An unchanged state, the usual case, takes microseconds."""
        for own, copied, name in self._moving:
            if type(own.get(name)) is type(copied.get(name)):
                copied[name] = own[name]
        try:
            same = (
                self._next_hook == RemovableHandle.next_id
                and self.live == self.seen
                and list(map(_requires_grad, self._parameters)) == self._trained
                and all(map(operator.is_, [cell.cell_contents for cell in self.cells], self.held))
            )
        except (RuntimeError, ValueError, TypeError):  # comparing replaced tensors and arrays raises
            same = False
        if not same:
            self._look()
        return self._version

    def objects(self) -> list[Any]:
        """Returns the objects compared by identity, among the names and attributes that are read."""
        return [value.value for value in self.described.values() if isinstance(value, ByIdentity)]

    def refresh(self) -> None:
        """Reads everything again, after parameters have been replaced."""
        self._look()

    def changed_numbers(self, before: dict[str, Any]) -> set[str]:
        """Returns the names of what differs from an earlier :attr:`described`, if all of it is numbers of modules."""
        now = self.described
        names = {name for name in {**before, **now} if before.get(name, _missing) != now.get(name, _missing)}
        return names if names <= self._numbers else set()

    def changed(self, before: dict[str, Any]) -> list[str]:
        """Lists what differs from an earlier :attr:`described`: name, value then and value now."""
        now = self.described
        names = [name for name in (*before, *(n for n in now if n not in before)) if before.get(name) != now.get(name)]
        modes = [name for name in names if name.rpartition(".")[2] == "training" and name in now and name in before]
        found = [f"{'train' if now[modes[0]] else 'eval'}() of {len(modes)} modules"] if modes else []
        rest = [name for name in names if name not in modes]
        return found + [f"{name}: {_short(before.get(name, _missing))} -> {_short(now.get(name, _missing))}" for name in rest]

    def _look(self) -> None:
        """Reads everything again."""
        self.live: list[Any] = []  # containers as they are, and copies of what they held
        self.seen: list[Any] = []
        self._parameters: list[Tensor] = []
        self._moving: list[tuple[dict[str, Any], dict[str, Any], str]] = []  # tables, copies and keys of changing numbers
        self._numbers: set[str] = set()  # names of attributes that are plain numbers
        self._missing: list[str] = []  # parameters and buffers that modules have as None
        self.cells: list[Any] = []
        self.held: list[Any] = []
        self._next_hook = RemovableHandle.next_id
        self.described: dict[str, Any] = {}
        self._known: set[int] = set()
        self._functions: set[Any] = set()
        self.caches: list[Any] = []  # functions with an lru_cache
        self.classes: list[tuple[type, dict[str, Any]]] = []  # the user's classes and their attributes
        self.scopes: dict[int, tuple[dict[str, Any], set[str]]] = {}
        for path, module in list(self.root.named_modules()):
            self._module(path, module)
        for kind in HOOK_TABLES:
            hooks = getattr(module_calls, f"_global{kind}")
            self._watch(hooks)
            self.described[f"{kind.strip('_')} of all modules"] = tuple(map(ByIdentity, hooks.values()))
        if isinstance(self.root, FunctionModule):
            self._callable(self.root.__dict__["function"])
            self.outdated = not self.root.is_up_to_date()
        for scope, names in self.scopes.values():
            if not names:
                continue
            first, *rest = sorted(names)
            read = operator.itemgetter(first, *(rest or [first]))
            self.live.append(Globals(scope, read))
            self.seen.append(read(scope))
        self._trained = [t.requires_grad for t in self._parameters]
        frozen = tuple((name, hashable(value)) for name, value in self.described.items())
        key = (frozen, tuple(self._missing))
        found = self.versions.pop(key, None)
        if found is None:
            self._made, found = self._made + 1, self._made
        self.versions[key] = self._version = found
        while len(self.versions) > _MOST_VERSIONS:
            del self.versions[next(iter(self.versions))]

    def _module(self, path: str, module: nn.Module) -> None:
        own = vars(module)
        prefix = f"{path}." if path else ""
        self._watch(own)
        self._watch(module._modules)
        self.described[f"{prefix}submodules"] = tuple((n, ByIdentity(m)) for n, m in module._modules.items())
        for kind in HOOK_TABLES:
            hooks = own.get(kind)
            if hooks:
                self._watch(hooks)
                self.described[f"{prefix}{kind.strip('_')}"] = tuple(map(ByIdentity, hooks.values()))
                for hook in hooks.values():
                    self._function(hook)
        for table in (module._parameters, module._buffers):
            self._watch(table)
            if table:
                self.described[f"{prefix}{'parameters' if table is module._parameters else 'buffers'}"] = tuple(table)
            self._missing += [prefix + name for name, value in table.items() if value is None]
        for name, value in module._parameters.items():
            if value is not None:
                self._parameters.append(value)
                self.described[f"{prefix}{name}.requires_grad"] = value.requires_grad
        for name, value in own.items():
            if name == "training" or (name not in STANDARD and not name.startswith("_shardwright_")):
                self.described[prefix + name] = self._attribute(own, prefix, name, value)
        for cls in type(module).__mro__:
            self._class(cls)
        if "forward" in own:
            self._function(own["forward"])

    def _attribute(self, own: dict[str, Any], prefix: str, name: str, value: Any) -> Any:
        """Returns the key of a module's attribute; of a changing number that is its type."""
        if type(value) not in (int, float) or name == "training":
            return self._read(value, prefix + name, 0)
        self._numbers.add(prefix + name)
        if prefix + name not in self.changing:
            return value
        copied = next(seen for live, seen in zip(self.live, self.seen) if live is own)
        self._moving.append((own, copied, name))
        return type(value)

    def _class(self, cls: type) -> None:
        """Reads the plain attributes of a user's class, and what its functions read."""
        if id(cls) in self._known or _is_of_library(cls.__module__):
            return
        self._known.add(id(cls))
        for name, value in list(vars(cls).items()):
            value = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
            if isinstance(value, property):
                value = value.fget
            if isinstance(value, functools._lru_cache_wrapper):
                self.caches.append(value)
                value = value.__wrapped__
            if isinstance(value, types.FunctionType):
                self.described[f"{cls.__qualname__}.{name}"] = ByIdentity(value)
                self._function(value)
            elif not name.startswith("__") and not isinstance(value, (property, types.BuiltinFunctionType)):
                self.described[f"{cls.__qualname__}.{name}"] = self._read(value, f"{cls.__qualname__}.{name}", 0)
        self.classes.append((cls, dict(vars(cls))))
        self.live.append(vars(cls))
        self.seen.append(dict(vars(cls)))

    def _callable(self, value: Any) -> None:
        """Reads what a callable that is no module reads: a function, a bound or partial one, or an object with ``__call__``."""
        if isinstance(value, functools.partial):
            self._named("argument", value.args)
            self._named("argument", value.keywords)
            self._callable(value.func)
        elif isinstance(value, types.MethodType):
            self._named(type(value.__self__).__name__, value.__self__)
            self._class(type(value.__self__))
            self._function(value)
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif not isinstance(value, (nn.Module, types.BuiltinFunctionType)):
            self._class(type(value))
            self._watch(getattr(value, "__dict__", {}))
            for name, held in list(getattr(value, "__dict__", {}).items()):
                self._named(f"{type(value).__name__}.{name}", held)

    def _function(self, function: Any) -> None:
        """Reads the globals and cells of a user's function and of the functions it calls."""
        function = getattr(function, "__func__", function)
        if not isinstance(function, types.FunctionType) or function in self._functions:
            return
        self._functions.add(function)
        self._function(getattr(function, "__wrapped__", None))
        if not _is_of_library(function.__module__ or ""):
            for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
                self._named(f"{function.__qualname__}: a default", default)
        if _is_of_library(function.__module__ or ""):
            return
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
            try:
                value = cell.cell_contents
            except ValueError:
                continue
            self.cells.append(cell)
            self.held.append(value)
            self._named(f"{function.__qualname__}: {name}", value)
        scope = function.__globals__
        known = self.scopes.setdefault(id(scope), (scope, set()))[1]
        names = {name for name in globals_read(function.__code__) if name in scope} - known
        known |= names
        for name in sorted(names):
            self._named(f"global {name}", scope[name])

    def _named(self, name: str, value: Any) -> None:
        if isinstance(value, functools._lru_cache_wrapper):
            self.caches.append(value)
            self._function(value.__wrapped__)
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, type):
            self._class(value)
        elif not isinstance(value, (types.ModuleType, nn.Module)):
            self.described[name] = self._read(value, name, 1)

    def _watch(self, container: Any) -> None:
        if id(container) not in self._known:
            self._known.add(id(container))
            self.live.append(container)
            self.seen.append(dict(container) if isinstance(container, dict) else type(container)(container))

    def _read(self, value: Any, name: str, depth: int) -> Any:
        """Returns the key that a value is compared by. Containers that can change are watched from now on."""
        if type(value) is Number:
            return ByIdentity(value)
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, Tensor):
            if depth:
                return ByIdentity(value)
            return ("tensor", tuple(value.shape), value.dtype, value.device, value.requires_grad)
        if isinstance(value, types.FunctionType):
            self._function(value)
            return ByIdentity(value)
        if isinstance(value, types.MethodType):
            self._function(value)
            return (ByIdentity(value.__func__), self._read(value.__self__, name, depth))
        if isinstance(value, type):
            self._class(value)
            return ByIdentity(value)
        if isinstance(value, numpy_array()):
            if value.size > _LONGEST:
                return ByIdentity(value)
            if id(value) not in self._known:
                self._known.add(id(value))
                self.live.append(ArrayBytes(value))
                self.seen.append(value.tobytes())
            return (value.shape, str(value.dtype), value.tobytes())
        if isinstance(value, tuple):
            return tuple([self._read(v, name, depth + 1) for v in value]) if depth < _DEEPEST else ByIdentity(value)
        if isinstance(value, CONTAINERS):
            if depth >= _DEEPEST or len(value) > _LONGEST:
                return (ByIdentity(value), len(value))
            self._watch(value)
            items: Any = value.items() if isinstance(value, dict) else enumerate(value)
            if isinstance(value, set):
                return frozenset(hashable(v) for v in value)
            return tuple([(hashable(key), self._read(v, name, depth + 1)) for key, v in items])
        if depth < 2 and _has_readable_attributes(value):
            own = vars(value)
            if id(own) in self._known:
                return ByIdentity(value)
            self._watch(own)
            for key, v in list(own.items()):
                self.described[f"{name}.{key}"] = self._read(v, f"{name}.{key}", depth + 1)
        return ByIdentity(value)


_FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)
_requires_grad = operator.attrgetter("requires_grad")
STANDARD = frozenset(vars(nn.Module()))


_INSTALLED = tuple(sorted({sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}))


@functools.cache
def _is_of_library(module: str) -> bool:
    """Tells whether a module belongs to an installed library. Its globals and classes are taken as constant."""
    home = module.partition(".")[0]
    if home in ("torch", "builtins", "shardwright") or home in sys.stdlib_module_names:
        return True
    path = getattr(sys.modules.get(module), "__file__", None) or ""
    return path.startswith(_INSTALLED)


def _has_readable_attributes(value: Any) -> bool:
    """Tells whether an object is a plain bag of values, such as a configuration."""
    if isinstance(value, (nn.Module, type, types.ModuleType, enum.Enum, *_FUNCTIONS)) or not hasattr(value, "__dict__"):
        return False
    if isinstance(value, (types.SimpleNamespace, argparse.Namespace)):
        return True
    home = type(value).__module__.partition(".")[0]
    return home == "__main__" or home not in {*sys.stdlib_module_names, "torch", "builtins", "shardwright", "numpy"}


def _short(value: Any) -> str:
    if value is _missing:
        return "nothing"
    if isinstance(value, ByIdentity):
        value = value.value
    text = value.__name__ if isinstance(value, (types.FunctionType, type)) else repr(value)
    return text if len(text) <= 40 and "\n" not in text else f"another {type(value).__name__}"
