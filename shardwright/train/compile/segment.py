"""Writes calls as one function of local tensors, compiled when it is first called.

Segments that are written alike and get tensors alike (shapes, strides, dtypes, devices, which need gradients) share one
compiled function: equal layers are compiled once.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shardwright.base.torch_private import failed_toolchain, untraceable
from shardwright.errors import ShardwrightError
from shardwright.ir.instructions import Call
from shardwright.ir.operator import operator_name
from shardwright.partition.free_results import result_is_free
from shardwright.world.execute.source import SourceWriter

logger = logging.getLogger("shardwright")

# Seconds after which a compilation is worth a warning that it is what takes so long.
_LONG = 20.0


class Functions:
    """Compiled functions, by what they compute and for which tensors.

    Args:
        backend: a backend of ``torch.compile``.
    """

    def __init__(self, backend: str):
        self.backend = backend
        self.known: dict[Any, Callable[..., Any]] = {}

    def compile(self, function: Callable[..., Any], tensors: Sequence[Tensor], what: str) -> tuple[Callable[..., Any], Any]:
        """Compiles a function for tensors like these, by a first call.

        Returns:
            What to call from now on, and what this call returned. A function that the compiler cannot trace stays as it
            is, with a warning.

        Raises:
            ShardwrightError: a compiler is missing or fails.
        """
        number = len(self.known) + 1
        logger.info("compile: %s for %s is number %d", self.backend, what, number)
        begin = time.perf_counter()
        compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=self.backend)
        try:
            with warnings.catch_warnings():  # torch's tracing reads the .grad of its arguments
                warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
                result = compiled(*tensors)
        except untraceable() as error:
            if failed_toolchain(error):
                raise ShardwrightError(
                    f"compile: {self.backend!r} failed at {what}: {_first_line(error)}; mend the compiler that it needs, or "
                    "give compile='aot_eager' or compile=False"
                ) from error
            logger.warning("compile: %s stays as it is, for %r cannot compile it: %s", what, self.backend, _first_line(error))
            compiled, result = function, function(*tensors)
        seconds = time.perf_counter() - begin
        level = logging.WARNING if seconds > _LONG else logging.INFO
        logger.log(level, "compile: %s, number %d, took %.1f s; segments like it take none", what, number, seconds)
        return compiled, result


class Written:
    """Source of a segment: a function of its inputs that returns a tuple of its outputs.

    Args:
        inside: names that its own calls read.
    """

    def __init__(self, calls: Sequence[Call], inputs: Sequence[str], outputs: Sequence[str], inside: frozenset[str]):
        self.calls, self.inputs, self.outputs = calls, inputs, outputs
        made = {name: call for call in calls for name in call.outputs}
        self.fresh = frozenset(o for o in outputs if o not in inside and result_is_free(made[o]))
        self.name = f"segment_to_{outputs[-1]}"
        first, last = (operator_name(call.function) for call in (calls[0], calls[-1]))
        self.what = f"{len(calls)} calls, {first} to {last} at {calls[-1].cause}"

    def on_rank(self, rank: int) -> tuple[Any, Callable[[], Callable[..., Any]]]:
        """Returns a comparable key of the segment on a rank, and its function there."""
        names = {name: f"x{i}" for i, name in enumerate(self.inputs)}
        writer = SourceWriter("segment", list(names.values()))
        for call in self.calls:
            arguments = writer.arguments(call.args, call.kwargs, names.__getitem__, lambda leaf: writer.literal(leaf.of(rank)))
            own = []
            for name in call.outputs:
                names[name] = f"v{len(names)}"
                own.append(names[name])
            function = writer.constant("f", call.function)  # as it is: tracing knows operators better than their entries
            text = f"{function}({arguments})"
            writer.line(f"{own[0]} = {text}" if not call.sequence else f"_many = {text}")
            for position, name in enumerate(own if call.sequence else ()):
                writer.line(f"{name} = _many[{position}]")
        result = f"({', '.join(names[name] for name in self.outputs)},)"
        key = (len(self.inputs), tuple(writer.lines), result, tuple(map(_identity, writer.names.values())))
        return key, lambda: writer.function(result)


class CompiledSegment:
    """A segment with the constants of one rank. ``fresh`` names the outputs that nobody else holds."""

    def __init__(self, functions: Functions, written: Written, rank: int):
        self.functions, self.written, self.rank = functions, written, rank
        self.__name__, self.fresh = written.name, written.fresh
        self.with_grad: dict[bool, Callable[..., Any]] = {}

    def __call__(self, *tensors: Tensor) -> Any:
        run = self.with_grad.get(torch.is_grad_enabled())
        return self._first(tensors) if run is None else run(*tensors)

    def _first(self, tensors: Sequence[Tensor]) -> Any:
        with_grad = torch.is_grad_enabled()
        written, make = self.written.on_rank(self.rank)
        key = written, tuple(map(_meta, tensors)), with_grad
        run = self.functions.known.get(key)
        if run is not None:
            result = run(*tensors)
        else:
            run, result = self.functions.compile(make(), tensors, self.written.what)
        self.functions.known[key] = self.with_grad[with_grad] = run
        return result

    def __repr__(self) -> str:
        return f"rank {self.rank}'s"


class SegmentOfRank:
    """Calls a segment whose constants depend on the rank."""

    def __init__(self, written: Written):
        self.__name__, self.fresh = written.name, written.fresh

    def __call__(self, segment: CompiledSegment, *tensors: Tensor) -> Any:
        return segment(*tensors)


def _identity(value: Any) -> Any:
    """Returns a constant as a key: equal where the constants are the same in type and value."""
    try:
        hash(value)
    except TypeError:
        return type(value), repr(value)
    return type(value), value


def _meta(tensor: Tensor) -> Any:
    return type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
