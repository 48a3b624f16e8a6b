"""Writes the instructions of a program for all units as one of them runs them: with its pieces, over the stage's ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from shardwright.base.torch_private import pytree
from shardwright.ir import rank_groups
from shardwright.ir.instructions import (
    Call,
    FusedMoves,
    Instruction,
    KeepSliceForBackward,
    Move,
    PerRank,
    ProgramInput,
    Ref,
    StartMoves,
)
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.ir.program import LocalProgram
from shardwright.ir.redistribution import Redistribution
from shardwright.ir.visitor import InstructionVisitor
from shardwright.pipeline.crossing import shifted
from shardwright.pipeline.sums import share
from shardwright.pipeline.units import UNITS, pieces_at, unit_axes, unit_dims
from shardwright.redistribute.planner import Options
from shardwright.redistribute.steps import redistribution
from shardwright.rules.attention import sliced_causal_attention
from shardwright.rules.pieces import piece


class MicroBatchesMeet(Exception):
    """A move that would need all micro-batches; carries the name of the operator that it belongs to."""


class AllUnits(Protocol):
    """Interface of the program of all units, as it is taken apart.

    Attributes:
        program: the program.
        options: which steps redistributions may use and their costs.
        received: inputs that come from other stages.
        first_rank, ranks: the first of the stage's ranks in the programs that are made, and their number.
        layouts, groups: of its local values.
        kept: local values that later slices read.
        slices: number of slices of every micro-batch.
    """

    program: LocalProgram
    options: Options
    received: tuple[str, ...]
    first_rank: int
    ranks: int
    layouts: dict[str, Layout]
    groups: dict[str, rank_groups.RankGroups]
    kept: tuple[str, ...]
    slices: int

    def as_input(self, name: str) -> ProgramInput: ...


def mixes_sums(plan: Redistribution) -> bool:
    """Tells whether a move begins or ends sums over units."""
    return set(unit_axes(plan.source.partial_axes)) != set(unit_axes(plan.target.partial_axes))


class InPlace(InstructionVisitor[Instruction]):
    """Writes instructions as one unit runs them.

    Args:
        taker: the program of all units.
        place: number of the unit.
    """

    def __init__(self, taker: AllUnits, place: int):
        self.taker, self.place, self.n = taker, place, taker.ranks
        self.layouts = {name: self.layout(layout) for name, layout in taker.layouts.items()}
        self.groups = {name: self.rank_groups(groups) for name, groups in taker.groups.items()}

    def program(
        self, inputs: tuple[ProgramInput, ...], instructions: Sequence[Instruction], outputs: tuple[Any, ...],
        updates: tuple[tuple[str, str], ...] = (),
    ) -> LocalProgram:  # fmt: skip
        program = self.taker.program
        names = {o for o in outputs if isinstance(o, str)}
        return replace(
            program, world_size=self.n, inputs=inputs, instructions=tuple(map(self.visit, instructions)), outputs=outputs,
            updates=updates, rank_groups=self.groups, layouts=self.layouts, places={},
            split=frozenset(names),
        )  # fmt: skip

    def key(self, instructions: Sequence[Instruction]) -> Any:
        """Returns what tells this micro-batch's instructions from those of another one."""
        outputs = (o for o in self.taker.program.outputs if isinstance(o, str))
        crossing = (*self.taker.received, *outputs, *self.taker.kept)
        found: list[Any] = [repr(self.layouts.get(name)) for name in crossing]  # by which other stages send and receive
        for instruction in instructions:
            if isinstance(instruction, Call) and instruction.function is not share:
                for leaf in pytree.tree_leaves((instruction.args, instruction.kwargs)):
                    if isinstance(leaf, PerRank):
                        found.append([_hashable(leaf.of(self.rank(r))) for r in range(self.n)])
            for move in instruction.ends:
                plan = move.redistribution
                found.append(self.shape(plan.source, plan.shape))
                if unit_dims(plan.source) != unit_dims(plan.target):  # of a value that is whole here: each unit cuts its own
                    bounds = plan.target.bounds(plan.shape)
                    found.append([bounds[self.rank(r)] for r in range(self.n)])
        return str(found)

    def rank(self, rank: int) -> int:
        """Returns the place on ``micro x ranks`` of one of the stage's ranks."""
        return self.place * self.n + rank

    # -- values -----------------------------------------------------------------------------------------------------

    def rank_groups(self, groups: rank_groups.RankGroups) -> rank_groups.RankGroups:
        return rank_groups.number(groups[self.place * self.n : (self.place + 1) * self.n])

    def layout(self, layout: Layout) -> Layout:
        """Returns the layout over the ranks of what this micro-batch has."""
        mesh, skipped = layout.mesh, len(unit_axes(layout.mesh.axes))
        if not skipped:  # of a program without micro-batches
            return shifted(layout, self.taker.first_rank) if self.taker.first_rank else layout
        ranks = tuple(r % self.n + self.taker.first_rank for r in mesh.ranks[: self.n])
        own = Mesh(mesh.axes[skipped:], mesh.sizes[skipped:], ranks)
        dims, sizes = [], []
        for dim, (axes, pieces) in enumerate(zip(layout.bound, layout.sizes, strict=True)):
            rest = tuple(a for a in axes if a not in UNITS)
            if pieces is not None and unit_axes(axes):
                pieces = pieces_at(layout, dim, sum(pieces), self.unit_of(mesh))
            dims.append(rest)
            sizes.append(pieces if rest else None)
        return Layout.of(own, dims, [(a, op) for a, op in layout.partial if a not in UNITS], sizes)

    def unit_of(self, mesh: Mesh) -> dict[str, int]:
        """Returns the place of the unit on a mesh of units and ranks, by axis."""
        coordinates = mesh.coordinates(mesh.ranks[self.place * self.n])
        return {axis: coordinates[axis] for axis in unit_axes(mesh.axes)}

    def shape(self, layout: Layout, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape, over the ranks, of what this micro-batch has of a value."""
        found = []
        for dim, size in enumerate(shape):
            if unit_axes(layout.bound[dim]):
                explicit = layout.sizes[dim]  # of what calls make no shape is known
                known = size if explicit is None else sum(explicit)
                size = sum(pieces_at(layout, dim, known, self.unit_of(layout.mesh)))
            found.append(size)
        return tuple(found)

    def input(self, given: ProgramInput) -> ProgramInput:
        shape = self.shape(given.layout, given.meta.shape) if len(given.meta.shape) == given.layout.ndim else given.meta.shape
        return replace(given, meta=replace(given.meta, shape=shape, stride=()), layout=self.layout(given.layout))

    def earlier(self) -> list[ProgramInput]:
        """Returns what the unit reads of earlier slices."""
        found, slices = [], self.taker.slices
        for name in self.taker.kept:
            for at in range(self.place % slices):
                own, given = _of_slice(name, at), InPlace(self.taker, self.place - self.place % slices + at)
                self.layouts[own], self.groups[own] = given.layouts[name], given.groups[name]
                found.append(replace(given.input(self.taker.as_input(name)), name=own, target=own))
        return found

    # -- instructions -----------------------------------------------------------------------------------------------

    def call(self, call: Call) -> Instruction:
        """Writes a call."""
        args, kwargs = pytree.tree_map(self.argument, (call.args, call.kwargs))
        if call.function is sliced_causal_attention:  # which reads the keys and values of earlier slices too
            earlier = range(self.place % self.taker.slices)
            joined = ([*(Ref(_of_slice(own.name, at)) for at in earlier), own] for own in args[1:3])
            args = (args[0], *joined, *args[3:])
        return replace(call, args=args, kwargs=kwargs, rank_groups=self.rank_groups(call.rank_groups))

    def keep_slice(self, keep: KeepSliceForBackward) -> Instruction:
        """Writes a value that is kept as a slice."""
        return replace(keep, cut=self.move(keep.cut), gather=self.move(keep.gather))  # type: ignore[arg-type]

    def start_moves(self, start: StartMoves) -> Instruction:
        """Is not called: programs are taken apart before moves start early."""
        raise NotImplementedError

    def fused_moves(self, fused: FusedMoves) -> Instruction:
        """Is not called: programs are taken apart before moves are fused."""
        raise NotImplementedError

    def argument(self, leaf: Any) -> Any:
        return (
            PerRank(partial(_of, leaf.of, self.place * self.n - self.taker.first_rank)) if isinstance(leaf, PerRank) else leaf
        )

    def move(self, move: Move) -> Move | Call:
        """Writes a move, or the call that cuts a micro-batch's piece."""
        plan = move.redistribution
        before, after = unit_dims(plan.source), unit_dims(plan.target)
        if mixes_sums(plan) or any(after.get(axis) != dim for axis, dim in before.items()):
            raise MicroBatchesMeet(move.cause)
        options = replace(self.taker.options, itemsize=move.dtype.itemsize)
        gradient = tuple(a for a in plan.partial_gradient if a not in UNITS)
        if before != after:  # a slice of what is there whole
            return self.slice(move)
        shape = self.shape(plan.target, plan.shape)
        source, target = self.layout(plan.source), self.layout(plan.target)
        return replace(
            move, redistribution=redistribution(source, target, shape, gradient, options),
            rank_groups=self.rank_groups(move.rank_groups),
        )  # fmt: skip

    def slice(self, move: Move) -> Call:
        """Returns the call that cuts this micro-batch's piece of a value that is whole on every rank."""
        plan = move.redistribution
        bounds = plan.target.bounds(plan.shape)
        source = plan.source.bounds(plan.shape)

        def there(rank: int) -> int:
            return self.rank(rank - self.taker.first_rank)

        def start(dim: int) -> PerRank:
            return PerRank(lambda rank: bounds[there(rank)][dim][0] - source[there(rank)][dim][0])

        def length(dim: int) -> PerRank:
            return PerRank(lambda rank: bounds[there(rank)][dim][1] - bounds[there(rank)][dim][0])

        dims = range(len(plan.shape))
        groups = self.rank_groups(move.rank_groups)
        return Call(
            piece, (Ref(move.source), [start(d) for d in dims], [length(d) for d in dims]), {}, (move.output,), False,
            move.cause, groups, move.autocast, move.grad, move.recompute,
        )  # fmt: skip


def _of(of: Callable[[int], Any], offset: int, rank: int) -> Any:
    return of(rank + offset)


def _of_slice(name: str, at: int) -> str:
    return f"{name}_of_slice_{at}"


def _hashable(value: Any) -> str:
    return repr(value)
