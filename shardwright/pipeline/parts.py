"""Takes the program of a stage, for all micro-batches, apart into what runs when.

- *once*: what is the same for all micro-batches, such as gathers of parameters and the random numbers of the whole batch;
- *slices*: cuts of such values, which only depend on the micro-batch's place;
- *each*: the rest, which runs forward and backward for every micro-batch. Micro-batches of one size share a program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

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
from shardwright.ir.operator import TensorMeta
from shardwright.ir.program import LocalProgram
from shardwright.ir.redistribution import Redistribution
from shardwright.ir.visitor import InstructionVisitor
from shardwright.pipeline.crossing import shifted
from shardwright.pipeline.micro import MICRO
from shardwright.pipeline.sums import share
from shardwright.redistribute.planner import Options
from shardwright.redistribute.steps import redistribution
from shardwright.rules.pieces import piece


class MicroBatchesMeet(Exception):
    """A move that would need all micro-batches; carries the name of the operator that it belongs to."""


@dataclass(frozen=True)
class Parts:
    """A stage's program in parts.

    Args:
        once: runs once per step; returns the values of ``held``.
        held: local values that ``slices`` and ``each`` read.
        slices: for every micro-batch, the program that cuts its pieces out of held values; returns those of ``cut``.
        cut: local values that ``each`` reads of them.
        each: for every micro-batch its program, the same object where they are alike.
    """

    once: LocalProgram
    held: tuple[str, ...]
    slices: tuple[LocalProgram, ...]
    cut: tuple[str, ...]
    each: tuple[LocalProgram, ...]


def parts_of(program: LocalProgram, count: int, options: Options, received: Sequence[str], first_rank: int = 0) -> Parts:
    """Takes a program apart.

    Args:
        program: of ``micro x ranks``, without moves that are fused or started early.
        count: number of micro-batches.
        options: which steps redistributions may use and their costs.
        received: inputs that come from other stages, per micro-batch.
        first_rank: the number of the first of the stage's ranks in the programs that are made.
    """
    return _Taker(program, count, options, received, first_rank).run()


class _Taker:
    def __init__(self, program: LocalProgram, count: int, options: Options, received: Sequence[str], first_rank: int):
        self.program, self.count, self.options, self.received = program, count, options, tuple(received)
        self.first_rank, self.ranks = first_rank, program.world_size // count
        self.metas: dict[str, TensorMeta] = {i.name: i.meta for i in program.inputs}
        self.layouts, self.groups = dict(program.layouts), dict(program.rank_groups)

    def run(self) -> Parts:
        once, slices, each = self.sorted()
        read = {name for i in (*slices, *each) for name in i.reads} | self.returned()
        made = [name for i in once for name in i.outputs]
        given = [i.name for i in self.program.inputs if i.name not in self.received]
        held = tuple(name for name in (*given, *made) if name in read)
        cut = tuple(n for i in slices for n in i.outputs if n in {r for e in each for r in e.reads} | self.returned())
        received = tuple(replace(i, kind="local") for i in self.program.inputs if i.name in self.received)
        first = _InPlace(self, 0)
        inputs = tuple(first.input(i) for i in self.program.inputs if i.name not in self.received)
        whole = first.program(inputs, once, ())
        of_held = tuple(self.as_input(name) for name in held)
        cuts, programs = [], []
        known: dict[Any, LocalProgram] = {}
        for place in range(self.count):
            at = _InPlace(self, place)
            cuts.append(at.program(tuple(at.input(i) for i in of_held), slices, ()))
            key = at.key(each)
            if key not in known:
                own = tuple(at.input(i) for i in (*of_held, *(self.as_input(name) for name in cut), *received))
                known[key] = at.program(own, each, self.program.outputs, self.program.updates)
            programs.append(known[key])
        return Parts(whole, held, tuple(cuts), cut, tuple(programs))

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
        """Sorts the instructions into once, slices and each."""
        inputs = {i.name for i in self.program.inputs if i.kind != "input"}
        self.same = set(inputs)  # with one micro-batch: what no input reaches
        once: list[Instruction] = []
        slices: list[Instruction] = []
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
                slices.append(instruction)
                cut.update(outputs)
            else:
                each.append(instruction)
            for name in outputs:
                self.metas.setdefault(name, self.made_meta(instruction, name))
        return once, slices, each

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
            gradient = tuple(axis for axis in plan.partial_gradient if axis != MICRO)
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
    return _cut_dim(plan.source) is None and _cut_dim(plan.target) is not None and not _mixes_sums(plan)


def _is_for_all(plan: Redistribution) -> bool:
    """Tells whether a move of one value for all micro-batches adds up their gradients."""
    layouts = (plan.source, plan.target)
    knows = any(MICRO in layout.partial_axes or _cut_dim(layout) is not None for layout in layouts)
    return MICRO in plan.partial_gradient and not knows


def _mixes_sums(plan: Redistribution) -> bool:
    return (MICRO in plan.source.partial_axes) != (MICRO in plan.target.partial_axes)


def _whole_before(plan: Redistribution) -> tuple[Layout, tuple[str, ...]]:
    """Returns a layout in which ranks hold what micro-batches cut whole."""
    source, target = plan.source, plan.target
    bound = [axes if axes == to else () for axes, to in zip(source.bound, target.bound, strict=True)]
    sizes = [own if axes else None for own, axes in zip(source.sizes, bound, strict=True)]
    whole = Layout.of(source.mesh, bound, (), sizes)
    pieces = [axis for axis in target.split_axes if axis != MICRO and axis not in whole.split_axes]
    gradient = source.mesh.ordered({*pieces, *(axis for axis in plan.partial_gradient if axis != MICRO)})
    return whole, gradient


def _only_cuts(instruction: Instruction) -> bool:
    if instruction.ends:
        return not any(move.communicates for move in instruction.ends)
    return isinstance(instruction, Call) and instruction.function is piece


class _InPlace(InstructionVisitor[Instruction]):
    """Writes instructions as one micro-batch runs them."""

    def __init__(self, taker: _Taker, place: int):
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
        crossing = (*self.taker.received, *(o for o in self.taker.program.outputs if isinstance(o, str)))
        found: list[Any] = [repr(self.layouts.get(name)) for name in crossing]  # by which other stages send and receive
        for instruction in instructions:
            if isinstance(instruction, Call) and instruction.function is not share:
                for leaf in pytree.tree_leaves((instruction.args, instruction.kwargs)):
                    if isinstance(leaf, PerRank):
                        found.append([_hashable(leaf.of(self.rank(r))) for r in range(self.n)])
            for move in instruction.ends:
                plan = move.redistribution
                found.append(self.shape(plan.source, plan.shape))
                if _is_slice(plan):  # of a value that is whole here: each micro-batch cuts its own
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
        mesh = layout.mesh
        if mesh.axes[:1] != (MICRO,):  # of a program without micro-batches
            return shifted(layout, self.taker.first_rank) if self.taker.first_rank else layout
        own = Mesh(mesh.axes[1:], mesh.sizes[1:], tuple(r % self.n + self.taker.first_rank for r in mesh.ranks[: self.n]))
        dims, sizes = [], []
        for axes, pieces in zip(layout.bound, layout.sizes, strict=True):
            rest = tuple(a for a in axes if a != MICRO)
            if pieces is not None and MICRO in axes:
                each = len(pieces) // self.taker.count
                pieces = pieces[self.place * each : (self.place + 1) * each]
            dims.append(rest)
            sizes.append(pieces if rest else None)
        return Layout.of(own, dims, [(a, op) for a, op in layout.partial if a != MICRO], sizes)

    def shape(self, layout: Layout, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape, over the ranks, of what this micro-batch has of a value."""
        found = []
        for dim, size in enumerate(shape):
            if layout.mesh.axes[:1] == (MICRO,) and MICRO in layout.bound[dim]:
                pieces = layout.pieces(dim, size)
                each = len(pieces) // self.taker.count
                size = sum(pieces[self.place * each : (self.place + 1) * each])
            found.append(size)
        return tuple(found)

    def input(self, given: ProgramInput) -> ProgramInput:
        shape = self.shape(given.layout, given.meta.shape) if len(given.meta.shape) == given.layout.ndim else given.meta.shape
        return replace(given, meta=replace(given.meta, shape=shape, stride=()), layout=self.layout(given.layout))

    # -- instructions -----------------------------------------------------------------------------------------------

    def call(self, call: Call) -> Instruction:
        """Writes a call."""
        args, kwargs = pytree.tree_map(self.argument, (call.args, call.kwargs))
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
        before, after = _cut_dim(plan.source), _cut_dim(plan.target)
        if _mixes_sums(plan) or (before is not None and before != after):
            raise MicroBatchesMeet(move.cause)
        options = replace(self.taker.options, itemsize=move.dtype.itemsize)
        gradient = tuple(a for a in plan.partial_gradient if a != MICRO)
        if before is None and after is not None:  # a slice of what is there whole
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


def _cut_dim(layout: Layout) -> int | None:
    return next((d for d, axes in enumerate(layout.bound) if MICRO in axes), None)


def _hashable(value: Any) -> str:
    return repr(value)
