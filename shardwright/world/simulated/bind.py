"""Binds a local program to simulated ranks, as one generated function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shardwright.ir.instructions import Call, FusedMoves, KeepSliceForBackward, Move, PerRank, StartMoves
from shardwright.ir.layout import Layout
from shardwright.ir.program import LocalProgram
from shardwright.ir.rank_groups import RankGroups
from shardwright.ir.visitor import InstructionVisitor
from shardwright.redistribute.steps import steps_between
from shardwright.world.execute import log as record
from shardwright.world.execute.recipes import Computation
from shardwright.world.execute.recording import computation_of
from shardwright.world.execute.source import SourceWriter, write_note
from shardwright.world.simulated.moves import SimulatedFusedMoves, SimulatedMove, representatives
from shardwright.world.simulated.steps import run_steps


class _EnterFunction(torch.autograd.Function):
    """Autograd function from a global tensor to the piece of each rank group; joins the gradient's pieces."""

    @staticmethod
    def forward(ctx: Any, pieces: list[tuple[slice, ...]], value: Tensor) -> tuple[Tensor, ...]:
        ctx.pieces, ctx.shape = pieces, value.shape
        ctx.set_materialize_grads(False)
        return tuple(value[piece] for piece in pieces)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        known = next((g for g in gradients if g is not None), None)
        if known is None:
            return None, None
        if torch.is_grad_enabled():
            return None, _AssembleFunction.apply(ctx.pieces, ctx.shape, *gradients)
        return None, _assembled(ctx.pieces, ctx.shape, gradients)


class _AssembleFunction(torch.autograd.Function):
    """Pieces to the global tensor."""

    @staticmethod
    def forward(ctx: Any, pieces: list[tuple[slice, ...]], shape: torch.Size, *values: Tensor | None) -> Tensor:
        ctx.pieces = pieces
        return _assembled(pieces, shape, values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return None, None, *[gradient[piece] for piece in ctx.pieces]


def _assembled(pieces: list[tuple[slice, ...]], shape: torch.Size, values: Sequence[Tensor | None]) -> Tensor:
    """Returns the global tensor of its pieces; those that are missing are zero."""
    whole = next(value for value in values if value is not None).new_empty(shape)
    for piece, value in zip(pieces, values, strict=True):
        whole[piece] = 0 if value is None else value
    return whole


def enter(value: Tensor, layout: Layout, lanes: RankGroups) -> list[Tensor]:
    """Cuts a global tensor into the piece of each rank group, differentiably."""
    if max(lanes) == 0:
        return [value]
    slices = layout.slices(value.shape)
    pieces = [slices[r] for r in representatives(lanes)]
    if value.requires_grad and torch.is_grad_enabled():
        return list(_EnterFunction.apply(pieces, value))
    return [value[piece] for piece in pieces]


def _bind(program: LocalProgram, keep: tuple[str, ...] | None, records: bool = False) -> Callable[..., Any]:
    """Generates the function of a program.

    Args:
        program: the program.
        keep: local values to return in place of the outputs.
        records: whether the first argument of the function is a recording, which learns what is computed again.
    """
    names = [i.name for i in program.inputs]
    writer = SourceWriter("simulated", ["_run", *names] if records else names)
    for item in program.inputs:
        if item.kind == "local":
            continue  # given as rank groups
        if max(program.rank_groups[item.name]) > 0:
            call = writer.constant("enter", lambda v, i=item: enter(v, i.layout, program.rank_groups[i.name]))
            writer.line(f"{item.name} = {call}({item.name})")
        else:
            writer.line(f"{item.name} = [{item.name}]")
    binder = _Binder(writer, program, records)
    for instruction, dead in zip(program.instructions, program.last_uses(), strict=True):
        binder.visit(instruction)
        writer.forget([name for name in dead if name not in (keep or ())])
    writer.context(None, True)
    if keep is not None:
        return writer.function(f"[{', '.join(keep)}]")
    outputs = [_output(o, program) if isinstance(o, str) else writer.constant("value", o.value) for o in program.outputs]
    updates = [f"{name}[0]" for _, name in program.updates]
    return writer.function(f"[{', '.join(outputs)}], [{', '.join(updates)}]")


def _output(name: str, program: LocalProgram) -> str:
    """Writes the value of an output: the whole one, or those of all rank groups."""
    return name if name in program.split else f"{name}[0]"


class _Binder(InstructionVisitor[None]):
    """Writes the lines of each instruction, as all rank groups run it.

    Args:
        records: whether the function is given a recording, ``_run``.
    """

    def __init__(self, writer: SourceWriter, program: LocalProgram, records: bool):
        self.writer, self.program, self.rank_groups, self.records = writer, program, program.rank_groups, records
        self.bucket_of: dict[str, tuple[Move, ...]] = {}  # output of a move that was started with others -> all of them
        self.done: set[str] = set()  # outputs of moves that the first of their bucket did
        self.noted: dict[str, SimulatedMove] = {}  # output of a move whose start is logged -> the move

    def call(self, call: Call) -> None:
        self.writer.context(call.autocast, call.grad)
        if self.records and call.recompute:
            _write_recorded_call(self.writer, call, self.program)
        else:
            _write_call(self.writer, call, self.program)
        write_note(self.writer, call, self.program)

    def move(self, move: Move) -> None:
        if move.output in self.done:
            return
        if move.output in self.bucket_of:
            members = self.bucket_of[move.output]
            self._together(members)
            self.done.update(member.output for member in members)
            return
        self.writer.context(move.autocast, move.grad)
        runner = self.noted.get(move.output) or SimulatedMove(move, self.rank_groups[move.source])
        self.writer.line(f"{move.output} = {self.writer.constant('move', runner)}({move.source})")
        if self.records and move.recompute:
            again = self.writer.constant("again", Computation(runner.recompute))
            self.writer.line(f"_run.moved({again}, {move.source}, {move.output})")

    def start_moves(self, start: StartMoves) -> None:
        """Writes hardly anything, as nothing travels here: the first of the moves to end does everything."""
        if len(start.moves) > 1:
            self.bucket_of |= dict.fromkeys((move.output for move in start.moves), start.moves)
        elif self.program.copies:  # logged, as logs show what runs meanwhile
            (move,) = start.moves
            runner = self.noted[move.output] = SimulatedMove(move, self.rank_groups[move.source])
            self.writer.names["_logs"] = record._active
            self.writer.line(f"if _logs: {self.writer.constant('start', runner.note_start)}({move.source})")

    def fused_moves(self, fused: FusedMoves) -> None:
        self._together(fused.moves)

    def _together(self, moves: Sequence[Move]) -> None:
        self.writer.context(moves[0].autocast, moves[0].grad)
        runner = SimulatedFusedMoves(moves, self.rank_groups)
        sources, outputs = [move.source for move in moves], [move.output for move in moves]
        self.writer.line(f"{', '.join(outputs)} = {self.writer.constant('together', runner)}({', '.join(sources)})")
        if self.records and moves[0].recompute:
            again = self.writer.constant("again", Computation(runner.recompute))
            self.writer.line(f"_run.moved({again}, {' + '.join(sources)}, {' + '.join(outputs)})")

    def keep_slice(self, keep: KeepSliceForBackward) -> None:
        if not self.records:
            return
        lanes = self.rank_groups[keep.cut.source]
        cut, gather = (
            SimulatedMove(keep.cut, lanes),
            SimulatedMove(replace(keep.gather, rank_groups=lanes), keep.cut.rank_groups),
        )
        again = self.writer.constant("again", Computation(gather.recompute))
        pieces = self.writer.constant("cut", lambda values: [piece.clone() for piece in cut.move_forward(values)])
        self.writer.line(f"_run.keep_pieces({again}, {pieces}, {keep.cut.source})")


def _write_recorded_call(writer: SourceWriter, call: Call, program: LocalProgram) -> None:
    """Writes a call per rank group, since what each saves is computed again separately."""
    made = []
    for rank in representatives(call.rank_groups):
        computation, names = computation_of(call, program, rank)
        values = [f"{name}[{program.rank_groups[name][rank]}]" for name in names]
        made.append(f"_run.call({', '.join([writer.constant('again', computation), *values])})")
    writer.line(f"_many = [{', '.join(made)}]")
    _write_many(writer, call)


def _write_many(writer: SourceWriter, call: Call) -> None:
    for position, name in enumerate(call.outputs):
        writer.line(f"{name} = [_each[{position}] for _each in _many]")
    writer.line("_many = None")


def _write_call(writer: SourceWriter, call: Call, program: LocalProgram) -> None:
    """Writes one comprehension over the rank groups of the call; each input is read at its own rank group."""
    ranks = representatives(call.rank_groups)
    reads: dict[str, str] = {}  # text of the read -> loop variable
    columns: list[list[Any]] = []
    sources: list[str] = []

    def column(key: str, source: str, values: list[Any]) -> str:
        if key not in reads:
            reads[key] = f"_i{len(reads)}"
            columns.append(values)
            sources.append(source)
        return reads[key]

    def read(ref_name: str) -> str:
        lanes = program.rank_groups[ref_name]
        if max(lanes) == 0:
            return f"{ref_name}[0]"
        index = [lanes[r] for r in ranks]
        return f"{ref_name}[{column('ref' + str(index), '', index)}]"

    def per_rank(leaf: PerRank) -> str:
        values = [leaf.of(r) for r in ranks]
        if all(v == values[0] for v in values):
            return writer.literal(values[0])
        return column(f"rank{id(leaf)}", "", values)

    text = writer.call(call.function, call.args, call.kwargs, read, per_rank)
    if not reads:
        assert len(ranks) == 1, call
        text = f"[{text}]"
    else:
        table = writer.constant("lanes", list(zip(*columns, strict=True)))
        text = f"[{text} for {', '.join(reads.values())}, in {table}]"
    if not call.sequence:
        writer.line(f"{call.outputs[0]} = {text}")
    else:
        writer.line(f"_many = {text}")
        _write_many(writer, call)


def gather_rank_groups(values: list[Tensor], layout: Layout, shape: tuple[int, ...], lanes: RankGroups) -> Tensor:
    """Joins the tensors of rank groups to the global tensor, and does pending sums.

    Args:
        values: the tensor of each rank group.
        layout: their layout.
        shape: global shape.
        lanes: the rank groups.
    """
    steps = steps_between(layout, Layout.replicated(layout.mesh, layout.ndim), shape)
    return run_steps([values[i] for i in lanes], steps, shape)[0]
