"""Visitor: does something else for every type of instruction, without a ladder of tests.

Only here is it asked of which type an instruction is. Visitors run when programs are written, changed or bound, never when
they run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

from shardwright.ir.instructions import Call, FusedMoves, Instruction, KeepSliceForBackward, Move, StartMoves

T = TypeVar("T")


class InstructionVisitor(ABC, Generic[T]):
    """One method for every type of instruction."""

    def visit(self, instruction: Instruction) -> T:
        """Calls the method that the type of an instruction has, and returns what it returns."""
        method: Any = getattr(self, _METHODS[type(instruction)])
        result: T = method(instruction)
        return result

    @abstractmethod
    def call(self, call: Call) -> T:
        """Returns a local call."""

    @abstractmethod
    def move(self, move: Move) -> T:
        """Returns a move by itself: all of it, or its end where it is ``started``."""

    @abstractmethod
    def start_moves(self, start: StartMoves) -> T:
        """Returns the beginning of moves that end later."""

    @abstractmethod
    def fused_moves(self, fused: FusedMoves) -> T:
        """Moves that share their collectives, at once."""

    @abstractmethod
    def keep_slice(self, keep: KeepSliceForBackward) -> T:
        """Returns a value that is kept for the backward pass as a slice."""


_METHODS: dict[type, str] = {
    Call: "call",
    Move: "move",
    StartMoves: "start_moves",
    FusedMoves: "fused_moves",
    KeepSliceForBackward: "keep_slice",
}
