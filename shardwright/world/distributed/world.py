"""Distributed world: this process is one rank of a real job, with collectives over ``torch.distributed``.

:meth:`DistributedWorld.bind` turns a local program into one Python function of this rank's tensors, with everything
that depends on the rank computed beforehand. It works on plain local tensors: no dispatch per operator.

Invariants:

- Every rank binds the same programs in the same order (binding makes process groups), and calls them in the same order.
- A bound function leaves its arguments as they are.
"""

from __future__ import annotations

import atexit
import contextlib
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwright.agreement.job_watch import compare_on_ranks
from shardwright.agreement.numbers import Agreement
from shardwright.agreement.random_state import agree_on_random_state
from shardwright.agreement.watch import Watch
from shardwright.base.torch_private import set_group_timeout
from shardwright.errors import WorldError
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.ir.program import LocalProgram
from shardwright.ir.redistribution import Redistribution
from shardwright.parameters.distribute import adopt_slices, distribute_parameters
from shardwright.redistribute.steps import redistribution
from shardwright.world.distributed.bind import _bind, _steps_of
from shardwright.world.distributed.groups import Groups
from shardwright.world.distributed.join import check_backend, default_device, join_job
from shardwright.world.distributed.moves import PieceMove
from shardwright.world.distributed.mpi import MpiJob
from shardwright.world.execute.checks import check_differentiable, check_layouts, check_piece
from shardwright.world.execute.recording import needs_recording, recorded
from shardwright.world.world import Described, World

# Seconds that a rank of an MPI job which ends by an error leaves the others to notice and say so; then it ends them.
_GRACE = 3.0


class DistributedWorld(World):
    """One rank, the process itself, of the initialised ``torch.distributed`` job.

    Args:
        device: where this rank's tensors are; default: the current CUDA device under NCCL, else the CPU.
        by_mpi: whether MPI moves tensors.

    Raises:
        WorldError: ``torch.distributed`` is not initialised, or MPI does not serve its ranks.
    """

    is_simulated = False
    keeps_pieces = True
    inputs_are_whole = False
    runs_rank_groups = False

    def __init__(self, device: torch.device | str | None = None, by_mpi: bool = False):
        if not (dist.is_available() and dist.is_initialized()):
            raise WorldError(
                "torch.distributed is not initialised in this process: use DistributedWorld.from_environment() under "
                "torchrun, or call torch.distributed.init_process_group() first"
            )
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.device = torch.device(device) if device is not None else default_device()
        mpi = MpiJob(self.rank, self.size) if by_mpi else None
        self._groups = Groups(self.rank, self.size, self.device.type, mpi=mpi)
        self._owns_job = False
        self._moves: dict[Any, PieceMove] = {}
        self._agreement: Agreement | None = None
        self.watch: Watch | None = None
        self.check_weights: int | None = None  # calls of nets, after which ranks compare all weights that they hold whole
        atexit.register(self._close_at_exit)

    @classmethod
    def from_environment(cls, backend: str | None = None, timeout: timedelta | None = None) -> DistributedWorld:
        """Joins the job that the launcher's environment variables describe, unless one is initialised already.

        Args:
            backend: a ``torch.distributed`` backend, or ``"mpi"``, which moves tensors by MPI beside gloo; default NCCL where
                every rank of this host has a GPU, else gloo.
            timeout: how long a collective may wait for the other ranks; default: torch's, or that of the job as it is.

        Raises:
            WorldError: a variable is missing or makes no sense, or the backend does not fit this host.
        """
        if not dist.is_available():
            raise WorldError("this build of PyTorch has no torch.distributed: sw.init(devices=8) simulates 8 ranks")
        torch_backend = "gloo" if backend == "mpi" else backend  # gloo for what ranks agree on
        if dist.is_initialized():
            check_backend(torch_backend)
            if timeout is not None:
                set_group_timeout(timeout)
            return cls("cpu" if backend == "mpi" else None, backend == "mpi")
        device = join_job(torch_backend, timeout)
        try:
            world = cls(device, backend == "mpi")
        except WorldError:
            dist.destroy_process_group()
            raise
        world._owns_job = True
        return world

    def __repr__(self) -> str:
        return f"DistributedWorld(rank={self.rank}, size={self.size}, device={str(self.device)!r})"

    @property
    def processes(self) -> int:
        return self.size

    def rank_or_raise(self, otherwise: Callable[[], Exception]) -> int:
        return self.rank

    def device_of(self, root: nn.Module) -> torch.device:
        """Returns the device of this rank. The devices of the module's parameters do not matter."""
        return self.device

    def adds_wide(self, device: torch.device) -> bool:
        """Tells whether the backend adds in float32: gloo's and MPI's collectives are ours, NCCL's round at each step."""
        return device.type == "cpu"

    def on_first_rank(self, make: Callable[[], Any]) -> Any:
        """Calls ``make`` on rank 0; returns its result, or raises its error, on every rank.

        It serves values that must not differ between ranks and otherwise would, as by the clock. All ranks of the job call it.
        """
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

    def compare(self, stage: str, describe: Callable[[], Described]) -> None:
        """Refuses, on all ranks, what differs between them; see :meth:`Watch.compare`."""
        if self.size > 1:
            compare_on_ranks(self, stage, *describe())

    def agree_on_random_state(self) -> None:
        """Gives every rank the state of rank 0's default generator."""
        agree_on_random_state(self.device)

    def gather_numbers(self, numbers: Sequence[int]) -> list[list[int]]:
        """Gathers every rank's numbers, by rank. All ranks of the job call it."""
        if self._agreement is None:
            self._agreement = Agreement(self.size)
        return self._agreement(numbers)

    def place_parameters(
        self,
        root: nn.Module,
        layouts: Mapping[str, Layout],
        device: torch.device,
        slices: Mapping[str, tuple[Layout, tuple[int, ...]]] | None = None,
    ) -> dict[str, Layout]:
        """Replaces every parameter of a module by a DTensor of this rank's piece.

        Args:
            root, layouts, device, slices: see :meth:`World.place_parameters`.
        """
        if slices is not None:
            adopt_slices(root, slices, device)
        return distribute_parameters(root, layouts, device)

    def gather(self, piece: Tensor, source: Layout, shape: Sequence[int], target: Layout | None = None) -> Tensor:
        """Joins all ranks' pieces of ``source`` to this rank's of ``target``, or to the whole.

        Args:
            piece, source, shape, target: see :meth:`World.gather`.
        """
        target = Layout.replicated(source.mesh, source.ndim) if target is None else target
        found = self.redistribute(piece, source, target, shape)
        assert found is not None  # every rank is in the mesh of a dataset strategy
        return found

    def bind(self, program: LocalProgram, keep: tuple[str, ...] | None = None) -> Callable[..., Any]:
        """Makes a function of a program, on this rank's local tensors. All ranks must call it.

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

    def bind_on_ranks(
        self, program: LocalProgram, ranks: Sequence[int], keep: tuple[str, ...] | None = None
    ) -> Callable[..., Any] | None:
        """Makes a function of a program that only some ranks run. All ranks of the job call it.

        Args:
            program: of these ranks, by their numbers in the job.
            ranks: those that run it; others get ``None``.
            keep: see :meth:`bind`.
        """
        self._groups.make(_steps_of(program))
        if self.rank not in ranks:
            return None
        plain = _bind(program, self.rank, self._groups, keep)
        if keep is not None or not needs_recording(program):
            return plain
        return recorded(_bind(program, self.rank, self._groups, None, records=True), plain)

    def direct_link(self) -> Any | None:
        """Returns the link over all ranks of the job, for direct messages. All ranks call it.

        Raises:
            WorldError: the backend is NCCL.
        """
        if not self._groups.by_messages:
            raise WorldError("pipelines run on gloo and MPI: messages between two ranks need tags, which NCCL does not have")
        whole = Mesh(("all",), (self.size,))
        rows, columns = (Layout.of(whole, dims) for dims in ((("all",), ()), ((), ("all",))))
        self._groups.make(redistribution(rows, columns, (self.size, self.size)).forward)
        return self._groups.link(range(self.size))

    def redistribute(
        self,
        value: Tensor | None,
        source: Layout,
        target: Layout,
        shape: Sequence[int],
        partial_gradient: Sequence[str] = (),
        dtype: torch.dtype | None = None,
    ) -> Tensor | None:
        """Moves a tensor between layouts over the same ranks or others. All ranks of the job call it.

        Differentiable where both layouts have the same ranks; otherwise move the gradient back by another call, from ``target``
        to
        ``source``.

        Args:
            value: this rank's piece of ``source``; ``None`` on ranks that are not in it.
            source, target: the layouts.
            shape: global shape.
            partial_gradient: axes of the target over which the gradients that come back are parts of a sum.
            dtype: dtype of the tensor; needed on ranks that give no piece.

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
        """Prepares steps to run on this rank's tensor, and caches them by ``key``. All ranks of the job call it.

        Args:
            cause: what the record of communication says they are for.
        """
        if key not in self._moves:
            made = plan()
            self._groups.make((*made.forward, *made.backward))
            self._moves[key] = PieceMove(made, self.rank, self._groups, cause)
        return self._moves[key]

    def close(self) -> None:
        """Ends this world's process groups, and the job if :meth:`from_environment` started it. May be called twice."""
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
        """Closes the world; after an uncaught exception waits at most 5 s, as other ranks may wait for this one."""
        if getattr(sys, "last_value", None) is None:
            self._end()
            return
        worker = threading.Thread(target=self._end, daemon=True)
        try:
            worker.start()
        except RuntimeError:  # the interpreter starts no threads any more
            return
        worker.join(timeout=5)
        if self._groups.mpi is not None:
            time.sleep(_GRACE)
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            self._groups.mpi.abort()


def _let_threads_finish() -> None:
    """Gives gloo's threads a moment to release tensors, for which they need the interpreter.

    Before Python 3.14 a thread that asks for the interpreter while it ends aborts the process ("terminate called without
    an active exception"), and groups that others hold, such as a DeviceMesh, run on until then.
    """
    if "gloo" in str(dist.get_backend_config(dist.group.WORLD)):
        time.sleep(0.1)
