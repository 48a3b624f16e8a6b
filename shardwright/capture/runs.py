"""Runs: rows of equal modules in the lists of a model, and the model with fewer of each.

Modules are equal if they have the same class, settings, shapes of parameters and buffers, marks, and equal children. Each of
their parameters belongs to one of them only, or to all modules of the row.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.capture.closure import FunctionModule
from shardwright.ir.marks import Mark

_TABLES = ("_modules", "_parameters", "_buffers")
_MARK = "_shardwright_mark"  # compared by its value, like marks given by name
_PLAIN = (int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(None))


@dataclasses.dataclass(frozen=True)
class Run:
    """A row of equal children in one container.

    Args:
        container: the ``nn.ModuleList`` or ``nn.Sequential``.
        names: the children's names in it.
        copies: their paths from the root.
        shared: names of parameters in the copies that are not one copy's own.
    """

    container: nn.Module
    names: tuple[str, ...]
    copies: tuple[str, ...]
    shared: frozenset[str]


def is_within(path: str, module: str) -> bool:
    """Tells whether a path is that of a module or of something in it."""
    return path == module or path.startswith(f"{module}.")


# -- finding them -----------------------------------------------------------------------------------------------------


def find_runs(root: nn.Module, marks: Mapping[nn.Module, Mark], least: int) -> list[Run]:
    """Finds the outermost runs of at least ``least`` modules. Their lists' callers must not count."""
    return _Finder(root, marks, least).runs


class _Finder:
    def __init__(self, root: nn.Module, marks: Mapping[nn.Module, Mark], least: int):
        self.root, self.marks, self.least = root, marks, least
        self.runs: list[Run] = []
        self.calls = Counter(id(m) for _, m in root.named_modules(remove_duplicate=False))
        self.owners: dict[int, list[str]] = {}  # tensor -> all its names
        for name, tensor in _tensors(root):
            self.owners.setdefault(id(tensor), []).append(name)
        self.counting: dict[tuple[int, str], bool] = {}
        self._visit(root, "", [root])

    def _visit(self, module: nn.Module, path: str, around: list[nn.Module]) -> None:
        children = list(module._modules.items())
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(children) >= self.least:
            if not any(self._counts(m, path) for m in around):
                children = self._without_runs(module, path, children)
        for name, child in children:
            if child is not None:
                self._visit(child, _join(path, name), [*around, child])

    def _without_runs(self, container: nn.Module, path: str, children: Any) -> list[Any]:
        """Records the runs among the children, and returns the other children."""
        rest, row = [], [children[0]]
        for item in [*children[1:], None]:
            if item is not None and self._alike(row[0], item, path):
                row.append(item)
                continue
            if len(row) >= self.least:
                names = tuple(name for name, _ in row)
                paths = tuple(_join(path, name) for name in names)
                shared = {n for p, (_, m) in zip(paths, row) for n in self._shared(p, m)}
                self.runs.append(Run(container, names, paths, frozenset(shared)))
            else:
                rest += row
            row = [item]
        return rest

    def _alike(self, first: tuple[str, Any], other: tuple[str, Any], path: str) -> bool:
        (a_name, a), (b_name, b) = first, other
        if a is None or b is None or a is b or not self._same(a, b):
            return False
        return self._ties(_join(path, a_name), a) == self._ties(_join(path, b_name), b)

    def _same(self, a: nn.Module, b: nn.Module) -> bool:
        if type(a) is not type(b) or self.calls[id(a)] != 1 or self.calls[id(b)] != 1:
            return False
        if not _same_marks(self.marks.get(a), self.marks.get(b)):
            return False
        skipped = (*_TABLES, _MARK)
        keys = [k for k in a.__dict__ if k not in skipped]
        if keys != [k for k in b.__dict__ if k not in skipped]:
            return False
        if not all(_same_value(a.__dict__[k], b.__dict__[k]) for k in keys):
            return False
        for table in ("_parameters", "_buffers"):
            ours, theirs = a.__dict__[table], b.__dict__[table]
            if list(ours) != list(theirs) or not all(map(_same_tensors, ours.values(), theirs.values())):
                return False
        if list(a._modules) != list(b._modules):
            return False
        pairs = zip(a._modules.values(), b._modules.values(), strict=True)
        return all(x is y if x is None or y is None else self._same(x, y) for x, y in pairs)

    def _ties(self, path: str, module: nn.Module) -> list[Any]:
        """Maps each tensor of a module to its first place in it. A tensor that is used elsewhere too maps to itself."""
        first: dict[int, int] = {}
        result: list[Any] = []
        for i, (_, tensor) in enumerate(_tensors(module)):
            outside = any(not is_within(n, path) for n in self.owners[id(tensor)])
            result.append(("elsewhere", id(tensor)) if outside else first.setdefault(id(tensor), i))
            if outside and not isinstance(tensor, nn.Parameter):
                result.append(path)  # a capture makes one input per name of a tied buffer, so that no two copies are alike
        return result

    def _shared(self, path: str, module: nn.Module) -> Iterator[str]:
        for name, tensor in _tensors(module):
            if any(not is_within(n, path) for n in self.owners[id(tensor)]):
                yield _join(path, name)

    def _counts(self, module: nn.Module, path: str) -> bool:
        name = next((part for part in reversed(path.split(".")) if not part.isdigit()), "")
        key = (id(module), name)
        if key not in self.counting:
            self.counting[key] = any(_counts_in_loops(f, name) for f in _functions(module))
        return self.counting[key]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _same_tensors(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if type(a) is not type(b) or (a.shape, a.dtype, a.requires_grad) != (b.shape, b.dtype, b.requires_grad):
        return False
    return a.stride() == b.stride() and a.device == b.device


def _same_marks(a: Mark | None, b: Mark | None) -> bool:
    if a is b or a is None or b is None:
        return a is b
    return all(getattr(a, f.name) == getattr(b, f.name) for f in dataclasses.fields(Mark) if f.name != "module_path")


def _same_value(a: Any, b: Any) -> bool:
    """Tells whether two settings are equal plain values, or the very same object."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, _PLAIN):
        return bool(a == b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same_value, a, b))
    if isinstance(a, (set, frozenset)):
        return all(isinstance(item, _PLAIN) for item in a) and bool(a == b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(map(_same_value, a.values(), b.values()))
    if dataclasses.is_dataclass(a):
        return all(_same_value(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return False


# -- callers that count -----------------------------------------------------------------------------------------------


def _functions(module: nn.Module) -> Iterator[Callable[..., Any]]:
    """Yields the user's functions that may call the children of a module."""
    if isinstance(module, FunctionModule):
        yield module.__dict__["function"]
    forward = module.__dict__.get("forward")
    if forward is not None:
        yield forward
    for cls in type(module).__mro__:
        if cls.__module__.split(".")[0] in ("torch", "builtins") or cls is FunctionModule:
            continue
        for name, member in vars(cls).items():
            function = getattr(member, "__func__", getattr(member, "fget", member))
            if inspect.isfunction(function) and name != "__init__":
                yield function


def _counts_in_loops(function: Callable[..., Any], name: str) -> bool:
    """Tells whether a function may treat the modules of list ``name`` differently by their number.

    It may if it numbers or pairs what it loops over, or decides something within a loop.
    """
    function = inspect.unwrap(function)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return True
    nodes = list(ast.walk(tree))
    calls = getattr(function, "__name__", "") == "forward" or any(
        isinstance(n, ast.Attribute) and n.attr == name for n in nodes
    )
    if not calls:
        return False
    if any(isinstance(n, ast.While) or getattr(n, "id", getattr(n, "attr", "")) in _NUMBERING for n in nodes):
        return True
    loops = [n for n in nodes if isinstance(n, (ast.For, ast.comprehension))]
    decides = (ast.If, ast.IfExp, ast.BoolOp, ast.Compare, ast.Match, ast.Try)
    return any(isinstance(n, decides) or _adds_a_number(n) for loop in loops for n in ast.walk(loop))


_NUMBERING = ("enumerate", "range", "zip", "islice", "count", "next")


def _adds_a_number(node: ast.AST) -> bool:
    """Tells whether a statement is like ``i += 1``."""
    return isinstance(node, ast.AugAssign) and isinstance(node.value, ast.Constant)


# -- the model with fewer of them -------------------------------------------------------------------------------------


@contextmanager
def shortened(runs: Sequence[Run], count: int) -> Iterator[set[str]]:
    """Leaves, within the block, only the first ``count`` modules of each run.

    Returns:
        A set to which the user's code, by asking a list for its length or for some of its modules, adds what it asked.

    The model is restored afterwards.
    """
    asked: set[str] = set()
    before = []
    try:
        for run in runs:
            table, kind = run.container.__dict__["_modules"], type(run.container)
            before.append((run.container, table, kind))
            dropped = set(run.names[count:])
            run.container.__dict__["_modules"] = {n: m for n, m in table.items() if n not in dropped}
            run.container.__class__ = _watched(kind, asked)
        yield asked
    finally:
        for container, table, kind in reversed(before):
            container.__class__ = kind
            container.__dict__["_modules"] = table


_TORCH = os.path.dirname(torch.__file__)


def _watched(kind: type, asked: set[str]) -> type:
    """Builds the class of a list that records what it is asked. Export, which looks at all children, does not count."""

    def noting(name: str) -> Callable[..., Any]:
        def method(self: Any, *args: Any) -> Any:
            if not sys._getframe(1).f_code.co_filename.startswith((_TORCH, __file__)):
                asked.add(name)
            return getattr(super(made, self), name)(*args)

        return method

    names = ("__len__", "__getitem__", "__reversed__", "__contains__", "children", "named_children")
    members = {name: noting(name) for name in names if hasattr(kind, name)}
    made = type(kind.__name__, (kind,), {**members, "__module__": kind.__module__})
    return made
