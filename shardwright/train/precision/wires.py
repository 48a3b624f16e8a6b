"""Chooses the dtypes in which moves travel.

Under autocast an operator reads a float32 tensor in a half-precision copy. Where all readers of a moved tensor do so it is
cast before it moves: the same bits arrive, in half the bytes. Sums are another matter, since they round: they are taken in
the dtype of what is summed, and gradients of parameters in float32, unless the settings say otherwise.

Invariants:

- What a program computes changes only where a sum over ranks is rounded.
- A value with several readers keeps its dtype, so that their gradients are added in it, as on a single device; so does a
  parameter whose gradients add up over micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from shardwright.base.torch_private import pytree
from shardwright.errors import ArgumentTypeError, ShardwrightError
from shardwright.ir.graph import Graph
from shardwright.ir.instructions import Call, Instruction, Move, Ref, Wire
from shardwright.ir.operator import Slot
from shardwright.ir.program import LocalProgram
from shardwright.ir.step import Step, any_communicates
from shardwright.train.precision.casts import cast_by_autocast

HALF = (torch.float16, torch.bfloat16)
_REDUCIBLE = (*HALF, torch.float32, torch.float64)


@dataclass(frozen=True)
class Precision:
    """Dtypes in which a callable computes and communicates.

    Args:
        dtype: what autocast computes in; ``None``: no autocast but the user's own.
        reduce_dtype: what gradients of parameters are reduced in; ``None``: their own dtype, half precision in float32.
        gradient_fp32_sync: whether gradients of parameters in half precision are reduced in float32.
        fp32_communication: whether everything that is reduced in half precision is reduced in float32.
    """

    dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    gradient_fp32_sync: bool = True
    fp32_communication: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("dtype", HALF), ("reduce_dtype", _REDUCIBLE)):
            value = getattr(self, name)
            if value is None:
                continue
            names = ", ".join(map(str, allowed))
            if not isinstance(value, torch.dtype):
                raise ArgumentTypeError(f"mixed_precision({name}={value!r}): give one of {names}")
            if value not in allowed:
                raise ShardwrightError(f"mixed_precision({name}={value}): it must be one of {names}; give one of them")
        if self.reduce_dtype is not None and not self.gradient_fp32_sync:
            raise ShardwrightError(
                f"disable_gradient_fp32_sync() and mixed_precision(reduce_dtype={self.reduce_dtype}) both say in which dtype "
                "gradients are reduced; drop one of them"
            )

    def computing(self, device_type: str) -> AbstractContextManager[Any]:
        """Returns the autocast to compute under."""
        return nullcontext() if self.dtype is None else torch.autocast(device_type, self.dtype)


def may_have_wires(graph: Graph, precision: Precision) -> bool:
    """Tells whether some move may travel in another dtype than its value's."""
    return precision.reduce_dtype is not None or any(meta.dtype in HALF for meta in graph.metas.values())


def with_wires(
    program: LocalProgram, graph: Graph, precision: Precision, accumulates: bool = False, adds_wide: bool = True
) -> LocalProgram:
    """Sets the dtypes in which each move of a program travels.

    Args:
        program: as partitioned from ``graph``, not scheduled yet.
        graph: the graph.
        precision: the settings.
        accumulates: whether gradients of parameters add up, over micro-batches, before they move.
        adds_wide: whether the world adds half precision in float32 and rounds once, as all but NCCL do.
    """
    if not may_have_wires(graph, precision):
        return program
    wires = _Wires(program, graph, precision, accumulates, adds_wide)
    instructions = [wires.set(i) if isinstance(i, Move) else i for i in program.instructions]
    return replace(program, instructions=tuple(instructions))


class _Wires:
    """Decides for one program."""

    def __init__(self, program: LocalProgram, graph: Graph, precision: Precision, accumulates: bool, adds_wide: bool):
        self.precision, self.accumulates, self.adds_wide = precision, accumulates, adds_wide
        self.nodes = {node.name: node for node in graph.nodes}
        self.readers: dict[str, list[Instruction | None]] = {}
        for instruction in program.instructions:
            for name in instruction.reads:
                self.readers.setdefault(name, []).append(instruction)
        for name in [*program.outputs, *(value for _, value in program.updates)]:
            if isinstance(name, str):
                self.readers.setdefault(name, []).append(None)
        self.of_parameters = {i.name for i in program.inputs if i.kind == "parameter"}
        for move in program.moves:
            if move.source in self.of_parameters:
                self.of_parameters.add(move.output)

    def set(self, move: Move) -> Move:
        wire = self._wire(move) if move.dtype.is_floating_point else None
        return move if wire is None else replace(move, wire=wire)

    def _wire(self, move: Move) -> Wire | None:
        """Returns the dtypes of a move; ``None`` where all of it travels in the value's dtype."""
        plan = move.redistribution
        back = plan.backward if move.needs_grad and move.grad else ()
        forward = result = arriving = move.dtype
        if _reduces(plan.forward):
            if self.precision.fp32_communication and move.dtype in HALF:
                forward = torch.float32
        else:
            cast = self._cast_by_readers(move)
            if cast is not None:
                forward = cast
                adds_up = self.accumulates and move.source in self.of_parameters
                if len(self.readers[move.output]) == 1 and not adds_up:
                    result = arriving = cast
        backward = self._reduced_in(move, arriving) if _reduces(back) else arriving
        there = move.communicates and forward != move.dtype
        return Wire(forward, result, backward) if there or (any_communicates(back) and backward != move.dtype) else None

    def _reduced_in(self, move: Move, dtype: torch.dtype) -> torch.dtype:
        """Returns the dtype in which a gradient that arrives in ``dtype`` is reduced."""
        now = self.precision
        in_float32 = now.fp32_communication
        if move.source in self.of_parameters:
            if now.reduce_dtype is not None:
                return now.reduce_dtype
            once = sum(map(_is_sum, move.redistribution.backward)) == 1
            for_free = self.adds_wide and once and move.dtype in HALF  # rounded to half once, whatever it travels in
            in_float32 = in_float32 or (now.gradient_fp32_sync and not for_free)
        return torch.float32 if in_float32 and dtype in HALF else dtype

    def _cast_by_readers(self, move: Move) -> torch.dtype | None:
        """Returns the narrower dtype that every reader of a move's result casts it to; ``None`` without one."""
        found = {self._cast_by(reader, move.output) for reader in self.readers.get(move.output, [None])}
        cast = found.pop() if len(found) == 1 else None
        return cast if cast is not None and cast.itemsize < move.dtype.itemsize else None

    def _cast_by(self, reader: Instruction | None, name: str) -> torch.dtype | None:
        if not isinstance(reader, Call) or reader.autocast is None or not reader.autocast[2]:
            return None
        node = self.nodes.get(reader.cause)
        if node is None or reader.function is not node.op.target:
            return None
        given = pytree.tree_leaves((list(node.op.args), dict(node.op.kwargs)))
        taken = pytree.tree_leaves((list(reader.args), dict(reader.kwargs)))
        if len(given) != len(taken):
            return None
        casts = cast_by_autocast(node.op, reader.autocast)
        slots = [slot for slot, leaf in zip(given, taken, strict=True) if isinstance(leaf, Ref) and leaf.name == name]
        found = {casts[slot.index] if isinstance(slot, Slot) else None for slot in slots}
        return found.pop() if len(found) == 1 else None


def _reduces(steps: Sequence[Step]) -> bool:
    return any(map(_is_sum, steps))


def _is_sum(step: Step) -> bool:
    return step.kind in ("all_reduce", "reduce_scatter") and step.op == "sum"
