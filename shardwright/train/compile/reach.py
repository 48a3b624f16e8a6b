"""Finds the outputs of a program that the gradients of a value come from.

A compiled function returns zeros where the eager program gives no gradient at all, unless all of it leads to the same
outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from shardwright.ir.graph import Graph
from shardwright.ir.instructions import Call, FusedMoves, Instruction, Move
from shardwright.ir.program import LocalProgram

Reach = frozenset[str] | None  # the outputs that gradients come from; None: there is nothing to differentiate


def gradients_from(program: LocalProgram, graph: Graph) -> tuple[dict[int, Reach], dict[str, frozenset[str]]]:
    """Finds, for every call and value, the outputs whose gradients may reach it."""
    differentiable = {n.name for n in graph.nodes if any(v in graph.needs_grad for v in n.outputs)}
    values: dict[str, frozenset[str]] = {o: frozenset((o,)) for o in program.outputs if isinstance(o, str)}
    nothing: frozenset[str] = frozenset()
    calls: dict[int, Reach] = {}
    for instruction in reversed(program.instructions):
        if isinstance(instruction, Call):
            found = nothing.union(*(values.get(o, nothing) for o in instruction.outputs))
            passes = instruction.grad and instruction.cause in differentiable
            calls[id(instruction)] = found if passes else None
            for name in instruction.reads if passes else ():
                values[name] = values.get(name, nothing) | found
        for move in instruction.ends:
            if move.needs_grad and move.grad:
                values[move.source] = values.get(move.source, nothing) | values.get(move.output, nothing)
    return calls, values


def moves_apart(program: LocalProgram, graph: Graph) -> Iterator[Instruction]:
    """Yields the instructions; fused moves of computed values are separated unless they lead to the same outputs.

    The backward of fused moves continues behind all of them, with no gradient where there is none.
    """
    _, values = gradients_from(program, graph)
    given = {i.name for i in program.inputs}
    for instruction in program.instructions:
        computed = [values.get(move.output) for move in instruction.ends if move.source not in given]
        if len(set(computed)) < 2:
            yield instruction
            continue
        groups: dict[Any, list[Move]] = {}
        for move in instruction.ends:
            groups.setdefault(computed[0] if move.source in given else values.get(move.output), []).append(move)
        for moves in groups.values():
            yield FusedMoves(tuple(moves)) if len(moves) > 1 else moves[0]
