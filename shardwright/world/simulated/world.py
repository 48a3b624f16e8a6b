"""Simulated world: all ranks in lock step in one process, differentiable, with exact values.

A value is a list of tensors, one per rank group (see :mod:`shardwright.ir.rank_groups`): ranks that compute the same thing
are computed once. Collectives are differentiable functions over such lists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.errors import WorldError
from shardwright.ir.layout import Layout
from shardwright.ir.program import LocalProgram
from shardwright.parameters.whole import materialise_whole
from shardwright.redistribute.steps import redistribution
from shardwright.world.execute.checks import check_differentiable, check_layouts, check_piece
from shardwright.world.execute.recording import needs_recording, recorded
from shardwright.world.simulated.bind import _bind
from shardwright.world.simulated.moves import (
    SimulatedPieces,
    apply_move,
)
from shardwright.world.world import Described, World


class SimulatedWorld(World):
    """``size`` ranks in one process.

    >>> SimulatedWorld(8).size
    8
    """

    is_simulated = True
    keeps_pieces = False
    inputs_are_whole = True
    runs_rank_groups = True
    rank = 0

    def __init__(self, size: int):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise WorldError(f"a simulated world needs at least one rank, got {size!r}: sw.init(devices=8)")
        self.size = size

    def __repr__(self) -> str:
        return f"SimulatedWorld({self.size})"

    @property
    def processes(self) -> int:
        return 1

    def rank_or_raise(self, otherwise: Callable[[], Exception]) -> int:
        raise otherwise()

    def device_of(self, root: nn.Module) -> torch.device:
        """Returns the device that all parameters of a module are on; the CPU where they are on several."""
        devices = {p.device for p in root.parameters() if p.device.type != "meta"}
        return devices.pop() if len(devices) == 1 else torch.device("cpu")

    def adds_wide(self, device: torch.device) -> bool:
        return True

    def on_first_rank(self, make: Callable[[], Any]) -> Any:
        """Calls ``make`` and returns its result, as all ranks are this process."""
        return make()

    def compare(self, stage: str, describe: Callable[[], Described]) -> None:
        """Does nothing, as there is one process."""

    def gather_numbers(self, numbers: Sequence[int]) -> list[list[int]]:
        """Returns the numbers of this process, the only one."""
        return [list(numbers)]

    def agree_on_random_state(self) -> None:
        """Does nothing, as there is one generator."""

    def place_parameters(
        self,
        root: nn.Module,
        layouts: Mapping[str, Layout],
        device: torch.device,
        slices: Mapping[str, tuple[Layout, tuple[int, ...]]] | None = None,
    ) -> dict[str, Layout]:
        """Gives delayed parameters their whole values. All parameters stay whole, and programs cut them.

        Args:
            root, layouts, device, slices: see :meth:`World.place_parameters`.
        """
        materialise_whole(root)
        return dict(layouts)

    def gather(self, piece: Tensor, source: Layout, shape: Sequence[int], target: Layout | None = None) -> Tensor:
        """Returns a view of the tensor, which the caller gave whole.

        Args:
            piece, source, shape, target: see :meth:`World.gather`.
        """
        return piece.view_as(piece) if piece.requires_grad else piece.detach()

    def bind(self, program: LocalProgram, keep: tuple[str, ...] | None = None) -> Callable[..., Any]:
        """Makes a function of a program, on global tensors.

        Args:
            program: the program.
            keep: names of local values to return, one per rank group, in place of the outputs.

        Returns:
            A function to ``(outputs, updated buffers)``, global tensors.
        """
        plain = _bind(program, keep)
        if keep is not None or not needs_recording(program):
            return plain
        return recorded(_bind(program, None, records=True), plain)

    def bind_on_ranks(
        self, program: LocalProgram, ranks: Sequence[int], keep: tuple[str, ...] | None = None
    ) -> Callable[..., Any] | None:
        """Makes a function of a program that only some ranks run; they count from 0 in it."""
        return SimulatedWorld(len(ranks)).bind(program, keep)

    def direct_link(self) -> Any | None:
        """Returns ``None``: one process runs all ranks."""
        return None

    def redistribute(
        self,
        values: Sequence[Tensor | None],
        source: Layout,
        target: Layout,
        shape: Sequence[int],
        partial_gradient: Sequence[str] = (),
    ) -> list[Tensor | None]:
        """Moves a tensor between layouts over the same ranks or others; differentiable.

        Args:
            values: each rank's piece of ``source``; ``None`` for ranks that are not in it.
            source, target: the layouts.
            shape: global shape.
            partial_gradient: axes of the target over which the gradients that come back are parts of a sum.

        Returns:
            Each rank's piece of ``target``; ``None`` for ranks that are not in it.

        Raises:
            StrategyError: layouts beyond the world's ranks, a target with a reduction pending that the source does not have.
            WorldError: a piece that is missing or has another shape; a gradient wanted through a pending maximum.

        >>> rows = Layout((2,), ("x",))("x", "None")
        >>> world, whole = SimulatedWorld(2), torch.arange(4.0).view(2, 2)
        >>> world.redistribute(list(whole.split(1)), rows, rows.replicated(rows.mesh, 2), (2, 2))[1]
        tensor([[0., 1.],
                [2., 3.]])
        """
        if len(values) != self.size:
            raise WorldError(f"redistribute was given {len(values)} values for {self.size} ranks: give one a rank, or None")
        check_layouts(source, target, partial_gradient, self.size)
        for rank, value in enumerate(values):
            check_piece(rank, value, source, tuple(shape))
            if value is not None and value.requires_grad:
                check_differentiable(source, target)
        plan = redistribution(source, target, tuple(shape), tuple(partial_gradient))
        move = SimulatedPieces(plan, self.size)
        given = [v for v in values if v is not None]
        moved = apply_move(move, given) if any(v.requires_grad for v in given) else move.forward(given)
        results = iter(moved)
        return [next(results) if rank in plan.target.mesh.ranks else None for rank in range(self.size)]
