"""Local program: what one rank runs.

A list of calls on local tensors and of moves (redistributions). It names collectives by axes, never by process groups,
so the same program runs in every world. ``rank_groups`` says, for every value, which ranks hold the same tensor: two ranks
in one group compute the same thing. A distributed rank ignores it; the simulated world computes each group only once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from shardwright.ir.instructions import Call, Instruction, KeepSliceForBackward, Move, ProgramInput, calls_of
from shardwright.ir.layout import Layout
from shardwright.ir.program_text import instruction_text
from shardwright.ir.rank_groups import RankGroups


@dataclass(frozen=True)
class LocalProgram:
    """A program that one rank runs.

    ``outputs`` are names of values that every rank holds whole, or constants; ``split`` are those among them of which a rank
    holds a piece, or a pending sum. ``places`` names the local value that holds each value of the graph, as its operator
    returns it. ``kept`` names results of instructions with ``recompute`` that are kept nevertheless: the results of a whole
    group that is recomputed. ``copies`` gives the copy that the calls of a node belong to, if operators run in copies.
    """

    world_size: int
    inputs: tuple[ProgramInput, ...]
    instructions: tuple[Instruction, ...]
    outputs: tuple[Any, ...]
    updates: tuple[tuple[str, str], ...]
    rank_groups: dict[str, RankGroups]
    layouts: dict[str, Layout]
    places: dict[str, str] = field(default_factory=dict)
    kept: frozenset[str] = frozenset()
    copies: dict[str, int] = field(default_factory=dict)
    split: frozenset[str] = frozenset()

    def text(self, rank: int = 0) -> str:
        """Returns the program of one rank as readable code."""
        names = ", ".join(i.name for i in self.inputs)
        lines = [f"def rank_{rank}({names}):"]
        for i in self.inputs:
            local = list(i.layout.local_shape(i.meta.shape, rank))
            lines.append(f"    # {i.name}: {i.kind} {i.target} {local} of {list(i.meta.shape)}, {i.layout.short() or 'scalar'}")
        for instruction in self.instructions:
            lines.append(f"    {instruction_text(instruction, rank)}{self._remark(instruction)}")
        lines.append(f"    return {', '.join(str(o) for o in self.outputs)}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text(0)

    def _remark(self, instruction: Instruction) -> str:
        if not instruction.recompute:
            return ""
        if self.kept.issuperset(instruction.outputs):
            return ", kept; what it saves within is computed again"
        return ", computed again in the backward"

    @property
    def moves(self) -> list[Move]:
        """Every move, in order."""
        return [move for instruction in self.instructions for move in instruction.ends]

    @property
    def calls(self) -> list[Call]:
        """Every local call, in order."""
        return calls_of(self.instructions)

    @property
    def kept_slices(self) -> list[KeepSliceForBackward]:
        """Every instruction that keeps only a slice for the backward pass, in order."""
        return [i for i in self.instructions if isinstance(i, KeepSliceForBackward)]

    @property
    def shared_moves(self) -> list[tuple[Move, ...]]:
        """The moves that share their collectives."""
        return [moves for i in self.instructions for moves in (i.starts, i.ends) if len(moves) > 1]

    def refs_of(self, instruction: Instruction) -> tuple[str, ...]:
        """Lists the local values that an instruction reads."""
        return instruction.reads

    def last_uses(self) -> list[tuple[str, ...]]:
        """Lists, for every instruction, the values that nothing reads after it."""
        kept = {o for o in self.outputs if isinstance(o, str)} | {v for _, v in self.updates}
        seen: set[str] = set(kept)
        result: list[tuple[str, ...]] = []
        for instruction in reversed(self.instructions):
            dying = []
            for name in (*instruction.reads, *instruction.outputs):
                if name not in seen:
                    seen.add(name)
                    dying.append(name)
            result.append(tuple(dying))
        return result[::-1]
