"""Writes a local program as the source of one Python function. Running it needs no interpreter of programs."""

from __future__ import annotations

import builtins
import types
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from shardwright.ir.instructions import Call, PerRank, Ref
from shardwright.ir.operator import OpOverload
from shardwright.ir.program import LocalProgram
from shardwright.rules.traits import traits_of
from shardwright.world.execute import log as record

_PLAIN = (int, float, bool, str, type(None))


class SourceWriter:
    """Collects lines and the constants they name, then compiles them.

    Names that begin with an underscore are the writer's own: no value of a program is called so.
    """

    def __init__(self, name: str, parameters: Sequence[str]):
        self.name = name
        self.parameters = list(parameters)
        self.lines: list[str] = []
        self.names: dict[str, Any] = {"_torch": torch}
        self._by_id: dict[int, str] = {}
        self._context: tuple[Any, bool] = (None, True)

    def constant(self, hint: str, value: Any) -> str:
        """Returns a name for ``value`` in the compiled function's globals."""
        name = f"_{hint}{len(self.names)}"
        self.names[name] = value
        return name

    def call(
        self,
        function: Callable[..., Any],
        args: Any,
        kwargs: dict[str, Any],
        read: Callable[[str], str],
        per_rank: Callable[[PerRank], str],
    ) -> str:
        """Writes a call, through the fastest public Python entry where an ATen overload has one.

        Args:
            function: the function to call.
            args, kwargs: its arguments, with references to local values.
            read: writes the text of a local value.
            per_rank: writes the text of a value that depends on the rank.
        """
        entry = python_entry(function) if isinstance(function, OpOverload) else function
        if entry is not function:
            kwargs = with_constants(function, args, kwargs)
        return f"{self.callable(entry)}({self.arguments(args, kwargs, read, per_rank)})"

    def callable(self, function: Callable[..., Any]) -> str:
        """Returns a name for a function."""
        if id(function) not in self._by_id:
            self._by_id[id(function)] = self.constant("f", function)
        return self._by_id[id(function)]

    def literal(self, value: Any) -> str:
        if isinstance(value, _PLAIN) and value == value and value not in (float("inf"), float("-inf")):
            return repr(value)
        return self.constant("c", value)

    def arguments(
        self, args: Any, kwargs: dict[str, Any], read: Callable[[str], str], per_rank: Callable[[PerRank], str]
    ) -> str:
        """Writes the text between the parentheses of a call.

        Args:
            args, kwargs: the arguments, with references to local values.
            read: writes the text of a local value.
            per_rank: writes the text of a value that depends on the rank.
        """

        def text(value: Any) -> str:
            if isinstance(value, Ref):
                return read(value.name)
            if isinstance(value, PerRank):
                return per_rank(value)
            if type(value) is list:
                return f"[{', '.join(map(text, value))}]"
            if type(value) is tuple:
                return f"({', '.join(map(text, value))}{',' if len(value) == 1 else ''})"
            return self.literal(value)

        return ", ".join([*map(text, args), *(f"{k}={text(v)}" for k, v in kwargs.items())])

    def context(self, autocast: tuple[Any, ...] | None, grad: bool) -> None:
        """Opens the ``with`` block that the next lines need; consecutive lines with the same need share one."""
        if (autocast, grad) == self._context:
            return
        self._context = (autocast, grad)
        managers = []
        if autocast is not None:
            device, dtype, enabled, cache = autocast
            make = self.constant("autocast", lambda: torch.autocast(device, dtype, enabled, cache))
            managers.append(f"{make}()")
        if not grad:
            managers.append("_torch.no_grad()")
        if managers:
            self.lines.append(f"    with {', '.join(managers)}:")

    def line(self, text: str) -> None:
        self.lines.append(("        " if self._context != (None, True) else "    ") + text)

    def forget(self, names: Sequence[str]) -> None:
        """Drops values that nothing reads any more. Memory is then freed as early as in eager code."""
        if names:
            self.line(" = ".join(names) + " = None")

    def function(self, result: str) -> Callable[..., Any]:
        self.context(None, True)
        body = "\n".join(self.lines)
        source = f"def {self.name}({', '.join(self.parameters)}):\n{body}\n    return {result}\n"
        scope = dict(self.names)
        exec(compile(source, f"<shardwright {self.name}>", "exec"), scope)
        function: Callable[..., Any] = scope[self.name]
        function.source = source  # type: ignore[attr-defined]
        return function


def write_note(writer: SourceWriter, call: Call, program: LocalProgram) -> None:
    """Writes the line by which a call of a program in copies records itself in logs."""
    if program.copies:
        writer.names["_logs"] = record._active
        note = writer.constant("note", record.CallNote(call.cause, program.copies.get(call.cause)))
        writer.line(f"if _logs: {note}({call.outputs[0]})")


@cache
def python_entry(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the public builtin that calls an ATen overload's operator with less overhead, if there is one."""
    if not isinstance(function, OpOverload) or function.namespace != "aten":
        return function
    if traits_of(function).entry_differs or any("Optional[Tensor]]" in str(a.type) for a in function._schema.arguments):
        return function
    name = function.overloadpacket.__name__
    for owner in (torch, F, torch.Tensor):
        entry = getattr(owner, name, None)
        if isinstance(entry, (types.BuiltinFunctionType, types.MethodDescriptorType)) and not hasattr(builtins, name):
            return entry
    return function


# Arguments whose default is the name of a constant (``reduction=Mean``). The parser of Python arguments takes such a name for
# 0, so an entry that is called without the argument does something else than the operator that the schema describes.
_CONSTANTS = ("reduction",)


def with_constants(function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Adds to an overload's keyword arguments those defaults that its Python entry does not have."""
    for position, argument in enumerate(function._schema.arguments):  # type: ignore[attr-defined]
        if argument.name in _CONSTANTS and position >= len(args) and argument.name not in kwargs:
            kwargs = {**kwargs, argument.name: argument.default_value}
    return kwargs
