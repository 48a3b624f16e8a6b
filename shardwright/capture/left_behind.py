"""Python values that the captured callable assigned. They are undone, and every call of the program assigns them again.

Invariants:

- After a capture everything that the callable reaches is as before, and containers are the same objects.
- Everything that the callable assigned is an :class:`Assignment` of the graph: each call of the program carries it out, with
  the tensors of that call.
"""

from __future__ import annotations

import copy
import functools
import gc
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.base.torch_private import FakeTensor, call_with_hooks, module_calls, pytree
from shardwright.capture.decisions import UnknownError
from shardwright.capture.numbers import Formula, Number
from shardwright.capture.python_state import CONTAINERS, HOOK_TABLES, STANDARD, PythonState
from shardwright.capture.size_stand_ins import SizeStandIn
from shardwright.errors import CaptureError

_TABLES = ("_buffers", "_modules", "_parameters")
_missing = object()


@dataclass(frozen=True, eq=False)
class Assignment:
    """One Python value that the captured callable assigned: an attribute, a global, a container, or a closure variable.

    Args:
        where: its name as the user would write it.
        put: function that assigns a value.
        leaves: the value's leaves, as ``torch.utils._pytree`` flattens it; ``None`` in the place of tensors.
        spec: the value's structure.
        tensors: positions of the tensors among the leaves, which are results of the graph.
    """

    where: str
    put: Callable[[Any], None]
    leaves: tuple[Any, ...]
    spec: Any
    tensors: tuple[int, ...] = ()

    def carry_out(self, tensors: Iterator[Any], numbers: Sequence[Any] = ()) -> None:
        """Assigns what the callable assigned when it was captured, with the tensors and the changing numbers of a call."""
        leaves = [leaf.value(numbers) if isinstance(leaf, Formula) else leaf for leaf in self.leaves]
        for position in self.tensors:
            leaves[position] = next(tensors)
        self.put(pytree.tree_unflatten(leaves, self.spec))


@dataclass
class SavedState:
    """Python values that a module reaches, as they were before a capture."""

    root: nn.Module
    of_caches: bool = False  # whether the caches of functions are looked at, too
    modules: list[tuple[str, nn.Module, dict[str, Any]]] = field(default_factory=list)
    tables: list[tuple[Any, Any]] = field(default_factory=list)  # of modules: parameters, buffers, submodules
    contents: list[tuple[Any, Any]] = field(default_factory=list)  # containers, and copies of what they held
    scopes: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)  # globals, and the values of names
    cells: list[tuple[Any, Any]] = field(default_factory=list)
    classes: list[tuple[type, dict[str, Any]]] = field(default_factory=list)
    buffers: dict[int, dict[str, Any]] = field(default_factory=dict)  # by id of the module
    caches: list[tuple[Any, Any]] = field(default_factory=list)  # functions with an lru_cache, and how often they were computed

    def __post_init__(self) -> None:
        for path, module in self.root.named_modules():
            own = vars(module)
            self.modules.append((path, module, dict(own)))
            self.buffers[id(module)] = dict(module._buffers)
            self.tables += [(own[name], dict(own[name])) for name in _TABLES]
        state = PythonState(self.root)
        owned = {id(vars(module)) for _, module, _ in self.modules} | {id(table) for table, _ in self.tables}
        watched = [item for item in zip(state.live, state.seen) if isinstance(item[0], CONTAINERS)]
        self.contents = [item for item in watched if id(item[0]) not in owned]
        self.scopes = [(scope, {n: scope[n] for n in names}) for scope, names in state.scopes.values()]
        self.cells = list(zip(state.cells, state.held))
        self.classes = state.classes
        if not self.of_caches:
            return
        self.caches = [(function, function.cache_info().misses) for function in (*_lru_caches(), *state.caches)]

    def assignments(self, sources: Mapping[tuple[int, str], str]) -> tuple[list[Assignment], list[Tensor]]:
        """Lists what the callable assigned, and the tensors among the values. To be called when it has just ended.

        Args:
            sources: the user's line that assigned a parameter or buffer, by id of the module and name.

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
            ragged = next((leaf for leaf in leaves if isinstance(leaf, SizeStandIn)), None)
            if ragged is not None:
                problems.append(f"{where} is given a tensor whose size depends on values, at {ragged.source}")
            tensors.extend(leaves[i] for i in positions)
            held = tuple(None if i in positions else _formula_of(leaf) for i, leaf in enumerate(leaves))
            found.append(Assignment(where, put, held, spec, positions))

        for path, module, before in self.modules:
            own = vars(module)
            is_torchs = type(module).__module__.startswith("torch.nn.modules.")
            for name in [*own, *(n for n in before if n not in own)]:
                new = own.get(name, _missing)
                if is_torchs and not (isinstance(new, Tensor) and isinstance(before.get(name), Tensor)):
                    continue  # what torch's own modules remember of their parameters; hooks compute weights for them
                if name in STANDARD or name == "forward" or new is before.get(name, _missing):
                    continue
                changed(f"{path}.{name}" if path else name, new, partial(_put, own, name))
        for scope, names in self.scopes:
            for name, old in names.items():
                if scope.get(name, _missing) is not old:
                    changed(f"global {name}", scope.get(name, _missing), partial(_put, scope, name))
        for cls, attributes in self.classes:
            for name in {**attributes, **vars(cls)}:
                new = vars(cls).get(name, _missing)
                if new is not attributes.get(name, _missing):
                    changed(f"{cls.__qualname__}.{name}", new, partial(_set, cls, name))
        for cell, old in self.cells:
            if cell.cell_contents is not old:
                changed("a name of an outer function", cell.cell_contents, partial(setattr, cell, "cell_contents"))
        lines = {name: f" at {line}" for (_, name), line in sources.items()}
        for table, before in self.tables:
            problems += [
                f"a parameter, buffer or module {name!r} is made, replaced or deleted{lines.get(name, '')}"
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
        """Copies what was assigned to buffers into them. Torch sees such assignments in the root module only.

        Args:
            result: what the callable returned.
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

    def restore(self) -> None:
        """Restores everything as it was before. Caches of functions that may hold tensors of the capture are emptied."""
        for _, module, before in self.modules:
            own = vars(module)
            if own.keys() != before.keys() or any(own[name] is not value for name, value in before.items()):
                _fill(own, before)
        for container, held in (*self.tables, *self.contents):
            if _changed(container, held):
                _fill(container, held)
        for cls, attributes in self.classes:
            for name in {**attributes, **vars(cls)}:
                old = attributes.get(name, _missing)
                if vars(cls).get(name, _missing) is not old:
                    _set(cls, name, old)
        for scope, names in self.scopes:
            scope.update(names)
        for cell, held in self.cells:
            if cell.cell_contents is not held:
                cell.cell_contents = held
        for function, misses in self.caches:
            if function.cache_info().misses != misses and not _is_of_torch(function):
                function.cache_clear()


def _formula_of(leaf: Any) -> Any:
    return leaf.formula if type(leaf) is Number else leaf


def _put(table: dict[str, Any], name: str, value: Any) -> None:
    if value is _missing:
        table.pop(name, None)
    else:
        table[name] = value


def _set(owner: Any, name: str, value: Any) -> None:
    if value is _missing:
        delattr(owner, name)
    else:
        setattr(owner, name, value)


def _fill(container: Any, held: Any) -> None:
    """Replaces the contents of a container with those of another one."""
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


def _is_of_torch(function: Any) -> bool:
    return (getattr(function, "__module__", None) or "").partition(".")[0] in ("torch", "sympy", "shardwright")


def _lru_caches() -> Iterator[Any]:
    """Yields the functions with an ``lru_cache`` in all imported modules. Looks again when more modules have been imported."""
    for reference in _all_lru_caches(len(sys.modules)):
        function = reference()
        if function is not None:
            yield function


def check_values(tensors: Mapping[str, Any]) -> None:
    """Refuses tensors without values, which an earlier capture left behind.

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
def state_restored(root: nn.Module) -> Iterator[SavedState]:
    """Restores, after the block, what a root reaches."""
    kept = SavedState(root, of_caches=True)
    try:
        yield kept
    finally:
        kept.restore()


@contextmanager
def ended_by(
    root: nn.Module, begin: Callable[[Any, Any], None], end: Callable[[Any], Any], fail: Callable[[BaseException], Any]
) -> Iterator[None]:
    """Makes ``root.forward``, within the block, call ``begin`` before and return ``end(result)`` after.

    Args:
        root: the module.
        begin: is called with the arguments.
        end: is called with the result, and returns the one to use.
        fail: is called with an error that is raised; returns the result in its place, or raises it.
    """
    had, plain = vars(root).get("forward", _missing), root.forward
    hooks = [(vars(root), name) for name in HOOK_TABLES] + [(vars(module_calls), f"_global{name}") for name in HOOK_TABLES]
    tables = [(owner, name, owner[name]) for owner, name in hooks if owner[name]]

    @functools.wraps(plain)  # inputs are named as its parameters are
    def forward(*args: Any, **kwargs: Any) -> Any:  # the frame at which watch.user_frame stops
        for owner, name, table in tables:
            owner[name] = table
        _put(vars(root), "forward", had)
        try:
            begin(args, kwargs)
            try:
                result = call_with_hooks(root, *args, **kwargs)
            except (Exception, UnknownError) as error:
                result = fail(error)
            return end(result)
        finally:
            replace()

    def replace() -> None:
        """Has the root's hooks run within ``forward``: what they change is a part of the callable."""
        vars(root)["forward"] = forward
        for owner, name, table in tables:
            owner[name] = type(table)()

    replace()
    try:
        yield
    finally:
        _put(vars(root), "forward", had)
        for owner, name, table in tables:
            owner[name] = table
