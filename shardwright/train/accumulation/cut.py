"""Cuts a program into a part that runs once per batch and one that runs per micro-batch."""

from __future__ import annotations

from dataclasses import replace

from shardwright.ir.instructions import Instruction, Move, ProgramInput
from shardwright.ir.program import LocalProgram


def cut_program(program: LocalProgram, gathers_once: bool) -> tuple[LocalProgram, LocalProgram, tuple[str, ...]]:
    """Cuts a program into what runs once per step and what runs for every micro-batch.

    Args:
        program: not scheduled yet.
        gathers_once: whether split parameters are gathered once; else for every micro-batch, and their gradients scattered.

    Returns:
        The two programs, and the local values that the first makes for the second: its inputs of kind ``local``.
    """
    own = {i.name for i in program.inputs if i.kind == "parameter"}
    once: list[Move] = []
    each: list[Instruction] = []
    ready = set(own)
    for instruction in program.instructions:
        if isinstance(instruction, Move) and instruction.source in ready and (gathers_once or not instruction.communicates):
            once.append(instruction)
            ready.add(instruction.output)
        else:
            each.append(instruction)
    read = {name for instruction in each for name in instruction.reads}
    read |= {o for o in program.outputs if isinstance(o, str)} | {v for _, v in program.updates}
    metas = {i.name: i.meta for i in program.inputs}
    for move in once:
        metas[move.output] = metas[move.source]
    handed = tuple(name for name in metas if name in ready and name in read)
    given = tuple(i for i in program.inputs if i.kind == "parameter")
    first = replace(program, inputs=given, instructions=tuple(once), outputs=(), updates=(), places={})
    local = [ProgramInput(name, "local", name, metas[name], program.layouts[name]) for name in handed]
    inputs = (*(i for i in program.inputs if i.kind != "parameter"), *local)
    return first, replace(program, inputs=inputs, instructions=tuple(each)), handed
