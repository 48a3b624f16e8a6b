"""Takes the program of a stage, for all micro-batches, apart into what runs when.

- *once*: what is the same for all micro-batches, such as gathers of parameters and the random numbers of the whole batch;
- *cuts*: cuts of such values, which only depend on the micro-batch's place;
- *each*: the rest, which runs forward and backward for every micro-batch. Micro-batches of one size share a program.

With slices of the sequence all this is of units, which are slices of micro-batches; a unit also reads what the earlier slices
of its micro-batch have kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from shardwright.ir import rank_groups
from shardwright.ir.instructions import (
    Call,
    Instruction,
    Move,
    ProgramInput,
)
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.ir.operator import TensorMeta
from shardwright.ir.program import LocalProgram
from shardwright.ir.redistribution import Redistribution
from shardwright.pipeline.in_place import InPlace, mixes_sums
from shardwright.pipeline.units import UNITS, rows_of_unit, unit_axes, unit_dims
from shardwright.redistribute.planner import Options
from shardwright.redistribute.steps import redistribution
from shardwright.rules.attention import sliced_causal_attention
from shardwright.rules.pieces import piece


@dataclass(frozen=True)
class Parts:
    """A stage's program in parts.

    Args:
        once: runs once per step; returns the values of ``held``.
        held: local values that ``cuts`` and ``each`` read.
        cuts: for every micro-batch, the program that cuts its pieces out of held values; returns those of ``cut``.
        cut: local values that ``each`` reads of them.
        each: for every micro-batch its program, the same object where they are alike.
        kept: local values that later slices of the sequence read: the last outputs of ``each``. Its last inputs are those of
            the earlier slices, value by value.
        slices: the number of slices of every micro-batch.
    """

    once: LocalProgram
    held: tuple[str, ...]
    cuts: tuple[LocalProgram, ...]
    cut: tuple[str, ...]
    each: tuple[LocalProgram, ...]
    kept: tuple[str, ...] = ()
    slices: int = 1

    def earlier(self, unit: int) -> list[tuple[str, int]]:
        """Lists what a unit reads of earlier slices: the local value, and the number of the slice."""
        return [(name, at) for name in self.kept for at in range(unit % self.slices)]


def moves_once(parts: Parts, phase: str) -> bool:
    """Tells whether ranks send each other anything in what runs once per step.

    Args:
        parts: a stage's program.
        phase: ``forward``, such as gathers of parameters, or ``backward``, such as sums of their gradients.
    """
    moves = [move for instruction in parts.once.instructions for move in instruction.ends]
    return any(move.communicates_backward if phase == "backward" else move.communicates for move in moves)


def parts_of(
    program: LocalProgram, count: int, options: Options, received: Sequence[str], first_rank: int = 0, slices: int = 1
) -> Parts:
    """Takes a program apart.

    Args:
        program: of units and ranks, without moves that are fused or started early.
        count: number of units.
        options: which steps redistributions may use and their costs.
        received: inputs that come from other stages, per unit.
        first_rank: the number of the first of the stage's ranks in the programs that are made.
        slices: number of slices of every micro-batch.
    """
    return _Taker(program, count, options, received, first_rank, slices).run()


class _Taker:
    def __init__(
        self, program: LocalProgram, count: int, options: Options, received: Sequence[str], first_rank: int, slices: int
    ):
        self.slices = slices
        calls = [i for i in program.calls if i.function is sliced_causal_attention]
        self.kept = tuple(dict.fromkeys(own.name for call in calls for own in call.args[1:3]))
        self.program, self.count, self.options, self.received = program, count, options, tuple(received)
        self.first_rank, self.ranks = first_rank, program.world_size // count
        self.metas: dict[str, TensorMeta] = {i.name: i.meta for i in program.inputs}
        self.layouts, self.groups = dict(program.layouts), dict(program.rank_groups)

    def run(self) -> Parts:
        once, cutting, each = self.sorted()
        read = {name for i in (*cutting, *each) for name in i.reads} | self.returned()
        made = [name for i in once for name in i.outputs]
        given = [i.name for i in self.program.inputs if i.name not in self.received]
        held = tuple(name for name in (*given, *made) if name in read)
        cut = tuple(n for i in cutting for n in i.outputs if n in {r for e in each for r in e.reads} | self.returned())
        received = tuple(replace(i, kind="local") for i in self.program.inputs if i.name in self.received)
        first = InPlace(self, 0)
        inputs = tuple(first.input(i) for i in self.program.inputs if i.name not in self.received)
        whole = first.program(inputs, once, ())
        of_held = tuple(self.as_input(name) for name in held)
        cuts, programs = [], []
        known: dict[Any, LocalProgram] = {}
        for place in range(self.count):
            at = InPlace(self, place)
            cuts.append(at.program(tuple(at.input(i) for i in of_held), cutting, ()))
            key = at.key(each)
            if key not in known:
                own = tuple(at.input(i) for i in (*of_held, *(self.as_input(name) for name in cut), *received))
                outputs = (*self.program.outputs, *self.kept)
                known[key] = at.program((*own, *at.earlier()), each, outputs, self.program.updates)
            programs.append(known[key])
        return Parts(whole, held, tuple(cuts), cut, tuple(programs), self.kept, self.slices)

    def returned(self) -> set[str]:
        return {o for o in self.program.outputs if isinstance(o, str)} | {value for _, value in self.program.updates}

    def as_input(self, name: str) -> ProgramInput:
        layout = self.layouts.get(name) or Layout.replicated(Mesh((), ()), 0)
        return ProgramInput(name, "local", name, self.meta(name), layout)

    def meta(self, name: str) -> TensorMeta:
        """Returns the meta of a value; of those that moves and cuts make only the shape matters."""
        return self.metas[name]

    # -- sorting ----------------------------------------------------------------------------------------------------

    def is_same(self, name: str) -> bool:
        """Tells whether a value is the same for all micro-batches."""
        if name in self.received:
            return False
        groups, n = self.groups[name], self.ranks
        if self.count == 1:
            return name in self.same
        return all(groups[place * n : (place + 1) * n] == groups[:n] for place in range(1, self.count))

    def sorted(self) -> tuple[list[Instruction], list[Instruction], list[Instruction]]:
        """Sorts the instructions into once, cuts and each."""
        inputs = {i.name for i in self.program.inputs if i.kind != "input"}
        self.same = set(inputs)  # with one micro-batch: what no input reaches
        once: list[Instruction] = []
        cutting: list[Instruction] = []
        each: list[Instruction] = []
        ready = {i.name for i in self.program.inputs if i.name not in self.received}
        cut: set[str] = set()
        for instruction in self.with_whole_values():
            outputs, reads = instruction.outputs, instruction.reads
            if self.count == 1 and all(name in self.same for name in reads):
                self.same.update(outputs)
            if outputs and ready.issuperset(reads) and all(self.is_same(name) for name in outputs):
                once.append(instruction)
                ready.update(outputs)
            elif outputs and (ready | cut).issuperset(reads) and _only_cuts(instruction):
                cutting.append(instruction)
                cut.update(outputs)
            else:
                each.append(instruction)
            for name in outputs:
                self.metas.setdefault(name, self.made_meta(instruction, name))
        return once, cutting, each

    def with_whole_values(self) -> list[Instruction]:
        """Makes values whole on every rank, once for all micro-batches, before these cut them where ranks do.

        What ranks have of their gradients is added up in the same move, once, after all micro-batches.
        """
        found: list[Instruction] = []
        for instruction in self.program.instructions:
            found += self.moved_whole(instruction) if isinstance(instruction, Move) else [instruction]
        return found

    def moved_whole(self, move: Move) -> list[Instruction]:
        plan, options = move.redistribution, replace(self.options, itemsize=move.dtype.itemsize)
        if _is_slice(plan):
            whole, gradient = _whole_before(plan)
            if whole == plan.source and not (gradient and move.needs_grad):
                return [move]
            name = f"{move.output}_whole"
            moved = redistribution(plan.source, whole, plan.shape, gradient, options)
            groups = rank_groups.of_layout(moved.target, gradient)
            self.layouts[name], self.groups[name] = moved.target, groups
            cut = redistribution(moved.target, plan.target, plan.shape, (), options)
            first = replace(move, output=name, redistribution=moved, rank_groups=groups)
            return [first, replace(move, source=name, redistribution=cut)]
        if _is_for_all(plan):  # gradients of micro-batches add up before ranks send each other any
            gradient = tuple(axis for axis in plan.partial_gradient if axis not in UNITS)
            moved = redistribution(plan.source, plan.target, plan.shape, gradient, options)
            groups = rank_groups.of_layout(moved.target, gradient)
            self.groups[move.output] = groups
            return [replace(move, redistribution=moved, rank_groups=groups)]
        return [move]

    def made_meta(self, instruction: Instruction, name: str) -> TensorMeta:
        if isinstance(instruction, Move):
            return TensorMeta(instruction.redistribution.shape, instruction.dtypes("forward")[2])
        layout = self.program.layouts.get(name)
        known = next((self.metas[v] for v, place in self.program.places.items() if place == name and v in self.metas), None)
        if known is not None:
            return known
        shape = () if layout is None else (0,) * layout.ndim
        return TensorMeta(shape, next((self.metas[n].dtype for n in instruction.reads), None))  # type: ignore[arg-type]


def _is_slice(plan: Redistribution) -> bool:
    """Tells whether a move cuts a value that is the same for all micro-batches."""
    return not unit_dims(plan.source) and bool(unit_dims(plan.target)) and not mixes_sums(plan)


def _is_for_all(plan: Redistribution) -> bool:
    """Tells whether a move of one value for all micro-batches adds up their gradients."""
    knows = any(unit_axes((*layout.partial_axes, *layout.split_axes)) for layout in (plan.source, plan.target))
    return bool(unit_axes(plan.partial_gradient)) and not knows


def _whole_before(plan: Redistribution) -> tuple[Layout, tuple[str, ...]]:
    """Returns a layout in which ranks hold what micro-batches cut whole."""
    source, target = plan.source, plan.target
    bound = [axes if axes == to else () for axes, to in zip(source.bound, target.bound, strict=True)]
    sizes = [own if axes else None for own, axes in zip(source.sizes, bound, strict=True)]
    whole = Layout.of(source.mesh, bound, (), sizes)
    pieces = [axis for axis in target.split_axes if axis not in UNITS and axis not in whole.split_axes]
    gradient = source.mesh.ordered({*pieces, *(axis for axis in plan.partial_gradient if axis not in UNITS)})
    return whole, gradient


def _only_cuts(instruction: Instruction) -> bool:
    if instruction.ends:
        return not any(move.communicates for move in instruction.ends)
    return isinstance(instruction, Call) and instruction.function in (piece, rows_of_unit)
