"""Binds a local program to a process of a job, as one generated function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from shardwright.errors import WorldError
from shardwright.ir.instructions import Call, FusedMoves, Instruction, KeepSliceForBackward, Move, PerRank, StartMoves
from shardwright.ir.program import LocalProgram
from shardwright.ir.step import Step
from shardwright.partition.free_results import result_is_free, values_read_once, values_with_free_gradients
from shardwright.world.distributed.groups import Groups
from shardwright.world.distributed.moves import DistributedFusedMoves, DistributedMove
from shardwright.world.distributed.starts import StartedMoves
from shardwright.world.execute.recipes import Computation
from shardwright.world.execute.recording import computation_of
from shardwright.world.execute.source import SourceWriter, write_note


def _steps_of(program: LocalProgram) -> list[Step]:
    """Every step of every move, forward and backward."""
    moves = [*program.moves, *(i.gather for i in program.instructions if isinstance(i, KeepSliceForBackward))]
    return [s for m in moves for s in (*m.redistribution.forward, *m.redistribution.backward)]


def _bind(
    program: LocalProgram, rank: int, groups: Groups, keep: tuple[str, ...] | None, records: bool = False
) -> Callable[..., Any]:
    """The function; with ``records`` its first argument is a recording, which is told what is computed again."""
    names = [i.name for i in program.inputs]
    writer = SourceWriter("distributed", ["_run", *names] if records else names)
    dying = program.last_uses()
    check = writer.constant("check", _InputCheck(program, rank))
    writer.line(f"if {check}.pending: {check}([{', '.join(names)}])")
    only_read_once = values_read_once(program) - set(keep or ())
    free_gradients = values_with_free_gradients(program)
    made_by = {o: i for i in program.instructions for o in i.outputs}
    started: dict[str, tuple[str, int]] = {}  # output of a started move -> what is under way, and which of it
    left: dict[str, int] = {}

    def move_of(move: Move, dead: Sequence[str]) -> DistributedMove:
        maker = made_by.get(move.source)
        inplace = move.source in only_read_once and _is_free(move.source, maker)
        if move.recompute and not (isinstance(maker, Call) and maker.recompute):
            inplace = False  # what it is moved from again must stay as it is
        compact = maker is not None and move.source in dead
        return DistributedMove(move, rank, groups, inplace, compact, move.output in free_gradients)

    for instruction, dead in zip(program.instructions, dying, strict=True):
        if isinstance(instruction, KeepSliceForBackward):
            if records:
                _write_keep_piece(writer, instruction, rank, groups)
            writer.forget([name for name in dead if name not in (keep or ())])
            continue
        first = instruction.moves[0] if isinstance(instruction, (StartMoves, FusedMoves)) else instruction
        writer.context(first.autocast, first.grad)
        if isinstance(instruction, StartMoves):
            compact = any(made_by.get(move.source) is not None for move in instruction.moves)
            inplace = instruction.moves[0].output in free_gradients
            together_started = StartedMoves(instruction.moves, rank, groups, compact, inplace)
            name = writer.constant("start", together_started)
            under_way = f"_{instruction.moves[0].output}_started"
            sources = ", ".join(move.source for move in instruction.moves)
            writer.line(f"{under_way} = {name}({sources})")
            if records and first.recompute:
                writer.line(
                    f"{under_way}_again = _run.begin({_again(writer, instruction, together_started, program)}, ({sources},))"
                )
            started |= {move.output: (under_way, index) for index, move in enumerate(instruction.moves)}
            left[under_way] = len(instruction.moves)
        elif isinstance(instruction, FusedMoves):
            together = DistributedFusedMoves(instruction.moves, rank, groups)
            name = writer.constant("together", together)
            sources = ", ".join(move.source for move in instruction.moves)
            writer.line(f"{', '.join(instruction.outputs)}, = {name}({sources})")
            if records and instruction.recompute:
                again = writer.constant("again", Computation(together.again))
                writer.line(f"_run.moved({again}, ({sources},), ({', '.join(instruction.outputs)},))")
        elif isinstance(instruction, Move) and instruction.started:
            under_way, index = started[instruction.output]
            writer.line(f"{instruction.output} = {under_way}.end({index})")
            if records and instruction.recompute:
                writer.line(f"_run.made({under_way}_again, {index}, {instruction.output})")
            left[under_way] -= 1
            if not left[under_way]:
                writer.line(f"{under_way} = {under_way}_again = None")
        elif isinstance(instruction, Move):
            move = move_of(instruction, dead)
            name = writer.constant("move", move if instruction.needs_grad else move.without_gradient)
            writer.line(f"{instruction.output} = {name}({instruction.source})")
            if records:
                _write_moved(writer, instruction, move)
        elif records and instruction.recompute:
            _write_recorded_call(writer, instruction, program, rank)
        else:
            _write_call(writer, instruction, rank)
            write_note(writer, instruction, program)
        writer.forget([name for name in dead if name not in (keep or ())])
    writer.context(None, True)
    if keep is not None:
        return writer.function(f"[{', '.join(keep)}]")
    outputs = [o if isinstance(o, str) else writer.constant("value", o.value) for o in program.outputs]
    updates = [name for _, name in program.updates]
    return writer.function(f"[{', '.join(outputs)}], [{', '.join(updates)}]")


def _again(writer: SourceWriter, start: StartMoves, moves: StartedMoves, program: LocalProgram) -> str:
    """How started moves are done again: those of parameters may be on their way before anybody waits for them."""
    parameters = {i.name for i in program.inputs if i.kind in ("parameter", "local")}
    is_ahead = all(move.source in parameters for move in start.moves)
    return writer.constant("again", Computation(moves.again, start=moves.start_again if is_ahead else None))


def _write_moved(writer: SourceWriter, move: Move, runner: DistributedMove) -> None:
    """Tells the recording of a move; one that is not repeated may have written over memory that it knows."""
    if move.recompute:
        again = writer.constant("again", Computation(runner.again, overwrites=runner.inplace))
        writer.line(f"_run.moved({again}, ({move.source},), ({move.output},))")
    elif runner.inplace:
        writer.line(f"_run.kept({move.output})")


def _write_keep_piece(writer: SourceWriter, instruction: KeepSliceForBackward, rank: int, groups: Groups) -> None:
    cut, gather = (DistributedMove(m, rank, groups, False, compact=True) for m in (instruction.cut, instruction.gather))
    again = writer.constant("again", Computation(gather.again))
    piece = writer.constant("cut", lambda values: [cut.run_forward(values[0])])
    writer.line(f"_run.keep_pieces({again}, {piece}, ({instruction.cut.source},))")


def _write_recorded_call(writer: SourceWriter, call: Call, program: LocalProgram, rank: int) -> None:
    computation, names = computation_of(call, program, rank)
    writer.line(f"_many = _run.call({', '.join([writer.constant('again', computation), *names])})")
    _write_many(writer, call)


def _write_many(writer: SourceWriter, call: Call) -> None:
    for position, name in enumerate(call.outputs):
        writer.line(f"{name} = _many[{position}]")
    writer.line("_many = None")


def _write_call(writer: SourceWriter, call: Call, rank: int) -> None:
    def per_rank(leaf: PerRank) -> str:
        return writer.literal(leaf.of(rank))

    text = writer.call(call.function, call.args, call.kwargs, lambda name: name, per_rank)
    if not call.sequence:
        writer.line(f"{call.outputs[0]} = {text}")
    else:
        writer.line(f"_many = {text}")
        _write_many(writer, call)


def _is_free(name: str, maker: Instruction | None) -> bool:
    """Whether a value is new memory that its maker and autograd do not keep."""
    if result_is_free(maker):
        return True
    return isinstance(maker, Call) and name in getattr(maker.function, "fresh", ())


class _InputCheck:
    """Checks the local shapes of the first call: a wrong one would leave the other ranks waiting."""

    def __init__(self, program: LocalProgram, rank: int):
        self.pending = True
        self.rank = rank
        self.expected = [(i, i.layout.local_shape(i.meta.shape, rank)) for i in program.inputs]

    def __call__(self, values: list[Any]) -> None:
        wrong = [
            f"{item.kind} {item.target!r} is {list(value.shape)}, expected {list(shape)}: {list(item.meta.shape)} laid "
            f"out as {item.layout.short()}"
            for (item, shape), value in zip(self.expected, values, strict=True)
            if tuple(value.shape) != shape
        ]
        if wrong:
            raise WorldError(f"rank {self.rank} was given tensors that are not its pieces: {'; '.join(wrong)}")
        self.pending = False
