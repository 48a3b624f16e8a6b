"""Program text: a local program as a person reads it."""

from __future__ import annotations

from typing import Any

from shardwright.ir.instructions import FusedMoves, Instruction, KeepSliceForBackward, Move, StartMoves, resolve
from shardwright.ir.operator import operator_name


def argument_text(argument: Any) -> str:
    if isinstance(argument, (list, tuple)):
        inner = ", ".join(argument_text(a) for a in argument)
        return f"[{inner}]" if isinstance(argument, list) else f"({inner}{',' if len(argument) == 1 else ''})"
    if isinstance(argument, slice):
        return f"slice({argument.start}, {argument.stop})"
    return repr(argument)


def instruction_text(instruction: Instruction, rank: int) -> str:
    if isinstance(instruction, StartMoves):
        edges = "; ".join(m.edge for m in instruction.moves)
        return f"start({', '.join(m.output for m in instruction.moves)})  # {edges}"
    if isinstance(instruction, KeepSliceForBackward):
        return f"keep_piece({instruction.cut.source}, {str(instruction.cut.redistribution)!r})  # {instruction.cause}"
    if isinstance(instruction, FusedMoves):
        names, sources = ", ".join(instruction.outputs), ", ".join(m.source for m in instruction.moves)
        edges = "; ".join(m.edge for m in instruction.moves)
        what = f"{str(instruction.moves[0].redistribution)!r}{_wire_text(instruction.moves[0])}"
        return f"{names} = move_together({sources}, {what})  # {edges}"
    if isinstance(instruction, Move):
        what = f"{str(instruction.redistribution)!r}{_wire_text(instruction)}"
        return f"{instruction.output} = move({instruction.source}, {what})  # {instruction.edge}"
    args, kwargs = resolve((instruction.args, instruction.kwargs), rank)
    parts = [*(argument_text(a) for a in args), *(f"{k}={argument_text(v)}" for k, v in kwargs.items())]
    name = operator_name(instruction.function)
    return f"{', '.join(instruction.outputs)} = {name}({', '.join(parts)})  # {instruction.cause}"


def _wire_text(move: Move) -> str:
    if move.wire is None:
        return ""
    names = [str(dtype).removeprefix("torch.") for dtype in (move.wire.forward, move.wire.result, move.wire.backward)]
    return f", '{names[0]} -> {names[1]} | {names[2]}'"
