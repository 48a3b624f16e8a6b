"""Finds runs of local calls between moves, to be compiled as one function each.

A segment is as long as the schedule allows. Calls that a segment needs and that do not depend on it are put before it,
also ahead of blocking moves and of moves of parameters that communicate in the backward pass only; calls that continue
from a segment's results are put before blocking moves. The overlap of communication with computation is kept:

- A segment ends at a :class:`StartMoves`: no call is put before it.
- A started move that travels in the forward pass is not ended earlier than the schedule ends it.
- Gradients of parameters leave a segment together, when its backward is done: at most ``bucket`` bytes of them.

What autograd computes is kept as well. All calls of a segment lead to the same outputs of the program, so that a value
without a gradient (``None``) in the eager program has none here; they run under the same autocast and gradient mode and, in
the simulated world, in the same rank groups. Nothing here depends on the rank: all ranks find the same order.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from shardwright.ir.graph import Graph
from shardwright.ir.instructions import Call, FusedMoves, Instruction, KeepSliceForBackward, Move, StartMoves
from shardwright.ir.program import LocalProgram
from shardwright.ir.visitor import InstructionVisitor
from shardwright.plan.problem.blocks import blocks_of
from shardwright.train.compile.compilable import changed_in_place, computes, left_out
from shardwright.train.compile.draws import draws
from shardwright.train.compile.reach import Reach, gradients_from, moves_apart

# The bytes at which PyTorch's own data parallelism cuts compiled graphs.
BUCKET = 25 << 20

# How many instructions a call may be brought forward by.
_LOOK_AHEAD = 64


@dataclass(frozen=True)
class Segment:
    """Calls to be compiled as one function, in order."""

    calls: tuple[Call, ...]


def segments_of(
    program: LocalProgram, graph: Graph, by_rank_groups: bool = False, bucket: float = BUCKET
) -> list[Instruction | Segment]:
    """Orders the instructions of a program so that segments are long; returns both.

    Args:
        program: the program.
        graph: the graph that it was made from.
        by_rank_groups: whether the calls of a segment must run in the same rank groups, as the simulated world needs.
        bucket: bytes of gradients of parameters that leave a segment together.
    """
    program = replace(program, instructions=tuple(moves_apart(program, graph)))
    facts = _Facts(program, graph, by_rank_groups)
    return _grouped(list(program.instructions), facts, bucket)


def _grouped(pending: list[Instruction], facts: _Facts, bucket: float) -> list[Instruction | Segment]:
    found: list[Instruction | Segment] = []
    while pending:
        if facts.key(pending[0]) is None:
            found.append(pending.pop(0))
            continue
        trial = _Growth(pending, facts, math.inf, None)
        region = facts.region(pending[0]) if facts.holds_a_copy(trial.members) else None
        growth = _Growth(pending, facts, bucket, region)
        found += _grouped(growth.before, facts, bucket)
        calls = growth.members
        found += [Segment(tuple(calls))] if sum(map(computes, calls)) > 1 else calls
        pending = growth.rest
    return found


class _Growth:
    """A segment that grows from the first of some instructions on.

    Args:
        region: the copy of a repeated layer at whose end the segment ends; ``None``: at none.
    """

    def __init__(self, pending: Sequence[Instruction], facts: _Facts, bucket: float, region: int | None):
        self.facts, self.bucket, self.region = facts, bucket, region
        self.members: list[Call] = []
        self.before: list[Instruction] = []
        self.rest: list[Instruction] = []
        self.made: set[str] = set()
        self.late: set[str] = set()  # made by the remaining instructions
        self.read: set[str] = set()
        self.bytes = 0.0
        self.key: _Key = (None, None)
        order = {id(instruction): at for at, instruction in enumerate(pending)}
        for at, instruction in enumerate(pending):
            if len(self.rest) > _LOOK_AHEAD or not self._add(instruction):
                self.rest += pending[at:]
                break
        self._put_back(order)

    def _add(self, instruction: Instruction) -> bool:
        """Takes an instruction into the segment, before it or behind it; returns whether to go on."""
        facts = self.facts
        reads, key = facts.reads[id(instruction)], facts.key(instruction)
        call = instruction if isinstance(instruction, Call) else None
        if self.region is not None and call is not None and facts.region(call) != self.region:
            return False
        waits, continues = not reads.isdisjoint(self.late), not reads.isdisjoint(self.made)
        joined = None
        if key is not None and not waits and (continues or not self.rest):
            joined = _join(self.key, key) if self.members else key
        if joined is not None:
            assert call is not None  # nothing else has a key
            return self._join(call, joined, reads)
        if not (waits or continues) and facts.may_go_first(instruction, self.rest):
            self.before.append(instruction)
            return True
        if instruction.starts:
            return False
        self.rest.append(instruction)
        self.late.update(facts.makes(instruction))
        return True

    def _join(self, call: Call, key: _Key, reads: frozenset[str]) -> bool:
        size = sum(self.facts.gradients.get(name, 0.0) for name in reads - self.read)
        if self.members and self.bytes + size > self.bucket:
            return False
        self.bytes += size
        self.read |= reads
        self.members.append(call)
        self.made.update(call.outputs)
        self.key = key
        return True

    def _put_back(self, order: dict[int, int]) -> None:
        """Returns to its place what was put before the segment without need. Its backward then need not wait."""
        needed = set(self.read)
        kept: list[Instruction] = []
        for instruction in reversed(self.before):
            if instruction.starts or not needed.isdisjoint(self.facts.makes(instruction)):
                needed |= self.facts.reads[id(instruction)]
                kept.append(instruction)
            else:
                self.rest.append(instruction)
        self.before = kept[::-1]
        self.rest.sort(key=lambda instruction: order[id(instruction)])


# -- facts about the instructions -------------------------------------------------------------------------------------

_Key = tuple[Any, Reach]


def _join(one: _Key, other: _Key) -> _Key | None:
    """Returns what a segment and one more call have in common; ``None`` where the call does not fit."""
    if one[0] != other[0]:
        return None
    if one[1] is None or other[1] is None:
        return one[0], one[1] if other[1] is None else other[1]
    return one if one[1] == other[1] else None


class _Facts:
    def __init__(self, program: LocalProgram, graph: Graph, by_rank_groups: bool):
        self.by_rank_groups = by_rank_groups
        self.nodes = {node.name: node for node in graph.nodes}
        self.place = {node.name: at for at, node in enumerate(graph.nodes)}
        blocks = blocks_of(graph)
        self.borders = sorted({b.start + b.length * k for b in blocks for k in range(b.count + 1)})
        self.reads = {id(i): _reads(program, i) for i in program.instructions}
        self.reach, _ = gradients_from(program, graph)
        self.left_out = left_out(program, graph)
        self.changed = changed_in_place(program, graph)
        self.gradients = {m.output: _gradient_bytes(m) for m in program.moves}

    def key(self, instruction: Instruction) -> _Key | None:
        """Returns what must agree within a segment; ``None`` for a call that cannot be in one."""
        if not isinstance(instruction, Call) or id(instruction) in self.left_out:
            return None
        lanes = instruction.rank_groups if self.by_rank_groups else None
        return (instruction.autocast, instruction.grad, lanes), self.reach[id(instruction)]

    def makes(self, instruction: Instruction) -> tuple[str, ...]:
        return (*map(_token, instruction.starts), *instruction.outputs)

    def region(self, call: Instruction) -> int:
        """Returns the copy of a repeated layer that a call belongs to."""
        return bisect_right(self.borders, self.place[call.cause])

    def holds_a_copy(self, calls: Sequence[Call]) -> bool:
        """Tells whether calls contain a whole copy of a repeated layer."""
        regions = [self.region(call) for call in calls]
        return max(regions) - min(regions) > 1

    def may_go_first(self, instruction: Instruction, rest: Sequence[Instruction]) -> bool:
        """Tells whether an independent instruction may go before a segment and the remaining ones."""
        return self.changed.isdisjoint(self.reads[id(instruction)]) and _MayGoFirst(self, rest).visit(instruction)

    def draws(self, instruction: Instruction) -> bool:
        return isinstance(instruction, Call) and draws(instruction, self.nodes[instruction.cause])


class _MayGoFirst(InstructionVisitor[bool]):
    """Decides whether instructions independent of a segment may go before the remaining ones.

    Args:
        rest: the remaining instructions.
    """

    def __init__(self, facts: _Facts, rest: Sequence[Instruction]):
        self.facts, self.rest = facts, rest

    def call(self, call: Call) -> bool:
        if self.facts.key(call) is not None:
            return not self.rest
        return not (self.facts.draws(call) and any(map(self.facts.draws, self.rest)))

    def move(self, move: Move) -> bool:
        return not (move.started and move.communicates) and self._keeps_order(move)

    def fused_moves(self, fused: FusedMoves) -> bool:
        return self._keeps_order(fused)

    def start_moves(self, start: StartMoves) -> bool:
        return not self.rest

    def keep_slice(self, keep: KeepSliceForBackward) -> bool:
        return not self.rest

    def _keeps_order(self, instruction: Instruction) -> bool:
        """Tells whether collectives stay in the order in which all ranks make them."""
        return not (_communicates(instruction) and any(map(_communicates, self.rest)))


def _token(move: Move) -> str:
    """Names a move under way, between its start and its end."""
    return f"{move.output}, started"


def _reads(program: LocalProgram, instruction: Instruction) -> frozenset[str]:
    names = instruction.reads
    if isinstance(instruction, Move) and instruction.started:
        return frozenset((*names, _token(instruction)))
    return frozenset(names)


def _communicates(instruction: Instruction) -> bool:
    return bool(instruction.starts) or any(move.communicates for move in instruction.ends)


def _gradient_bytes(move: Move) -> float:
    """Counts the bytes of the gradient that a move sends, if it sends nothing forward."""
    plan = move.redistribution
    if move.communicates or not move.communicates_backward:
        return 0.0
    return math.prod(plan.target.local_shape(plan.shape, plan.target.mesh.ranks[0])) * move.dtype.itemsize
