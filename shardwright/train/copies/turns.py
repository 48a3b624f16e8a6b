"""Orders instructions so that the copies of a batch take turns.

The copies of a graph (:mod:`shardwright.train.copies.module`) stand in it one after the other. Here each runs until a tensor
of its own has to travel; that is started at once, and then it is the next copy's turn. When the turn comes back the copy
waits for what travelled, and goes on. Only the order changes: nothing else is computed, and moves are started before they
are ended. Autograd runs backward in the opposite order of the forward, so the copies take turns there too: the gradient of
a move starts to travel at its end's place and is waited for at its start's.

Between two moves there often is either much to compute or next to nothing: sums stand where a feed-forward layer ends, and
those of its gradient where it begins. While another copy waits, much work is therefore done in two halves: one hides the
forward's sum, the other the backward's.

Invariants:

- Every instruction runs after those that make what it reads.
- Instructions that read or write a tensor which calls write in place, such as running statistics, keep their order.
- Calls that draw random numbers keep their order, so that the numbers are those of the single device. What only they need
  is drawn early where another copy's turn comes first.
- Every rank runs the same order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

import torch

from shardwright.cost.operations import flops
from shardwright.ir.graph import Graph
from shardwright.ir.instructions import Call, FusedMoves, Instruction, Move, StartMoves, calls_of, is_call
from shardwright.ir.operator import Operator
from shardwright.ir.program import LocalProgram
from shardwright.rules import random_draw
from shardwright.rules.pieces import piece

# Of the calls that a random operator becomes, those that draw nothing.
_NO_DRAWS = (
    piece, random_draw.apply_dropout, random_draw.apply_alpha, random_draw.apply_native, random_draw.in_order,
    torch.clone, torch.ones_like,
)  # fmt: skip


def interleave(program: LocalProgram, graph: Graph) -> LocalProgram:
    """Orders the instructions of a program so that copies take turns; without copies it stays as it is.

    Args:
        program: the program.
        graph: the graph it was made from, whose nodes name their copies.
    """
    copies = {node.name: node.copy for node in graph.nodes if node.copy is not None}
    if not copies:
        return program
    drawing = {node.name for node in graph.nodes if draws(node.op)}
    work = {name: flops(node.op) for node in graph.nodes if (name := node.name) in copies}
    instructions: Sequence[Instruction] = program.instructions
    for group in sorted({of for of, _ in copies.values()}):
        members = {name: index for name, (of, index) in copies.items() if of == group}
        if len({members[i.cause] for i in instructions if i.cause in members}) > 1:
            instructions = _Turns(program, instructions, members, drawing, work).order()
    return replace(program, instructions=tuple(instructions), copies={name: index for name, (_, index) in copies.items()})


def draws(op: Operator) -> bool:
    """Tells whether an operator call draws random numbers; a dropout of nothing draws none."""
    return op.draws and not (op.name.endswith("dropout") and op.argument("p") == 0)


class _Turns:
    """Instructions from the first to the last of a group of copies, and their new order."""

    def __init__(
        self,
        program: LocalProgram,
        instructions: Sequence[Instruction],
        copies: dict[str, int],
        drawing: set[str],
        work: dict[str, float],
    ):
        places = [at for at, i in enumerate(instructions) if i.cause in copies]
        first, end = places[0], places[-1] + 1
        self.before, self.after = instructions[:first], instructions[end:]
        self.region = [part for i in _not_started(instructions[first:end], copies) for part in _by_copy(i, copies)]
        self.maker = {name: at for at, i in enumerate(self.region) for name in i.outputs}
        self.draws = [_is_draw(i, drawing) for i in self.region]
        self.needs = self._needs(program)
        self.queues = self._queues(copies)
        self.leaving: dict[int, list[int]] = {}  # maker of a tensor that travels -> its moves
        self.moves: dict[int, Move] = {}  # of a copy's own tensors, by place
        for at, move in enumerate(self.region):
            if not isinstance(move, Move) or move.cause not in copies or move.source not in self.maker:
                continue
            move = self.region[at] = self.moves[at] = replace(move, copy=copies[move.cause])
            if _travels(move):
                self.leaving.setdefault(self.maker[move.source], []).append(at)
        self.work = self._work(work)
        self.result: list[Instruction] = []
        self.done = [False] * len(self.region)
        self.started: set[int] = set()
        self.under_way: set[int] = set()
        self.has_paused = [False] * len(self.queues)  # within what a copy computes before its next move

    def _needs(self, program: LocalProgram) -> list[list[int]]:
        """Finds, for every instruction, those that have to run before it."""
        needs: list[list[int]] = []
        memory = self._memory()
        changed = {memory.get(name, name) for call in calls_of(self.region) for name in call.written}
        last_use: dict[str, int] = {}  # tensor that is changed in place -> the last instruction that reads or writes it
        starts: dict[str, int] = {}
        last_draw = None
        for at, instruction in enumerate(self.region):
            found = [self.maker[name] for name in instruction.reads if name in self.maker]
            starts.update((move.output, at) for move in instruction.starts)
            found += [starts[move.output] for move in instruction.ends if move.output in starts]
            for tensor in changed & {memory.get(name, name) for name in instruction.reads}:
                found += [last_use[tensor]] if tensor in last_use else []
                last_use[tensor] = at
            if self.draws[at]:
                found += [last_draw] if last_draw is not None else []
                last_draw = at
            needs.append(found)
        return needs

    def _memory(self) -> dict[str, str]:
        """Maps the results of moves to the tensors that they may share their memory with."""
        memory: dict[str, str] = {}
        for instruction in (*self.before, *self.region):
            for move in instruction.ends:
                memory[move.output] = memory.get(move.source, move.source)
        return memory

    def _queues(self, copies: dict[str, int]) -> list[deque[int]]:
        """Lists the instructions of each copy in order; those of no copy go with the one that follows them."""
        self.owners = [0] * len(self.region)
        owner = 0
        for at in reversed(range(len(self.region))):
            owner = self.owners[at] = copies.get(self.region[at].cause, owner)
        count = max(self.owners) + 1
        return [deque(at for at, own in enumerate(self.owners) if own == index) for index in range(count)]

    def _work(self, work: dict[str, float]) -> list[float]:
        """Counts the operations of every instruction: those of an operator at its first call."""
        counted: set[str] = set()
        result = []
        for instruction in self.region:
            is_first = is_call(instruction) and instruction.cause not in counted
            result.append(work.get(instruction.cause, 0.0) if is_first else 0.0)
            counted.update([instruction.cause] if is_first else [])
        return result

    def order(self) -> list[Instruction]:
        while any(self.queues):
            for copy in range(len(self.queues)):
                self._take_turn(copy)
        return [*self.before, *_without_idle_starts(self.result, self.started, self.region), *self.after]

    def _take_turn(self, copy: int) -> None:
        """Runs a copy until one of its tensors travels, or half of the work before is done.

        After its last move it lets the others go first once, so that their moves have something to hide behind.
        """
        queue, started = self.queues[copy], len(self.started)
        is_last = not any(at in self.leaving for at in queue)
        if is_last and not self.has_paused[copy]:
            self.has_paused[copy] = True
            return
        left = self._work_before_a_move(queue)
        half = left / 2
        while queue:
            at = queue.popleft()
            self._run(at)
            left -= self.work[at]
            if len(self.started) > started:
                self.has_paused[copy] = False
                return
            if 0 < left <= half and not self.has_paused[copy] and self._others_wait(copy):
                self.has_paused[copy] = True
                return

    def _work_before_a_move(self, queue: Iterable[int]) -> float:
        total = 0.0
        for at in queue:
            total += self.work[at]
            if at in self.leaving:
                break
        return total

    def _others_wait(self, copy: int) -> bool:
        return any(self.owners[at] != copy for at in self.under_way)

    def _run(self, wanted: int) -> None:
        """Runs an instruction, and before it those that it needs."""
        stack = [wanted]
        while stack:
            at = stack[-1]
            missing = [need for need in self.needs[at] if not self.done[need]]
            if missing and not self.done[at]:
                stack += reversed(missing)
                continue
            stack.pop()
            if not self.done[at]:
                self._append(at)

    def _append(self, at: int) -> None:
        self.done[at] = True
        self.under_way.discard(at)
        self.result.append(replace(self.moves[at], started=True) if at in self.started else self.region[at])
        for move in self.leaving.get(at, ()):
            self.started.add(move)
            self.under_way.add(move)
            self.result.append(StartMoves((self.moves[move],)))
        if self.draws[at]:  # a whole draw is cut at once, so that only the piece is kept
            cut = at + 1
            while cut < len(self.region) and self._only_cuts(cut, at):
                self._append(cut)
                cut += 1

    def _only_cuts(self, at: int, drawn: int) -> bool:
        instruction = self.region[at]
        return isinstance(instruction, Call) and instruction.function is piece and self.needs[at] == [drawn]


def _is_draw(instruction: Instruction, drawing: set[str]) -> bool:
    """Tells whether an instruction draws random numbers; ``drawing``: nodes that do."""
    return isinstance(instruction, Call) and instruction.cause in drawing and instruction.function not in _NO_DRAWS


def _not_started(instructions: Sequence[Instruction], copies: dict[str, int]) -> list[Instruction]:
    """Removes the early starts of copies' own tensors, which are decided anew."""
    made = {name for i in instructions for name in i.outputs}
    firsts = [i.starts[0] for i in instructions if i.starts and i.cause in copies]
    return _whole_again(instructions, {move.output for move in firsts if move.source in made})


def _whole_again(instructions: Sequence[Instruction], outputs: Collection[str]) -> list[Instruction]:
    """Replaces the starts and ends of the moves that make these values by whole moves."""
    kept: list[Instruction] = []
    for instruction in instructions:
        if instruction.starts and instruction.starts[0].output in outputs:
            continue
        if isinstance(instruction, Move) and instruction.output in outputs:
            instruction = replace(instruction, started=False)
        kept.append(instruction)
    return kept


def _by_copy(instruction: Instruction, copies: dict[str, int]) -> list[Instruction]:
    """Separates fused moves by copy, so that one copy's do not wait for another's."""
    if len(instruction.ends) < 2:
        return [instruction]
    parts: dict[int | None, list[Move]] = {}
    for move in instruction.ends:
        parts.setdefault(copies.get(move.cause), []).append(move)
    return [moves[0] if len(moves) == 1 else FusedMoves(tuple(moves)) for moves in parts.values()]


def _travels(move: Move) -> bool:
    return not move.started and (move.communicates or move.communicates_backward)


def _without_idle_starts(
    instructions: Sequence[Instruction], started: set[int], region: Sequence[Instruction]
) -> list[Instruction]:
    """Replaces starts and ends by whole moves where nothing is computed in between."""
    ours = {region[at].outputs[0] for at in started}
    begun: dict[str, int] = {}
    calls = 0
    idle: set[str] = set()
    for instruction in instructions:
        calls += is_call(instruction)
        begun.update((move.output, calls) for move in instruction.starts)
        ended = [move.output for move in instruction.ends if move.output in ours]
        idle.update(output for output in ended if begun[output] == calls)
    return _whole_again(instructions, idle)
