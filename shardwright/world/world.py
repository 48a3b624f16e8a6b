"""Interface of worlds, which run local programs on a job's processes or on simulated ranks.

Everything above this folder uses this interface and need not know which world it is.
:class:`~shardwright.world.simulated.world.SimulatedWorld` is all ranks in one process,
:class:`~shardwright.world.distributed.world.DistributedWorld` is one rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from shardwright.ir.layout import Layout
from shardwright.ir.program import LocalProgram

Described = tuple[Sequence[str], Sequence[Any]]


class World(ABC):
    """Ranks, and what they do together.

    Attributes:
        size: number of ranks.
        rank: that of this process; 0 where it is all of them.
        is_simulated: whether this process is all ranks. For users; the library uses the properties that follow from it.
        keeps_pieces: whether a process keeps its rank's pieces of parameters, rather than whole ones for all ranks.
        inputs_are_whole: whether callers give whole tensors, whatever the dataset strategy says.
        runs_rank_groups: whether a bound program runs the calls of all ranks, once per rank group.
    """

    is_simulated: ClassVar[bool]
    keeps_pieces: ClassVar[bool]
    inputs_are_whole: ClassVar[bool]
    runs_rank_groups: ClassVar[bool]
    size: int
    rank: int

    @property
    @abstractmethod
    def processes(self) -> int:
        """Number of processes that have to do the same."""

    @abstractmethod
    def rank_or_raise(self, otherwise: Callable[[], Exception]) -> int:
        """Returns the rank of this process, or raises ``otherwise()`` where it is all of them."""

    @abstractmethod
    def device_of(self, root: nn.Module) -> torch.device:
        """Returns the device on which programs of a module run."""

    @abstractmethod
    def adds_wide(self, device: torch.device) -> bool:
        """Tells whether sums of half precision are taken in float32 and rounded once."""

    # -- agreeing ---------------------------------------------------------------------------------------------------------

    @abstractmethod
    def on_first_rank(self, make: Callable[[], Any]) -> Any:
        """Calls ``make`` on rank 0; returns its result, or raises its error, on every rank."""

    @abstractmethod
    def compare(self, stage: str, describe: Callable[[], Described]) -> None:
        """Refuses, on all processes, what differs between them.

        Args:
            stage: what is compared, ``"graph"`` or ``"program"``.
            describe: makes its lines, and tensors that belong to it; called only where there are other processes.
        """

    @abstractmethod
    def gather_numbers(self, numbers: Sequence[int]) -> list[list[int]]:
        """Gathers the numbers of every process, in their order. All of them call it."""

    @abstractmethod
    def agree_on_random_state(self) -> None:
        """Gives every process the state of rank 0's default generator."""

    # -- tensors and programs ---------------------------------------------------------------------------------------------

    @abstractmethod
    def place_parameters(
        self,
        root: nn.Module,
        layouts: Mapping[str, Layout],
        device: torch.device,
        slices: Mapping[str, tuple[Layout, tuple[int, ...]]] | None = None,
    ) -> dict[str, Layout]:
        """Puts the parameters of a module where programs read them.

        Args:
            root: the module.
            layouts: a layout for each parameter, by name.
            device: where they go.
            slices: the layout and global shape of parameters that are a rank's slice already.

        Returns:
            The layouts in which they are stored.
        """

    @abstractmethod
    def gather(self, piece: Tensor, source: Layout, shape: Sequence[int], target: Layout | None = None) -> Tensor:
        """Joins the parts of a tensor that callers have given.

        Args:
            piece: this caller's part.
            source: the layout that the dataset strategy gives it.
            shape: global shape.
            target: the layout to gather to; default: the whole.

        Returns:
            What this process holds of ``target``; where callers give whole tensors, a view of ``piece``.
        """

    @abstractmethod
    def bind(self, program: LocalProgram, keep: tuple[str, ...] | None = None) -> Callable[..., Any]:
        """Makes a function of a program. All processes call it.

        Args:
            program: the program.
            keep: names of local values to return in place of the outputs.

        Returns:
            A function of the inputs to ``(outputs, updated buffers)``, whole tensors.
        """

    @abstractmethod
    def bind_on_ranks(
        self, program: LocalProgram, ranks: Sequence[int], keep: tuple[str, ...] | None = None
    ) -> Callable[..., Any] | None:
        """Makes a function of a program that only some ranks run. All processes call it.

        Args:
            program: of these ranks.
            ranks: those that run it, by their numbers in the world; on the process of another one the result is ``None``.
            keep: see :meth:`bind`.
        """

    @abstractmethod
    def direct_link(self) -> Any | None:
        """Returns the link for direct messages between processes, ``None`` if there is one process. All of them call it.

        Raises:
            WorldError: the job's backend cannot send messages in any order.
        """
