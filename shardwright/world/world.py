"""World: what runs local programs and collectives, be it the processes of a job or simulated ranks.

Everything above this folder asks a world to do something, or what holds in it; which of the two it is makes no difference to
them. :class:`~shardwright.world.simulated.world.SimulatedWorld` is all ranks in one process, a
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
        rank: the one that this process is; 0 where it is all of them.
        is_simulated: whether this process is all ranks. For users; the library asks for what follows.
        keeps_pieces: whether a process keeps its rank's pieces of parameters, rather than whole ones for all ranks.
        inputs_are_whole: whether a caller hands in whole tensors, whatever the dataset strategy says.
        runs_lanes: whether a bound program runs the calls of all ranks, one of each lane.
    """

    is_simulated: ClassVar[bool]
    keeps_pieces: ClassVar[bool]
    inputs_are_whole: ClassVar[bool]
    runs_lanes: ClassVar[bool]
    size: int
    rank: int

    @property
    @abstractmethod
    def processes(self) -> int:
        """Number of processes that have to do the same."""

    @abstractmethod
    def own_rank(self, otherwise: Callable[[], Exception]) -> int:
        """Returns the rank that this process is, or raises ``otherwise()`` where it is all of them."""

    @abstractmethod
    def device_of(self, root: nn.Module) -> torch.device:
        """Returns the device on which programs of a module run."""

    @abstractmethod
    def adds_wide(self, device: torch.device) -> bool:
        """Returns whether sums of half precision are taken in float32 and rounded once."""

    # -- agreeing ---------------------------------------------------------------------------------------------------------

    @abstractmethod
    def on_first_rank(self, make: Callable[[], Any]) -> Any:
        """Calls ``make`` on rank 0 and returns its result, or raises its error, on every rank."""

    @abstractmethod
    def compare(self, stage: str, describe: Callable[[], Described]) -> None:
        """Refuses, on all processes, what is not the same on all of them.

        Args:
            stage: what is compared, ``"graph"`` or ``"program"``.
            describe: makes its lines, and tensors that belong to it; called only where there are others.
        """

    @abstractmethod
    def gather_numbers(self, numbers: Sequence[int]) -> list[list[int]]:
        """Returns the numbers of every process, in their order. All of them call it."""

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
            layouts: a layout for each parameter, by name.
            device: where they go.
            slices: of parameters that are a rank's slice already, the layout and the global shape.

        Returns:
            The layouts in which they are stored.
        """

    @abstractmethod
    def gather(self, piece: Tensor, source: Layout, shape: Sequence[int], target: Layout | None = None) -> Tensor:
        """Returns the tensor of which a caller has handed in its part.

        Args:
            piece: what was handed in; ``source``: the layout that the dataset strategy gives it.
            shape: global shape.
            target: what it is gathered to; default: the whole.

        Returns:
            What this process holds of ``target``; where callers hand in whole tensors, a view of ``piece``.
        """

    @abstractmethod
    def bind(self, program: LocalProgram, keep: tuple[str, ...] | None = None) -> Callable[..., Any]:
        """Returns the program as a function of its inputs. All processes call it.

        Args:
            keep: names of local values to return in place of the outputs.

        Returns:
            A function to ``(outputs, updated buffers)``, whole tensors.
        """
