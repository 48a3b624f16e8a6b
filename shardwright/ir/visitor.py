"""Visitor: calls a method per type of instruction.

Only here are types of instructions tested. Visitors run when programs are written, changed or bound, never when
they run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

from shardwright.ir.instructions import Call, FusedMoves, Instruction, KeepSliceForBackward, Move, StartMoves

T = TypeVar("T")


class InstructionVisitor(ABC, Generic[T]):
    """A class with one method per type of instruction."""

    def visit(self, instruction: Instruction) -> T:
        """Calls the method for the type of an instruction, and returns what it returns."""
        method: Any = getattr(self, _METHODS[type(instruction)])
        result: T = method(instruction)
        return result

    @abstractmethod
    def call(self, call: Call) -> T:
        """Handles a local call."""

    @abstractmethod
    def move(self, move: Move) -> T:
        """Handles a move that shares no collectives: all of it, or its end if it is ``started``."""

    @abstractmethod
    def start_moves(self, start: StartMoves) -> T:
        """Handles the start of moves that end later."""

    @abstractmethod
    def fused_moves(self, fused: FusedMoves) -> T:
        """Handles moves that share their collectives, at once."""

    @abstractmethod
    def keep_slice(self, keep: KeepSliceForBackward) -> T:
        """Handles a value that is kept for the backward pass as a slice."""


_METHODS: dict[type, str] = {
    Call: "call",
    Move: "move",
    StartMoves: "start_moves",
    FusedMoves: "fused_moves",
    KeepSliceForBackward: "keep_slice",
}
