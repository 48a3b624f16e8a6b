"""Python state: everything besides its arguments that a captured callable reads, and what it changes.

A capture takes Python values for constants: attributes of modules, which submodules and hooks there are, globals and what
functions close over. :class:`PythonState` tells at every call whether they are as they were, in a few comparisons that
run in C. :func:`attributes_kept` leaves modules as they were before a capture, and says what the callable assigned.

Invariants:

- Equal versions mean equal values: what was captured under a version holds whenever the state has it again.
- Tensors that are attributes of modules count by shape, dtype and device only: one that is a constant of a graph is read
  anew at every call (:func:`attribute_of`).
"""

from __future__ import annotations

import argparse
import copy
import enum
import functools
import gc
import operator
import sys
import sysconfig
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from shardwright.capture.closure import FunctionModule, names_read
from shardwright.capture.torch_private import FakeTensor, pytree
from shardwright.errors import CaptureError

_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size, enum.Enum, slice, range)
_CONTAINERS = (dict, list, set, deque)
# What a module has of nn.Module itself and does not change what it computes, or is watched by itself.
_TABLES = frozenset({"_parameters", "_buffers", "_modules"})
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LONGEST = 4096  # elements of a container; one with more is a data set, and counts by identity and length
_DEEPEST = 4  # containers within containers
_missing = object()


class _Same:
    """Stands for an object that counts by identity, and keeps it alive, so that no other can have its id."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


class PythonState:
    """What a root module, or the function that it holds, reads from Python.

    Args:
        root: the module that is captured.
    """

    def __init__(self, root: nn.Module):
        self.root = root
        self.versions: dict[Any, int] = {}
        self.outdated = False  # whether a function reaches other modules or tensors than those that the root was made with
        self._look()

    def version(self) -> int:
        """The number of the state that holds now. The usual call, of a state that has not changed, takes microseconds."""
        try:
            same = (
                self._next_hook == RemovableHandle.next_id
                and self._live == self._seen
                and list(map(_requires_grad, self._parameters)) == self._trained
                and all(map(operator.is_, [cell.cell_contents for cell in self._cells], self._held))
            )
        except (RuntimeError, ValueError, TypeError):  # tensors and arrays that were replaced do not compare
            same = False
        if not same:
            self._look()
        return self._version

    def refresh(self) -> None:
        """Reads everything anew, after parameters have been replaced."""
        self._look()

    def changed(self, before: dict[str, Any]) -> list[str]:
        """What is another than in an earlier :attr:`described`: name, value then and value now."""
        now = self.described
        names = [name for name in (*before, *(n for n in now if n not in before)) if before.get(name) != now.get(name)]
        modes = [name for name in names if name.rpartition(".")[2] == "training" and name in now and name in before]
        found = [f"{'train' if now[modes[0]] else 'eval'}() of {len(modes)} modules"] if modes else []
        rest = [name for name in names if name not in modes]
        return found + [f"{name}: {_short(before.get(name, _missing))} -> {_short(now.get(name, _missing))}" for name in rest]

    def _look(self) -> None:
        """Reads everything anew."""
        self._live: list[Any] = []  # containers as they are, and copies of what they held
        self._seen: list[Any] = []
        self._parameters: list[Tensor] = []
        self._missing: list[str] = []  # parameters and buffers that modules have as None
        self._cells: list[Any] = []
        self._held: list[Any] = []
        self._next_hook = RemovableHandle.next_id
        self.described: dict[str, Any] = {}
        self._known: set[int] = set()
        self._functions: set[Any] = set()
        self.caches: list[Any] = []  # functions with an lru_cache
        self._scopes: dict[int, tuple[dict[str, Any], set[str]]] = {}
        for path, module in list(self.root.named_modules()):
            self._module(path, module)
        if isinstance(self.root, FunctionModule):
            self._callable(self.root.__dict__["function"])
            self.outdated = not self.root.is_up_to_date()
        for scope, names in self._scopes.values():
            if not names:
                continue
            first, *rest = sorted(names)
            read = operator.itemgetter(first, *(rest or [first]))
            self._live.append(_Globals(scope, read))
            self._seen.append(read(scope))
        self._trained = [t.requires_grad for t in self._parameters]
        frozen = tuple((name, _hashable(value)) for name, value in self.described.items())
        key = (frozen, tuple(self._missing), tuple(self._trained))
        self._version = self.versions.setdefault(key, len(self.versions))

    def _module(self, path: str, module: nn.Module) -> None:
        own = vars(module)
        prefix = f"{path}." if path else ""
        self._watch(own)
        self._watch(module._modules)
        self.described[f"{prefix}submodules"] = tuple((n, _Same(m)) for n, m in module._modules.items())
        for kind in _HOOKS:
            hooks = own.get(kind)
            if hooks:
                self._watch(hooks)
                self.described[f"{prefix}{kind.strip('_')}"] = tuple(map(_Same, hooks.values()))
                for hook in hooks.values():
                    self._function(hook)
        for table in (module._parameters, module._buffers):
            self._watch(table)
            self._missing += [prefix + name for name, value in table.items() if value is None]
        self._parameters += [value for value in module._parameters.values() if value is not None]
        for name, value in own.items():
            if name == "training" or (name not in _STANDARD and not name.startswith("_shardwright_")):
                self.described[prefix + name] = self._read(value, prefix + name, 0)
        for cls in type(module).__mro__:
            self._class(cls)
        if "forward" in own:
            self._function(own["forward"])

    def _class(self, cls: type) -> None:
        """The plain attributes of a class that the user wrote, and what its functions read."""
        if id(cls) in self._known or _is_librarys(cls.__module__):
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
                self.described[f"{cls.__qualname__}.{name}"] = _Same(value)
                self._function(value)
            elif not name.startswith("__") and isinstance(value, (*_PLAIN, *_CONTAINERS, tuple)):
                self.described[f"{cls.__qualname__}.{name}"] = self._read(value, f"{cls.__qualname__}.{name}", 0)
        self._live.append(vars(cls))
        self._seen.append(dict(vars(cls)))

    def _callable(self, value: Any) -> None:
        """What a target reads that is no module: a function, a bound or a partial one, an object with ``__call__``."""
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
        """The globals and cells that a function of the user's reads, and those of the functions it calls."""
        function = getattr(function, "__func__", function)
        if not isinstance(function, types.FunctionType) or function in self._functions:
            return
        self._functions.add(function)
        self._function(getattr(function, "__wrapped__", None))
        if _is_librarys(function.__module__ or ""):
            return
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
            try:
                value = cell.cell_contents
            except ValueError:
                continue
            self._cells.append(cell)
            self._held.append(value)
            self._named(f"{function.__qualname__}: {name}", value)
        scope = function.__globals__
        known = self._scopes.setdefault(id(scope), (scope, set()))[1]
        names = {name for name in names_read(function.__code__) if name in scope} - known
        known |= names
        for name in sorted(names):
            self._named(f"global {name}", scope[name])

    def _named(self, name: str, value: Any) -> None:
        if isinstance(value, functools._lru_cache_wrapper):
            self.caches.append(value)
            self._function(value.__wrapped__)
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif not isinstance(value, (types.ModuleType, type, nn.Module)):
            self.described[name] = self._read(value, name, 1)

    def _watch(self, container: Any) -> None:
        if id(container) not in self._known:
            self._known.add(id(container))
            self._live.append(container)
            self._seen.append(dict(container) if isinstance(container, dict) else type(container)(container))

    def _read(self, value: Any, name: str, depth: int) -> Any:
        """What a value counts as; containers that can change are watched from now on."""
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, Tensor):
            if depth:
                return _Same(value)
            return ("tensor", tuple(value.shape), value.dtype, value.device, value.requires_grad)
        if isinstance(value, types.FunctionType):
            self._function(value)
            return _Same(value)
        if isinstance(value, tuple):
            return tuple([self._read(v, name, depth + 1) for v in value]) if depth < _DEEPEST else _Same(value)
        if isinstance(value, _CONTAINERS):
            if depth >= _DEEPEST or len(value) > _LONGEST:
                return (_Same(value), len(value))
            self._watch(value)
            items: Any = value.items() if isinstance(value, dict) else enumerate(value)
            if isinstance(value, set):
                return frozenset(_hashable(v) for v in value)
            return tuple([(_hashable(key), self._read(v, name, depth + 1)) for key, v in items])
        if depth < 2 and _has_readable_attributes(value):
            own = vars(value)
            if id(own) in self._known:
                return _Same(value)
            self._watch(own)
            for key, v in list(own.items()):
                self.described[f"{name}.{key}"] = self._read(v, f"{name}.{key}", depth + 1)
        return _Same(value)


class _Globals:
    """The values of some names of a module, which compare with a tuple of values as they were."""

    def __init__(self, scope: dict[str, Any], read: Callable[[Any], tuple[Any, ...]]):
        self.scope, self.read = scope, read

    def __eq__(self, seen: Any) -> bool:
        return bool(self.read(self.scope) == seen)

    __hash__ = None  # type: ignore[assignment]


_requires_grad = operator.attrgetter("requires_grad")
_STANDARD = frozenset(vars(nn.Module()))


_INSTALLED = tuple(sorted({sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}))


@functools.cache
def _is_librarys(module: str) -> bool:
    """Whether a module is installed: its globals and classes are taken to stay as they are."""
    home = module.partition(".")[0]
    if home in ("torch", "builtins", "shardwright") or home in sys.stdlib_module_names:
        return True
    path = getattr(sys.modules.get(module), "__file__", None) or ""
    return path.startswith(_INSTALLED)


def _has_readable_attributes(value: Any) -> bool:
    """Whether an object is a bag of values that code may read: a configuration, not a machine of a library."""
    if isinstance(value, (nn.Module, type, types.ModuleType, enum.Enum)) or callable(value) or not hasattr(value, "__dict__"):
        return False
    if isinstance(value, (types.SimpleNamespace, argparse.Namespace)):
        return True
    home = type(value).__module__.partition(".")[0]
    return home == "__main__" or home not in {*sys.stdlib_module_names, "torch", "builtins", "shardwright", "numpy"}


def _hashable(value: Any) -> Any:
    """The value, or what stands for it in a key; the type tells 1 from 1.0 and from True."""
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple([_hashable(v) for v in value])
    if isinstance(value, slice):
        return ("slice", value.start, value.stop, value.step)
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    return (type(value), value)


def _short(value: Any) -> str:
    if value is _missing:
        return "nothing"
    if isinstance(value, _Same):
        value = value.value
    text = value.__name__ if isinstance(value, (types.FunctionType, type)) else repr(value)
    return text if len(text) <= 40 and "\n" not in text else f"another {type(value).__name__}"


# -- what a capture leaves behind ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Assignment:
    """Something that the captured callable gives another value: an attribute, a global, a container, a name of a closure.

    Args:
        where: its name as the user would write it.
        put: gives it a value.
        leaves: of the value, as ``torch.utils._pytree`` flattens it; ``None`` in the place of tensors.
        spec: how it is put together again.
        tensors: positions of the tensors among the leaves, which are results of the graph.
    """

    where: str
    put: Callable[[Any], None]
    leaves: tuple[Any, ...]
    spec: Any
    tensors: tuple[int, ...] = ()

    def carry_out(self, tensors: Iterator[Any]) -> None:
        """Does what the callable did when it was captured, with the tensors of a call."""
        leaves = list(self.leaves)
        for position in self.tensors:
            leaves[position] = next(tensors)
        self.put(pytree.tree_unflatten(leaves, self.spec))


@dataclass
class Kept:
    """Python values as they were before a capture."""

    root: nn.Module
    modules: list[tuple[str, nn.Module, dict[str, Any]]] = field(default_factory=list)
    tables: list[tuple[Any, Any]] = field(default_factory=list)  # of modules: parameters, buffers, submodules
    contents: list[tuple[Any, Any]] = field(default_factory=list)  # containers, and copies of what they held
    scopes: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)  # globals, and the values of names
    cells: list[tuple[Any, Any]] = field(default_factory=list)
    buffers: dict[int, dict[str, Any]] = field(default_factory=dict)  # by id of the module
    caches: list[tuple[Any, Any]] = field(default_factory=list)  # functions with an lru_cache, and what it says of itself

    def __post_init__(self) -> None:
        for path, module in self.root.named_modules():
            own = vars(module)
            self.modules.append((path, module, dict(own)))
            self.buffers[id(module)] = dict(module._buffers)
            self.tables += [(own[name], dict(own[name])) for name in sorted(_TABLES)]
        state = PythonState(self.root)
        owned = {id(vars(module)) for _, module, _ in self.modules} | {id(table) for table, _ in self.tables}
        watched = [item for item in zip(state._live, state._seen) if isinstance(item[0], _CONTAINERS)]
        self.contents = [item for item in watched if id(item[0]) not in owned]
        self.scopes = [(scope, {n: scope[n] for n in names}) for scope, names in state._scopes.values()]
        self.cells = list(zip(state._cells, state._held))
        self.caches = [(function, function.cache_info()) for function in (*_lru_caches(), *state.caches)]

    def assignments(self) -> tuple[list[Assignment], list[Tensor]]:
        """What the callable gave another value, and the tensors among the values; called when it has just ended.

        Raises:
            CaptureError: it keeps a tensor where the program could not put it, or makes parameters, buffers or modules.
        """
        found: list[Assignment] = []
        tensors: list[Tensor] = []
        problems: list[str] = []

        def changed(where: str, new: Any, put: Callable[[Any], None]) -> None:
            leaves, spec = pytree.tree_flatten(new)
            positions = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
            if any(isinstance(v, Tensor) for leaf in leaves if hasattr(leaf, "__dict__") for v in vars(leaf).values()):
                problems.append(f"{where} is given a {type(new).__name__} with tensors in it")
            tensors.extend(leaves[i] for i in positions)
            held = tuple(None if i in positions else leaf for i, leaf in enumerate(leaves))
            found.append(Assignment(where, put, held, spec, positions))

        for path, module, before in self.modules:
            own = vars(module)
            if type(module).__module__.startswith("torch.nn.modules."):
                continue  # what torch's own modules remember of their parameters
            for name in [*own, *(n for n in before if n not in own)]:
                new = own.get(name, _missing)
                if name in _STANDARD or name == "forward" or new is before.get(name, _missing):
                    continue
                changed(f"{path}.{name}" if path else name, new, partial(_put, own, name))
        for scope, names in self.scopes:
            for name, old in names.items():
                if scope.get(name, _missing) is not old:
                    changed(f"global {name}", scope.get(name, _missing), partial(_put, scope, name))
        for cell, old in self.cells:
            if cell.cell_contents is not old:
                changed("a name of an outer function", cell.cell_contents, partial(setattr, cell, "cell_contents"))
        for table, before in self.tables:
            problems += [
                f"a parameter, buffer or module {name!r} is made, replaced or deleted"
                for name in {**before, **table}
                if table.get(name, _missing) is not before.get(name, _missing)
            ]
        for container, before in self.contents:
            if _changed(container, before):
                what = f"{self._name_of(container)} (a {type(container).__name__})"
                changed(what, copy.copy(container), partial(_fill, container))
        if problems:
            raise CaptureError(
                f"a captured callable keeps what it should return: {'; '.join(problems)}\n  What is captured are not the "
                "tensors of a step. Return it; or make a buffer in __init__, and write buffer.copy_(value)"
            )
        return found, tensors

    def buffers_written(self, result: Any, sources: Mapping[tuple[int, str], str]) -> Any:
        """Writes what was assigned to buffers into them, where torch sees it in the root module only.

        Args:
            sources: the user's line that assigned, by id of the module and name.

        Returns:
            The result of the callable, in which a buffer as it was before stays as it was.

        Raises:
            CaptureError: an assigned buffer has another shape or dtype.
        """
        for path, module, _ in self.modules:
            table, before = module._buffers, self.buffers[id(module)]
            for name, old in before.items():
                new = table.get(name)
                if new is old or not isinstance(old, Tensor):
                    continue
                where = f"{path}.{name}" if path else name
                if not isinstance(new, Tensor) or (new.shape, new.dtype) != (old.shape, old.dtype):
                    now = f"a tensor of {list(new.shape)} {new.dtype}" if isinstance(new, Tensor) else repr(new)
                    source = sources.get((id(module), name))
                    at = f", at {source}" if source else ""
                    raise CaptureError(
                        f"the buffer {where}, {list(old.shape)} {old.dtype}, is given {now}{at}\n"
                        "  A program has buffers of one shape and dtype; make it as large as it gets in __init__"
                    )
                result = pytree.tree_map(lambda leaf, old=old: old.clone() if leaf is old else leaf, result)
                with torch.no_grad():
                    old.copy_(new)
                table[name] = old
        return result

    def _name_of(self, container: Any) -> str:
        names = [(f"{path}.{n}" if path else n, v) for path, _, before in self.modules for n, v in before.items()]
        names += [(f"global {n}", v) for _, values in self.scopes for n, v in values.items()]
        for name, value in names:
            if value is container or (hasattr(value, "__dict__") and vars(value) is container):
                return name
        return "something that it reaches"

    def put_back(self) -> None:
        """Makes everything as it was. Caches of functions that may hold tensors of the capture are emptied."""
        for _, module, before in self.modules:
            own = vars(module)
            if own.keys() != before.keys() or any(own[name] is not value for name, value in before.items()):
                _fill(own, before)
        for container, held in (*self.tables, *self.contents):
            if _changed(container, held):
                _fill(container, held)
        for scope, names in self.scopes:
            scope.update(names)
        for cell, held in self.cells:
            if cell.cell_contents is not held:
                cell.cell_contents = held
        for function, info in self.caches:
            if function.cache_info().misses != info.misses and not _is_torchs(function):
                function.cache_clear()


def _put(table: dict[str, Any], name: str, value: Any) -> None:
    if value is _missing:
        table.pop(name, None)
    else:
        table[name] = value


def _fill(container: Any, held: Any) -> None:
    """Makes a container hold what another one holds."""
    container.clear()
    container.extend(held) if isinstance(container, (list, deque)) else container.update(held)


def _changed(container: Any, before: Any) -> bool:
    if len(container) != len(before):
        return True
    if isinstance(container, dict):
        return any(key not in container or container[key] is not value for key, value in before.items())
    if isinstance(container, set):
        return bool(container != before)
    return any(a is not b for a, b in zip(container, before))


@functools.lru_cache(maxsize=1)
def _all_lru_caches(modules: int) -> tuple[weakref.ref[Any], ...]:
    return tuple([weakref.ref(o) for o in gc.get_objects() if type(o) is functools._lru_cache_wrapper])


def _is_torchs(function: Any) -> bool:
    return (getattr(function, "__module__", None) or "").partition(".")[0] in ("torch", "sympy", "shardwright")


def _lru_caches() -> Iterator[Any]:
    """The functions with an ``lru_cache`` in all that is imported; looked for again when more has been imported."""
    for reference in _all_lru_caches(len(sys.modules)):
        function = reference()
        if function is not None:
            yield function


def attribute_of(root: nn.Module, value: Tensor) -> tuple[dict[str, Any], str] | None:
    """Where the modules of a root have a tensor as an attribute: the attributes of the module, and the name."""
    for module in root.modules():
        for name, held in vars(module).items():
            if held is value:
                return vars(module), name
    return None


def check_values(tensors: Mapping[str, Any]) -> None:
    """Refuses tensors that have no values: an earlier capture, or somebody else's, left them behind.

    Raises:
        CaptureError: there are some.
    """
    names = [name for name, value in tensors.items() if isinstance(value, FakeTensor)]
    if names:
        raise CaptureError(
            f"the captured callable reads tensors without values, that were made while something was captured: "
            f"{', '.join(names)}\n  Make them in __init__, or anew in every call instead of keeping them"
        )


@contextmanager
def state_kept(root: nn.Module) -> Iterator[Kept]:
    """Leaves what a root reaches as it was, whatever the block does to it."""
    kept = Kept(root)
    try:
        yield kept
    finally:
        kept.put_back()


@contextmanager
def ended_by(root: nn.Module, begin: Callable[[Any, Any], None], end: Callable[[Any], Any]) -> Iterator[None]:
    """Within the block, calls of ``root.forward`` begin with one function and end with another, which gives the result."""
    had, plain = vars(root).get("forward", _missing), root.forward

    @functools.wraps(plain)  # inputs are named as its parameters are
    def forward(*args: Any, **kwargs: Any) -> Any:  # the frame at which watch.user_frame stops
        begin(args, kwargs)
        return end(plain(*args, **kwargs))

    vars(root)["forward"] = forward
    try:
        yield
    finally:
        _put(vars(root), "forward", had)
