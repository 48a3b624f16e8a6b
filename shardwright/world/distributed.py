"""The distributed world: this process is one rank of a real job, and collectives run through ``torch.distributed``.

:meth:`DistributedWorld.bind` turns a local program into one Python function of this rank's tensors, with everything
that depends on the rank worked out beforehand. It works on plain local tensors: no dispatch per operator.

Invariants:

- Every rank binds the same programs in the same order (binding makes process groups), and calls them in the same order.
- A bound function leaves its arguments as they are.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwright.capture.torch_private import set_group_timeout
from shardwright.errors import WorldError
from shardwright.layout import Layout
from shardwright.partition.free_results import (
    result_is_free,
    values_read_once,
    values_with_free_gradients,
)
from shardwright.partition.program import Call, Instruction, KeepPiece, LocalProgram, Move, Start, Together
from shardwright.redistribute.step import Step
from shardwright.redistribute.steps import Redistribution, redistribution
from shardwright.rules.lowering import PerRank
from shardwright.world.agreement import Agreement
from shardwright.world.collectives import backend_of
from shardwright.world.distributed_moves import DistributedMove, MovesTogether, PieceMove
from shardwright.world.distributed_starts import StartedMoves
from shardwright.world.distributed_steps import Groups
from shardwright.world.pieces import check_differentiable, check_layouts, check_piece
from shardwright.world.recipes import Computation
from shardwright.world.recording import computation_of, needs_recording, recorded
from shardwright.world.source import SourceWriter, write_note
from shardwright.world.watcher import Watch

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class DistributedWorld:
    """This process as one rank of the initialised ``torch.distributed`` job.

    Args:
        device: where this rank's tensors are; default: the current CUDA device under NCCL, else the CPU.

    Raises:
        WorldError: ``torch.distributed`` is not initialised.
    """

    is_simulated = False

    def __init__(self, device: torch.device | str | None = None):
        if not (dist.is_available() and dist.is_initialized()):
            raise WorldError(
                "torch.distributed is not initialised in this process: use DistributedWorld.from_environment() under "
                "torchrun, or call torch.distributed.init_process_group() first"
            )
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.device = torch.device(device) if device is not None else _default_device()
        self._groups = Groups(self.rank, self.size, self.device.type)
        self._owns_job = False
        self._moves: dict[Any, PieceMove] = {}
        self._agreement: Agreement | None = None
        self.watch: Watch | None = None
        atexit.register(self._close_at_exit)

    @classmethod
    def from_environment(cls, backend: str | None = None, timeout: timedelta | None = None) -> DistributedWorld:
        """The world that the launcher's environment variables describe, or the one that is initialised already.

        Args:
            backend: a ``torch.distributed`` backend; default NCCL where every rank of this host has a GPU, else gloo.
            timeout: how long a collective may wait for the other ranks; default: torch's, or that of the job as it is.

        Raises:
            WorldError: a variable is missing or makes no sense, or the backend does not fit this host.
        """
        if not dist.is_available():
            raise WorldError("this build of PyTorch has no torch.distributed: sw.init(devices=8) simulates 8 ranks")
        if dist.is_initialized():
            if timeout is not None:
                set_group_timeout(timeout)
            return cls()
        rank, size, local_rank, local_size = read_environment(os.environ)
        backend = backend or ("nccl" if _has_gpus_for(local_rank, local_size) else "gloo")
        device = torch.device("cpu")
        if "nccl" in backend:
            if local_rank >= torch.cuda.device_count():
                raise WorldError(
                    f"LOCAL_RANK is {local_rank}, but this host has {torch.cuda.device_count()} CUDA devices: start at "
                    "most one rank a device, or use backend='gloo'"
                )
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        try:
            dist.init_process_group(backend, timeout=timeout, device_id=device if device.type == "cuda" else None)
        except (RuntimeError, ValueError) as error:
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise WorldError(
                f"rank {rank} could not join the job of {size} ranks at {address} with backend {backend!r}: {error}"
            ) from error
        world = cls(device)
        world._owns_job = True
        return world

    def __repr__(self) -> str:
        return f"DistributedWorld(rank={self.rank}, size={self.size}, device={str(self.device)!r})"

    def once(self, make: Callable[[], Any]) -> Any:
        """What a function makes on rank 0, on every rank, or what it raises: where ranks must not differ, as by the clock."""
        found: list[Any] = [None]
        if self.rank == 0:
            try:
                found = [(make(), None)]
            except Exception as error:
                found = [(None, error)]
        dist.broadcast_object_list(found, 0)
        value, failure = found[0]
        if failure is not None:
            raise failure
        return value

    def gather_numbers(self, numbers: Sequence[int]) -> list[list[int]]:
        """Every rank's numbers, by rank. All ranks of the job call it."""
        if self._agreement is None:
            self._agreement = Agreement(self.size)
        return self._agreement(numbers)

    def bind(self, program: LocalProgram, keep: tuple[str, ...] | None = None) -> Callable[..., Any]:
        """The program as a function of its inputs, given as this rank's local tensors. All ranks must call it.

        Args:
            keep: names of local values to return, as this rank holds them, in place of the outputs.

        Returns:
            A function to ``(outputs, updated buffers)``, whole on every rank.

        Raises:
            WorldError: the program is for another number of ranks; or, when the function is first called, an input
                does not have the shape of this rank's piece.
        """
        if program.world_size != self.size:
            raise WorldError(
                f"the program is for {program.world_size} ranks, this job has {self.size}: start it with "
                f"--nproc-per-node {program.world_size}, or make its layouts over {self.size} ranks"
            )
        self._groups.make(_steps_of(program))
        plain = _bind(program, self.rank, self._groups, keep)
        if keep is not None or not needs_recording(program):
            return plain
        return recorded(_bind(program, self.rank, self._groups, None, records=True), plain)

    def redistribute(
        self,
        value: Tensor | None,
        source: Layout,
        target: Layout,
        shape: Sequence[int],
        partial_gradient: Sequence[str] = (),
        dtype: torch.dtype | None = None,
    ) -> Tensor | None:
        """Moves a tensor from one layout to another, over the same ranks or others. All ranks of the job call it.

        Differentiable where both layouts have the same ranks; otherwise move the gradient back by a call of its own, from
        ``target`` to ``source``.

        Args:
            value: this rank's piece of ``source``; ``None`` on ranks that are not in it.
            shape: global shape.
            partial_gradient: axes of the target over which the gradients that come back are parts of a sum.
            dtype: dtype of the tensor; needed on ranks that hand in nothing.

        Returns:
            This rank's piece of ``target``, ``None`` on ranks that are not in it; where nothing has to move, ``value``
            itself or a view of it.

        Raises:
            StrategyError: layouts beyond the job's ranks, a target with a reduction pending that the source does not have.
            WorldError: a piece that is missing or has another shape; a gradient wanted through a pending maximum.
        """
        key = (source, target, tuple(shape), tuple(partial_gradient))
        move = self._moves.get(key)
        if value is not None and value.requires_grad:
            check_differentiable(source, target)
        if move is None:
            check_layouts(source, target, partial_gradient, self.size)
            plan = redistribution(*key)
            self._groups.make((*plan.forward, *plan.backward))
            move = self._moves[key] = PieceMove(plan, self.rank, self._groups)
        if value is None or value.shape != move.given:
            check_piece(self.rank, value, source, tuple(shape))
            if move.wants and dtype is None:
                raise WorldError(f"rank {self.rank} hands in nothing and is to receive: give the tensor's dtype=")
        return move(value, dtype, self.device)

    def prepared(self, key: Any, plan: Callable[[], Redistribution], cause: str) -> PieceMove:
        """Steps that are given, ready to run on this rank's tensor, and remembered by ``key``. All ranks of the job call it.

        Args:
            cause: what the record of communication says they are for.
        """
        if key not in self._moves:
            made = plan()
            self._groups.make((*made.forward, *made.backward))
            self._moves[key] = PieceMove(made, self.rank, self._groups, cause)
        return self._moves[key]

    def close(self) -> None:
        """Ends this world's process groups, and the job if :meth:`from_environment` started it. Twice does no harm."""
        atexit.unregister(self._close_at_exit)
        self._end()

    def _end(self) -> None:
        if self.watch is not None:
            error = getattr(sys, "last_value", None)
            self.watch.close("" if error is None else f", by {type(error).__name__}: {str(error)[:300]}")
        initialised = dist.is_initialized()
        if initialised and not self._groups.closed:
            _let_threads_finish()
        self._groups.close(destroy=initialised and not self._owns_job)
        if initialised and self._owns_job:
            dist.destroy_process_group()
        self._owns_job = False

    def _close_at_exit(self) -> None:
        """Closes; after an uncaught exception it waits 5 s at most, for other ranks may be waiting for this one."""
        if getattr(sys, "last_value", None) is None:
            self._end()
            return
        worker = threading.Thread(target=self._end, daemon=True)
        try:
            worker.start()
        except RuntimeError:  # the interpreter starts no threads any more
            return
        worker.join(timeout=5)


def read_environment(variables: Mapping[str, str]) -> tuple[int, int, int, int]:
    """Rank, number of ranks, rank on this host and number of ranks on it, out of a launcher's variables.

    Without ``LOCAL_RANK`` ranks are taken to go round the devices of each host.

    >>> job = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    >>> read_environment({**job, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
    (3, 4, 1, 2)
    """
    missing = [name for name in _VARIABLES if not variables.get(name)]
    if missing:
        raise WorldError(
            f"no job to join: the environment lacks {', '.join(missing)}. Start the script with 'torchrun "
            "--nproc-per-node 2 script.py', or simulate ranks in this process with sw.init(devices=2)"
        )
    number: dict[str, int] = {}
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        text = variables.get(name)
        if text:
            try:
                number[name] = int(text)
            except ValueError:
                raise WorldError(f"the environment variable {name} is {text!r}: it must be a whole number") from None
    rank, size = number["RANK"], number["WORLD_SIZE"]
    if not 0 <= rank < size:
        raise WorldError(f"RANK is {rank} and WORLD_SIZE {size}: ranks must go from 0 to WORLD_SIZE - 1")
    local_rank = number.get("LOCAL_RANK", rank % max(1, torch.cuda.device_count()))
    return rank, size, local_rank, number.get("LOCAL_WORLD_SIZE", local_rank + 1)


def _has_gpus_for(local_rank: int, local_size: int) -> bool:
    if not (torch.cuda.is_available() and dist.is_nccl_available()):
        return False
    return torch.cuda.device_count() >= max(local_size, local_rank + 1)


def _let_threads_finish() -> None:
    """Gives gloo's threads a moment to let go of the last collective's tensors, for which they need the interpreter.

    Before Python 3.14 a thread that asks for the interpreter while it ends aborts the process ("terminate called without
    an active exception"), and groups that others hold, such as a DeviceMesh, run on until then.
    """
    if "gloo" in str(dist.get_backend_config(dist.group.WORLD)):
        time.sleep(0.1)


def _default_device() -> torch.device:
    if torch.cuda.is_available() and backend_of(dist.group.WORLD, "cuda") == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _steps_of(program: LocalProgram) -> list[Step]:
    """Every step of every move, forward and backward."""
    moves = [*program.moves, *(i.gather for i in program.instructions if isinstance(i, KeepPiece))]
    return [s for m in moves for s in (*m.redistribution.forward, *m.redistribution.backward)]


# -- binding -----------------------------------------------------------------------------------------------------------


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
        if isinstance(instruction, KeepPiece):
            if records:
                _write_keep_piece(writer, instruction, rank, groups)
            writer.forget([name for name in dead if name not in (keep or ())])
            continue
        first = instruction.moves[0] if isinstance(instruction, (Start, Together)) else instruction
        writer.context(first.autocast, first.grad)
        if isinstance(instruction, Start):
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
        elif isinstance(instruction, Together):
            together = MovesTogether(instruction.moves, rank, groups)
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


def _again(writer: SourceWriter, start: Start, moves: StartedMoves, program: LocalProgram) -> str:
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


def _write_keep_piece(writer: SourceWriter, instruction: KeepPiece, rank: int, groups: Groups) -> None:
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
