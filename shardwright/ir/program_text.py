"""A local program as readable text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardwright.ir.instructions import (
    Call,
    FusedMoves,
    Instruction,
    KeepSliceForBackward,
    Move,
    StartMoves,
    resolve,
)
from shardwright.ir.operator import operator_name
from shardwright.ir.visitor import InstructionVisitor


def argument_text(argument: Any) -> str:
    """Returns an argument of a call as readable code."""
    if isinstance(argument, (list, tuple)):
        inner = ", ".join(argument_text(a) for a in argument)
        return f"[{inner}]" if isinstance(argument, list) else f"({inner}{',' if len(argument) == 1 else ''})"
    if isinstance(argument, slice):
        return f"slice({argument.start}, {argument.stop})"
    return repr(argument)


def instruction_text(instruction: Instruction, rank: int) -> str:
    """Returns the line of an instruction, as one rank runs it."""
    return _Text(rank).visit(instruction)


class _Text(InstructionVisitor[str]):
    """Writes instructions as one rank runs them."""

    def __init__(self, rank: int):
        self.rank = rank

    def call(self, call: Call) -> str:
        args, kwargs = resolve((call.args, call.kwargs), self.rank)
        parts = [*(argument_text(a) for a in args), *(f"{k}={argument_text(v)}" for k, v in kwargs.items())]
        return f"{', '.join(call.outputs)} = {operator_name(call.function)}({', '.join(parts)})  # {call.cause}"

    def move(self, move: Move) -> str:
        return f"{move.output} = move({move.source}, {_what(move)})  # {move.edge}"

    def start_moves(self, start: StartMoves) -> str:
        return f"start({', '.join(move.output for move in start.moves)})  # {_edges(start.moves)}"

    def fused_moves(self, fused: FusedMoves) -> str:
        names, sources = ", ".join(fused.outputs), ", ".join(fused.reads)
        return f"{names} = move_together({sources}, {_what(fused.moves[0])})  # {_edges(fused.moves)}"

    def keep_slice(self, keep: KeepSliceForBackward) -> str:
        return f"keep_piece({keep.cut.source}, {str(keep.cut.redistribution)!r})  # {keep.cause}"


def _edges(moves: Sequence[Move]) -> str:
    return "; ".join(move.edge for move in moves)


def _what(move: Move) -> str:
    """Returns the steps of a move. It adds the dtypes in which it travels if they differ from its own."""
    return f"{str(move.redistribution)!r}{_wire_text(move)}"


def _wire_text(move: Move) -> str:
    if move.wire is None:
        return ""
    names = [str(dtype).removeprefix("torch.") for dtype in (move.wire.forward, move.wire.result, move.wire.backward)]
    return f", '{names[0]} -> {names[1]} | {names[2]}'"
