"""Binds a local program to a process of a job, as one generated function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from shardwright.base.operators import AS_NO_VIEW
from shardwright.errors import WorldError
from shardwright.ir.instructions import Call, FusedMoves, Instruction, KeepSliceForBackward, Move, PerRank, StartMoves, is_call
from shardwright.ir.program import LocalProgram
from shardwright.ir.step import Step
from shardwright.ir.visitor import InstructionVisitor
from shardwright.partition.free_results import result_is_free, values_read_once, values_with_free_gradients
from shardwright.world.distributed.groups import Groups
from shardwright.world.distributed.moves import DistributedFusedMoves, DistributedMove
from shardwright.world.distributed.starts import StartedMoves
from shardwright.world.execute.recipes import Computation
from shardwright.world.execute.recording import computation_of
from shardwright.world.execute.source import SourceWriter, write_note


def _steps_of(program: LocalProgram) -> list[Step]:
    """Collects every step of every move, forward and backward."""
    moves = [*program.moves, *(keep.gather for keep in program.kept_slices)]
    return [s for m in moves for s in (*m.redistribution.forward, *m.redistribution.backward)]


def _bind(
    program: LocalProgram, rank: int, groups: Groups, keep: tuple[str, ...] | None, records: bool = False
) -> Callable[..., Any]:
    """Generates the function of a program.

    Args:
        program: the program.
        rank: the rank it runs on.
        groups: the process groups.
        keep: local values to return in place of the outputs.
        records: whether the first argument of the function is a recording, which learns what is computed again.
    """
    names = [i.name for i in program.inputs]
    writer = SourceWriter("distributed", ["_run", *names] if records else names)
    check = writer.constant("check", _InputCheck(program, rank))
    writer.line(f"if {check}.pending: {check}([{', '.join(names)}])")
    binder = _Binder(writer, program, rank, groups, frozenset(keep or ()), records)
    for instruction, dead in zip(program.instructions, program.last_uses(), strict=True):
        binder.dead = dead
        binder.visit(instruction)
        writer.forget([name for name in dead if name not in (keep or ())])
    writer.context(None, True)
    if keep is not None:
        return writer.function(f"[{', '.join(keep)}]")
    outputs = [
        _output(writer, o, program) if isinstance(o, str) else writer.constant("value", o.value) for o in program.outputs
    ]
    updates = [name for _, name in program.updates]
    return writer.function(f"[{', '.join(outputs)}], [{', '.join(updates)}]")


def _output(writer: SourceWriter, name: str, program: LocalProgram) -> str:
    """Writes the value of an output. Callers may change it in place, if no one else has it."""
    move = next((move for move in program.moves if move.output == name), None)
    is_returned_once = [*program.outputs, *(value for _, value in program.updates)].count(name) == 1
    if move is None or not move.communicates or not is_returned_once or any(name in i.reads for i in program.instructions):
        return name
    # what an autograd function returns is often a view, which autograd would not let them change
    return f"{writer.constant('own', _as_own)}({name})"


def _as_own(value: Tensor) -> Tensor:
    """Returns a tensor with the same memory that is no view, as far as autograd knows."""
    return AS_NO_VIEW(value, value.shape) if value.requires_grad and value._is_view() else value  # type: ignore[no-any-return]


class _Binder(InstructionVisitor[None]):
    """Writes the lines of each instruction, as one rank runs it.

    Args:
        keep: local values that are returned, so that nothing may write over them.
        records: whether the function is given a recording, ``_run``.

    Attributes:
        dead: values that nothing reads after the instruction that is written.
    """

    def __init__(
        self, writer: SourceWriter, program: LocalProgram, rank: int, groups: Groups, keep: frozenset[str], records: bool
    ):
        self.writer, self.program, self.rank, self.groups, self.records = writer, program, rank, groups, records
        self.dead: Sequence[str] = ()
        self.only_read_once = values_read_once(program) - keep
        self.free_gradients = values_with_free_gradients(program)
        self.made_by = {o: i for i in program.instructions for o in i.outputs}
        self.started: dict[str, tuple[str, int]] = {}  # output of a started move -> the moves under way, and its index
        self.left: dict[str, int] = {}

    # -- calls ------------------------------------------------------------------------------------------------------------

    def call(self, call: Call) -> None:
        self.writer.context(call.autocast, call.grad)
        if self.records and call.recompute:
            self._recorded_call(call)
        else:
            _write_call(self.writer, call, self.rank)
            write_note(self.writer, call, self.program)

    def _recorded_call(self, call: Call) -> None:
        computation, names = computation_of(call, self.program, self.rank)
        again = self.writer.constant("again", computation)
        self.writer.line(f"_many = _run.call({', '.join([again, *names])})")
        _write_many(self.writer, call)

    # -- moves ------------------------------------------------------------------------------------------------------------

    def move(self, move: Move) -> None:
        self.writer.context(move.autocast, move.grad)
        if move.started:
            self._end(move)
            return
        runner = self._runner(move)
        name = self.writer.constant("move", runner if move.needs_grad else runner.without_gradient)
        self.writer.line(f"{move.output} = {name}({move.source})")
        if self.records and move.recompute:
            again = self.writer.constant("again", Computation(runner.recompute, overwrites=runner.inplace))
            self.writer.line(f"_run.moved({again}, ({move.source},), ({move.output},))")
        elif self.records and runner.inplace:  # it may have written over memory that the recording knows
            self.writer.line(f"_run.kept({move.output})")

    def _runner(self, move: Move) -> DistributedMove:
        maker = self.made_by.get(move.source)
        inplace = move.source in self.only_read_once and _is_free(move.source, maker)
        if move.recompute and not (maker is not None and is_call(maker) and maker.recompute):
            inplace = False  # its source must stay unchanged for the second move
        compact = maker is not None and move.source in self.dead
        return DistributedMove(move, self.rank, self.groups, inplace, compact, move.output in self.free_gradients)

    def _end(self, move: Move) -> None:
        under_way, index = self.started[move.output]
        self.writer.line(f"{move.output} = {under_way}.end({index})")
        if self.records and move.recompute:
            self.writer.line(f"_run.made({under_way}_again, {index}, {move.output})")
        self.left[under_way] -= 1
        if not self.left[under_way]:
            self.writer.line(f"{under_way} = {under_way}_again = None")

    def start_moves(self, start: StartMoves) -> None:
        first = start.moves[0]
        self.writer.context(first.autocast, first.grad)
        compact = any(source in self.made_by for source in start.reads)
        runner = StartedMoves(start.moves, self.rank, self.groups, compact, first.output in self.free_gradients)
        name = self.writer.constant("start", runner)
        under_way, sources = f"_{first.output}_started", ", ".join(start.reads)
        self.writer.line(f"{under_way} = {name}({sources})")
        if self.records and first.recompute:
            self.writer.line(f"{under_way}_again = _run.begin({self._started_computation(start, runner)}, ({sources},))")
        self.started |= {move.output: (under_way, index) for index, move in enumerate(start.moves)}
        self.left[under_way] = len(start.moves)

    def _started_computation(self, start: StartMoves, runner: StartedMoves) -> str:
        """Writes how started moves are repeated: those of parameters may be on their way before anybody waits."""
        parameters = {i.name for i in self.program.inputs if i.kind in ("parameter", "local")}
        ahead = runner.start_recompute if parameters.issuperset(start.reads) else None
        return self.writer.constant("again", Computation(runner.recompute, start=ahead))

    def fused_moves(self, fused: FusedMoves) -> None:
        self.writer.context(fused.moves[0].autocast, fused.moves[0].grad)
        runner = DistributedFusedMoves(fused.moves, self.rank, self.groups)
        name = self.writer.constant("together", runner)
        sources, outputs = ", ".join(fused.reads), ", ".join(fused.outputs)
        self.writer.line(f"{outputs}, = {name}({sources})")
        if self.records and fused.recompute:
            again = self.writer.constant("again", Computation(runner.recompute))
            self.writer.line(f"_run.moved({again}, ({sources},), ({outputs},))")

    def keep_slice(self, keep: KeepSliceForBackward) -> None:
        if not self.records:
            return
        cut, gather = (DistributedMove(m, self.rank, self.groups, False, compact=True) for m in (keep.cut, keep.gather))
        again = self.writer.constant("again", Computation(gather.recompute))
        piece = self.writer.constant("cut", lambda values: [cut.run_forward(values[0])])
        self.writer.line(f"_run.keep_pieces({again}, {piece}, ({keep.cut.source},))")


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
    """Tells whether a value is new memory that its maker and autograd do not keep."""
    if result_is_free(maker):
        return True
    return isinstance(maker, Call) and name in getattr(maker.function, "fresh", ())


class _InputCheck:
    """Checks the local shapes of the first call: a wrong one would leave the other ranks waiting."""

    def __init__(self, program: LocalProgram, rank: int):
        self.pending = True
        self.rank = rank
        given = [(at, i) for at, i in enumerate(program.inputs) if i.kind != "local"]  # other programs make those
        self.expected = [(at, i, i.layout.local_shape(i.meta.shape, rank)) for at, i in given]

    def __call__(self, values: list[Any]) -> None:
        wrong = [
            f"{item.kind} {item.target!r} is {list(values[at].shape)}, expected {list(shape)}: {list(item.meta.shape)} laid "
            f"out as {item.layout.short()}"
            for at, item, shape in self.expected
            if tuple(values[at].shape) != shape
        ]
        if wrong:
            raise WorldError(f"rank {self.rank} was given tensors that are not its pieces: {'; '.join(wrong)}")
        self.pending = False
