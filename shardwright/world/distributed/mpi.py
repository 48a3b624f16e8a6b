"""MPI as the carrier of tensors: messages between members of a communicator, as a gloo process group has them.

MPI moves bytes only, so tensors of every dtype travel, and what adds them up is :mod:`.summation`, as on gloo.

Invariants:

- Nobody waits within MPI: requests are tested until they are done, so that the job's timeout holds, and so that a rank that
  has left is noticed.
- The memory of a request stays until it is done, even where an error has ended the operation that made it.
- MPI moves large tensors only while it is called, which a thread does as long as requests are under way. So a rank that
  computes, or waits for something else, keeps nobody waiting.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

from torch import Tensor

from shardwright.agreement.job_watch import last_event, who_left
from shardwright.base.torch_private import job_timeout
from shardwright.errors import WorldError

_TICK = 0.002  # seconds between two calls of MPI while requests are under way
_IDLE_TICKS = 100  # without requests, after which the thread waits to be woken
# Tests of a request before the thread that waits sleeps between them: where ranks share cores, others need this one.
_TESTS, _TESTS_OF_CROWD = 200, 20
_PAUSE, _LONGEST_PAUSE = 2e-5, 1e-3  # seconds
_LOOK = 0.5  # seconds of waiting between two looks whether the others are still there
_LARGEST_TAG = 1 << 30  # that a message has, but for it

# Lets another process have the core. Some systems have only the other name for it.
_yield: Callable[[], Any] = getattr(os, "sched_yield", lambda: time.sleep(0))


class MpiJob:
    """The ranks of an MPI job, as one of them uses it. All ranks make it, and its groups, in the same order.

    Args:
        rank: this rank in the job.
        size: the number of all ranks.

    Raises:
        WorldError: mpi4py or an MPI library is missing, or mpirun has not started these ranks.
    """

    def __init__(self, rank: int, size: int):
        self._mpi = _find_mpi(rank, size)
        self.rank = rank
        self._whole = self._mpi.COMM_WORLD.Dup()
        here = self._whole.Split_type(self._mpi.COMM_TYPE_SHARED)
        is_crowded = here.size > _cores()
        here.Free()
        self.works = _Works(lambda: self._whole.Iprobe(tag=_LARGEST_TAG), _TESTS_OF_CROWD if is_crowded else _TESTS)

    def group(self, ranks: Sequence[int]) -> MpiGroup | None:
        """Makes the group of some ranks, on these; ``None`` on others.

        Args:
            ranks: ascending.
        """
        if self.rank not in ranks:
            return None
        if len(ranks) == self._whole.size:
            return MpiGroup(self._mpi, self._whole, ranks, self.works)
        members = self._whole.Get_group().Incl(list(ranks))
        return MpiGroup(self._mpi, self._whole.Create_group(members), ranks, self.works)

    def close(self) -> None:
        """Ends the thread. Communicators stay until MPI ends: to free them, all ranks would have to be there."""
        self.works.close()

    def abort(self) -> None:
        """Ends the job on all ranks, at once: MPI's own end would wait for ranks that wait for this one."""
        self._mpi.COMM_WORLD.Abort(1)


class MpiGroup:
    """Members of one communicator. It sends and receives as a process group of torch does.

    Args:
        mpi: the module of mpi4py.
        communicator: of the members.
        ranks: their ranks in the job.
        works: those under way.
    """

    def __init__(self, mpi: Any, communicator: Any, ranks: Sequence[int], works: _Works):
        self.communicator, self.ranks, self.works = communicator, tuple(ranks), works
        self.patience = (job_timeout() or timedelta(minutes=30)).total_seconds()
        self._memory, self._byte = mpi.buffer.fromaddress, mpi.BYTE
        self._send, self._receive = communicator.Isend, communicator.Irecv
        self._others = [tuple(r for r in self.ranks if r == rank) for rank in self.ranks]

    def rank(self) -> int:
        """Returns this rank's number in the group."""
        return int(self.communicator.rank)

    def send(self, tensors: Sequence[Tensor], member: int, tag: int) -> MpiWork:
        """Starts to send a contiguous tensor to a member."""
        (tensor,) = tensors
        return MpiWork(self, self._send((self.memory(tensor), self._byte), member, tag), tensor, self._others[member])

    def recv(self, tensors: Sequence[Tensor], member: int, tag: int) -> MpiWork:
        """Starts to receive into a contiguous tensor from a member. Messages of one tag arrive in order."""
        (tensor,) = tensors
        return MpiWork(self, self._receive((self.memory(tensor), self._byte), member, tag), tensor, self._others[member])

    def gather(self, out: Tensor, piece: Tensor, counts: Sequence[int] | None = None, memory: Any = None) -> MpiWork:
        """Starts MPI's all-gather of contiguous tensors.

        Args:
            out: receives all members' pieces, one after the other.
            piece: this member's.
            counts: bytes of each piece, where they differ.
            memory: of ``out``, if it is known.
        """
        own, into = (self.memory(piece), self._byte), memory or self.memory(out)
        if counts is None:
            request = self.communicator.Iallgather(own, (into, self._byte))
        else:
            request = self.communicator.Iallgatherv(own, (into, counts, self._byte))
        return MpiWork(self, request, (out, piece), self.ranks)

    def exchange(
        self, out: Tensor, packed: Tensor, received: Sequence[int], sent: Sequence[int], memory: Any = None
    ) -> MpiWork:
        """Starts MPI's all-to-all of contiguous tensors.

        Args:
            out: receives what members send, one after the other.
            packed: what each member is sent, one after the other.
            received, sent: bytes from and to each member.
            memory: of ``out``, if it is known.
        """
        own, into = (self.memory(packed), sent, self._byte), memory or self.memory(out)
        return MpiWork(self, self.communicator.Ialltoallv(own, (into, received, self._byte)), (out, packed), self.ranks)

    def memory(self, tensor: Tensor) -> Any:
        """Returns the memory of a tensor as MPI takes it.

        Raises:
            WorldError: a tensor on a GPU.
        """
        assert tensor.is_contiguous()
        if not tensor.is_cpu:
            raise WorldError(f"MPI moves tensors on the CPU, this one is on {tensor.device}: use sw.init(backend='nccl')")
        return self._memory(tensor.data_ptr(), tensor.nbytes)


class MpiWork:
    """Request under way, with the memory that it reads or writes.

    Args:
        group: the members.
        request: MPI's.
        memory: kept until the request is done.
        ranks: those without which it cannot end.
    """

    __slots__ = ("_group", "_memory", "_ranks", "_request")

    def __init__(self, group: MpiGroup, request: Any, memory: Any, ranks: tuple[int, ...]):
        self._group, self._request, self._memory, self._ranks = group, request, memory, ranks
        group.works.add(self)

    def wait(self) -> None:
        """Waits until the request is done.

        Raises:
            WorldError: a rank has left, or did not do its part within the job's timeout.
        """
        test = self._request.Test
        for _ in range(self._group.works.tests):
            if test():
                break
            _yield()
        else:
            self._wait_long(test)
        self._group.works.discard(self)

    def _wait_long(self, test: Callable[[], bool]) -> None:
        began, pause, looked = time.monotonic(), _PAUSE, 0.0
        while not test():
            time.sleep(pause)
            pause = min(pause * 1.2, _LONGEST_PAUSE)
            waited = time.monotonic() - began
            if waited - looked > _LOOK:
                looked = waited
                own = self._group.ranks[self._group.rank()]
                others = [rank for rank in self._ranks if rank != own]
                if (said := who_left(others)) and not test():
                    raise WorldError(said)
                if waited > self._group.patience:
                    named = ", ".join(map(str, others[:8]))
                    raise WorldError(
                        f"rank {own} has waited {waited:.0f} s for rank {named}, in {last_event()}: make the same calls on "
                        "every rank; for more patience, sw.init(timeout=...)"
                    )


class _Works:
    """Requests under way, and the thread that lets MPI get on with them.

    Args:
        progress: calls MPI once.
        tests: of a request before the thread that waits sleeps.
    """

    def __init__(self, progress: Callable[[], Any], tests: int):
        self.tests = tests
        self._under_way: set[MpiWork] = set()
        self.discard = self._under_way.discard
        self._progress = progress
        self._wake, self._is_idle, self._is_closed = threading.Event(), True, False
        self._thread = threading.Thread(target=self._run, name="shardwright-mpi", daemon=True)
        self._thread.start()

    def add(self, work: MpiWork) -> None:
        self._under_way.add(work)
        if self._is_idle:
            self._wake.set()

    def close(self) -> None:
        self._is_closed = True
        self._wake.set()
        self._thread.join(timeout=2)

    def _run(self) -> None:
        ticks = 0
        while not self._is_closed:
            if self._under_way:
                self._progress()
                ticks = 0
            elif ticks > _IDLE_TICKS:
                self._is_idle = True
                if not self._under_way:  # none since the last look
                    self._wake.wait()
                self._wake.clear()
                self._is_idle, ticks = False, 0
            ticks += 1
            time.sleep(_TICK)


def _cores() -> int:
    """Counts the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _find_mpi(rank: int, size: int) -> Any:
    """Returns mpi4py's module, which starts MPI, once it is known to serve the ranks of the job."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise WorldError(
            f"init(backend='mpi') needs mpi4py and an MPI library: pip install 'shardwright[mpi]' ({error})"
        ) from error
    here = MPI.COMM_WORLD
    if (here.rank, here.size) != (rank, size):
        raise WorldError(
            f"init(backend='mpi'): this is rank {rank} of a job of {size}, and rank {here.rank} of {here.size} to MPI: start "
            f"it with mpirun -n {size} python train.py, of the MPI that mpi4py uses"
        )
    if MPI.Query_thread() != MPI.THREAD_MULTIPLE:
        raise WorldError(
            "init(backend='mpi'): MPI was started for one thread and several call it: import mpi4py without changing "
            "mpi4py.rc.thread_level, with an MPI that has MPI_THREAD_MULTIPLE"
        )
    largest: Iterable[int] | int | None = here.Get_attr(MPI.TAG_UB)
    if isinstance(largest, int) and largest < _LARGEST_TAG:
        raise WorldError(f"init(backend='mpi'): this MPI has tags up to {largest}, and messages need up to {_LARGEST_TAG}")
    return MPI
