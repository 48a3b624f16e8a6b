"""Process groups of a mesh, made once, and the links over them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist

from shardwright.base.process_groups import backend_of
from shardwright.base.torch_private import job_timeout
from shardwright.cost.algorithms import MPI, Calibration, load
from shardwright.errors import WorldError
from shardwright.ir.largest_piece import Shape
from shardwright.ir.step import TRANSFERS, Step
from shardwright.world.distributed.links import Link
from shardwright.world.distributed.messages import Scratch
from shardwright.world.distributed.mpi import MpiJob
from shardwright.world.distributed.operations import _CLOSED


class Groups:
    """Process groups that steps communicate over: one for every distinct set of ranks, made once.

    Args:
        rank: this rank.
        size: the number of all ranks.
        device_type: ``cpu`` or ``cuda``, which determines the backend that serves the tensors.
        calibration: the fastest algorithms; the same on every rank.
        mpi: the MPI job that moves tensors in place of ``torch.distributed``, if one does.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        device_type: str = "cpu",
        calibration: Calibration | None = None,
        mpi: MpiJob | None = None,
    ):
        self.rank, self.size, self.device_type = rank, size, device_type
        self.closed = False
        self.calibration = calibration or (MPI if mpi is not None else None)
        self.scratch, self.mpi = Scratch(), mpi
        self.engine = "mpi" if mpi is not None else _engine_of(dist.group.WORLD, device_type)
        self.by_messages = self.engine != "other"
        self._links: dict[Shape, Link] = {}
        self._made: dict[Shape, Any] = {}

    def make(self, steps: Iterable[Step]) -> None:
        """Makes the groups that ``steps`` need; all ranks call it with the same steps.

        Raises:
            WorldError: the world is closed.
        """
        if self.closed:
            raise WorldError(_CLOSED)
        if self.calibration is None and self.by_messages:
            self.calibration = _agreed_calibration(self.rank)
        everyone = tuple(range(self.size))
        wanted: set[Shape] = set()
        for step in steps:
            if self.by_messages and step.kind in (*TRANSFERS, "all_gather"):
                wanted.add(everyone)  # for direct messages any group will do
            if step.kind in TRANSFERS and self.by_messages:
                continue
            if step.communicates:
                wanted.update(tuple(sorted(group)) for group in step.groups)
        missing = sorted(r for r in wanted if len(r) > 1 and r not in self._made)
        if self.mpi is not None:
            self._make_communicators(self.mpi, missing)
            return
        for ranks in missing:
            whole = len(ranks) == self.size
            group = dist.group.WORLD if whole else dist.new_group(list(ranks), timeout=job_timeout(self.device_type))
            self._made[ranks] = None if whole else group
            if self.rank in ranks:
                self._links[ranks] = Link(ranks, group, _engine_of(group, self.device_type), self.calibration, self.scratch)

    def _make_communicators(self, mpi: MpiJob, missing: Sequence[Shape]) -> None:
        if missing:
            dist.barrier()  # which knows the job's timeout, where MPI would wait for ever
        for ranks in missing:
            self._made[ranks] = None
            group = mpi.group(ranks)
            if group is not None:
                self._links[ranks] = Link(ranks, group, "mpi", self.calibration, self.scratch)

    def link(self, members: Sequence[int]) -> Link:
        ranks = tuple(sorted(members))
        if ranks not in self._links:
            raise WorldError(f"no process group for ranks {ranks}: Groups.make was not told of the step")
        return self._links[ranks]

    def close(self, destroy: bool) -> None:
        """Releases the groups, so that their threads end before the interpreter does; ``destroy`` ends them too."""
        for link in self._links.values():
            link.close()
        if self.mpi is not None:
            self.mpi.close()
        if destroy:
            for ranks, group in self._made.items():
                if group is not None and self.rank in ranks:
                    dist.destroy_process_group(group)
        self._links, self._made, self.closed = {}, {}, True


def _engine_of(group: Any, device_type: str) -> str:
    return "gloo" if backend_of(group, device_type) == "gloo" else "other"


def _agreed_calibration(rank: int) -> Calibration:
    """Returns rank 0's calibration on every rank: ranks with different algorithms would wait for ever."""
    values = [load().to_dict() if rank == 0 else None]
    dist.broadcast_object_list(values, 0)
    return Calibration.from_dict(values[0])
