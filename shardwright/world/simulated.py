"""The simulated world: all ranks in lock step in one process, differentiable, with exact values.

A value is a list of tensors, one a lane (see :mod:`shardwright.partition.lanes`): ranks that compute the same thing are
computed once. Collectives are differentiable functions over such lists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardwright.errors import WorldError
from shardwright.layout import Layout
from shardwright.partition import lanes as lane
from shardwright.partition.program import Call, LocalProgram, Move, Start, Together
from shardwright.redistribute.steps import Redistribution, redistribution, steps_between
from shardwright.rules.lowering import PerRank
from shardwright.world import record
from shardwright.world.pieces import check_piece
from shardwright.world.simulated_steps import prepare, run_steps
from shardwright.world.source import SourceWriter

Lanes = lane.Lanes


class SimulatedWorld:
    """``size`` ranks in one process.

    >>> SimulatedWorld(8).size
    8
    """

    is_simulated = True
    rank = 0

    def __init__(self, size: int):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise WorldError(f"a simulated world needs at least one rank, got {size!r}: sw.init(devices=8)")
        self.size = size

    def __repr__(self) -> str:
        return f"SimulatedWorld({self.size})"

    def bind(self, program: LocalProgram, keep: tuple[str, ...] | None = None) -> Callable[..., Any]:
        """The program as a function of its inputs, given as global tensors.

        Args:
            keep: names of local values to return, as lanes, in place of the outputs.

        Returns:
            A function to ``(outputs, updated buffers)``, global tensors.
        """
        return _bind(program, keep)

    def redistribute(
        self,
        values: Sequence[Tensor | None],
        source: Layout,
        target: Layout,
        shape: Sequence[int],
        partial_gradient: Sequence[str] = (),
    ) -> list[Tensor | None]:
        """Moves a tensor from one layout to another, over the same ranks or others; differentiable.

        Args:
            values: what each rank holds, its piece of ``source``; ``None`` for ranks that are not in it.
            shape: global shape.
            partial_gradient: axes of the target over which the gradients that come back are parts of a sum.

        Returns:
            What each rank holds of ``target``; ``None`` for ranks that are not in it.

        Raises:
            WorldError: a piece that is missing or has another shape.

        >>> rows = Layout((2,), ("x",))("x", "None")
        >>> world, whole = SimulatedWorld(2), torch.arange(4.0).view(2, 2)
        >>> world.redistribute(list(whole.split(1)), rows, rows.replicated(rows.mesh, 2), (2, 2))[1]
        tensor([[0., 1.],
                [2., 3.]])
        """
        if len(values) != self.size:
            raise WorldError(f"redistribute was given {len(values)} values for {self.size} ranks: give one a rank, or None")
        for rank, value in enumerate(values):
            check_piece(rank, value, source, tuple(shape))
        plan = redistribution(source, target, tuple(shape), tuple(partial_gradient))
        move = _PieceMove(plan, self.size)
        given = [v for v in values if v is not None]
        moved = _MoveFunction.apply(move, *given) if any(v.requires_grad for v in given) else move.forward(given)
        results = iter(moved)
        return [next(results) if rank in plan.target.mesh.ranks else None for rank in range(self.size)]


class _SimulatedMove:
    """One move of the program, over lanes."""

    def __init__(self, move: Move, source_lanes: Lanes):
        self.plan, self.needs_grad = move.redistribution, move.needs_grad
        self.record = [record.Moved(move.redistribution, move.cause, move.edge)]
        shape = self.plan.shape
        self.there = prepare(self.plan.forward, shape, source_lanes)
        self.back = prepare(self.plan.backward, shape, move.lanes)
        self.takes = [self.there.lanes[r] for r in _representatives(move.lanes)]
        self.gives = [self.back.lanes[r] for r in _representatives(source_lanes)]

    def __call__(self, lanes: list[Tensor]) -> list[Tensor]:
        if self.needs_grad and torch.is_grad_enabled():
            return list(_MoveFunction.apply(self, *lanes))
        return self.forward(lanes)

    def forward(self, lanes: Sequence[Tensor]) -> list[Tensor]:
        if record._active:
            record.emit(self.record, lanes[0].dtype, "forward")
        return self.move_forward(lanes)

    def move_forward(self, lanes: Sequence[Tensor]) -> list[Tensor]:
        values = self.there(lanes)
        return [values[i] for i in self.takes]

    def backward(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        if record._active:
            record.emit(self.record, gradients[0].dtype, "backward")
        return self.move_backward(gradients)

    def move_backward(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        values = self.back(gradients)
        return [values[i] for i in self.gives]


class _SimulatedTogether:
    """Moves that share their collectives: one node of the autograd graph, whose backward waits for all gradients."""

    def __init__(self, moves: Sequence[Move], lanes: dict[str, Lanes]):
        self.parts = [_SimulatedMove(move, lanes[move.source]) for move in moves]
        self.record = [part.record[0] for part in self.parts]
        self.counts = [max(lanes[move.source]) + 1 for move in moves], [max(move.lanes) + 1 for move in moves]

    def __call__(self, *lanes: list[Tensor]) -> list[list[Tensor]]:
        flat = [tensor for each in lanes for tensor in each]
        if self.parts[0].needs_grad and torch.is_grad_enabled():
            return _split(_TogetherFunction.apply(self, *flat), self.counts[1])
        return _split(self.forward(flat), self.counts[1])

    def forward(self, flat: Sequence[Tensor]) -> list[Tensor]:
        if record._active:
            record.emit(self.record, flat[0].dtype, "forward")
        given = _split(flat, self.counts[0])
        return [v for part, lanes in zip(self.parts, given, strict=True) for v in part.move_forward(lanes)]

    def backward(self, flat: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of the members whose outputs have any."""
        given = _split(flat, self.counts[1])
        used = [any(g is not None for g in gradients) for gradients in given]
        if record._active:
            dtype = next(g.dtype for g in flat if g is not None)
            record.emit([r for r, is_used in zip(self.record, used, strict=True) if is_used], dtype, "backward")
        results: list[Tensor | None] = []
        for part, gradients, is_used, count in zip(self.parts, given, used, self.counts[0], strict=True):
            results += part.move_backward(gradients) if is_used else [None] * count
        return results


def _split(flat: Sequence[Any], counts: Sequence[int]) -> list[list[Any]]:
    each = iter(flat)
    return [[next(each) for _ in range(count)] for count in counts]


class _TogetherFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, together: _SimulatedTogether, *flat: Tensor) -> tuple[Tensor, ...]:
        ctx.together = together
        ctx.set_materialize_grads(False)
        results = tuple(_distinct(together.forward(flat), flat))
        ctx.shapes = [r.shape for r in results]
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        known = next((g for g in gradients if g is not None), None)
        if known is None:
            return (None,) * (1 + sum(ctx.together.counts[0]))
        filled: list[Tensor | None] = []
        for each in _split(list(zip(gradients, ctx.shapes, strict=True)), ctx.together.counts[1]):
            used = any(g is not None for g, _ in each)
            filled += [known.new_zeros(shape) if used and g is None else g for g, shape in each]
        return (None, *ctx.together.backward(filled))


class _PieceMove:
    """A redistribution over the pieces of all ranks, one after the other; those of ranks outside a mesh left out."""

    def __init__(self, plan: Redistribution, size: int):
        self.plan = plan
        self.record = [record.Moved(plan, "redistribute", "redistribute")]
        self.sources = [r for r in range(size) if r in plan.source.mesh.ranks]
        self.targets = [r for r in range(size) if r in plan.target.mesh.ranks]
        self.there = prepare(plan.forward, plan.shape, _positions(self.sources, size))
        self.back = prepare(plan.backward, plan.shape, _positions(self.targets, size))

    def forward(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        record.emit(self.record, pieces[0].dtype, "forward")
        values = self.there(pieces)
        return [values[self.there.lanes[r]] for r in self.targets]

    def backward(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        record.emit(self.record, gradients[0].dtype, "backward")
        values = self.back(gradients)
        return [values[self.back.lanes[r]] for r in self.sources]


def _positions(ranks: Sequence[int], size: int) -> Lanes:
    """For every rank its position in ``ranks``, -1 where it is not there."""
    position = {rank: i for i, rank in enumerate(ranks)}
    return tuple(position.get(rank, -1) for rank in range(size))


class _MoveFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, move: _SimulatedMove | _PieceMove, *lanes: Tensor) -> tuple[Tensor, ...]:
        ctx.move = move
        return tuple(_distinct(move.forward(lanes), lanes))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return (None, *ctx.move.backward(gradients))


class _EnterFunction(torch.autograd.Function):
    """Global tensor to the pieces of each lane; the gradient's pieces are put together again."""

    @staticmethod
    def forward(ctx: Any, pieces: list[tuple[slice, ...]], value: Tensor) -> tuple[Tensor, ...]:
        ctx.pieces, ctx.shape = pieces, value.shape
        return tuple(value[piece] for piece in pieces)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        whole = gradients[0].new_empty(ctx.shape)
        for piece, gradient in zip(ctx.pieces, gradients, strict=True):
            whole[piece] = gradient
        return None, whole


def enter(value: Tensor, layout: Layout, lanes: Lanes) -> list[Tensor]:
    """The piece of a global tensor that each lane holds, differentiably."""
    if max(lanes) == 0:
        return [value]
    slices = layout.slices(value.shape)
    pieces = [slices[r] for r in _representatives(lanes)]
    if value.requires_grad and torch.is_grad_enabled():
        return list(_EnterFunction.apply(pieces, value))
    return [value[piece] for piece in pieces]


def _representatives(lanes: Lanes) -> list[int]:
    """One rank of each lane."""
    first: dict[int, int] = {}
    for rank, own in enumerate(lanes):
        first.setdefault(own, rank)
    return [first[i] for i in range(len(first))]


def _distinct(values: list[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors, none of them twice and none of them an input: autograd forbids aliases."""
    seen = {id(t) for t in inputs}
    result = []
    for value in values:
        if id(value) in seen:
            value = value.view_as(value)
        seen.add(id(value))
        result.append(value)
    return result


def _bind(program: LocalProgram, keep: tuple[str, ...] | None) -> Callable[..., Any]:
    writer = SourceWriter("simulated", [i.name for i in program.inputs])
    dying = program.last_uses()
    for item in program.inputs:
        if max(program.lanes[item.name]) > 0:
            call = writer.constant("enter", lambda v, i=item: enter(v, i.layout, program.lanes[i.name]))
            writer.line(f"{item.name} = {call}({item.name})")
        else:
            writer.line(f"{item.name} = [{item.name}]")
    for instruction, dead in zip(program.instructions, dying, strict=True):
        if isinstance(instruction, Start):
            continue  # nothing travels here: the move itself does it all
        if isinstance(instruction, Together):
            writer.context(instruction.moves[0].autocast, instruction.moves[0].grad)
            together = writer.constant("together", _SimulatedTogether(instruction.moves, program.lanes))
            sources = ", ".join(move.source for move in instruction.moves)
            writer.line(f"{', '.join(instruction.outputs)} = {together}({sources})")
            writer.forget([name for name in dead if name not in (keep or ())])
            continue
        writer.context(instruction.autocast, instruction.grad)
        if isinstance(instruction, Move):
            move = writer.constant("move", _SimulatedMove(instruction, program.lanes[instruction.source]))
            writer.line(f"{instruction.output} = {move}({instruction.source})")
        else:
            _write_call(writer, instruction, program)
        writer.forget([name for name in dead if name not in (keep or ())])
    writer.context(None, True)
    if keep is not None:
        return writer.function(f"[{', '.join(keep)}]")
    outputs = [f"{o}[0]" if isinstance(o, str) else writer.constant("value", o.value) for o in program.outputs]
    updates = [f"{name}[0]" for _, name in program.updates]
    return writer.function(f"[{', '.join(outputs)}], [{', '.join(updates)}]")


def _write_call(writer: SourceWriter, call: Call, program: LocalProgram) -> None:
    """One comprehension over the lanes of the call; each input is read at the lane its own value has there."""
    ranks = _representatives(call.lanes)
    reads: dict[str, str] = {}  # text of the read -> loop variable
    columns: list[list[Any]] = []
    sources: list[str] = []

    def column(key: str, source: str, values: list[Any]) -> str:
        if key not in reads:
            reads[key] = f"i{len(reads)}"
            columns.append(values)
            sources.append(source)
        return reads[key]

    def read(ref_name: str) -> str:
        lanes = program.lanes[ref_name]
        if max(lanes) == 0:
            return f"{ref_name}[0]"
        index = [lanes[r] for r in ranks]
        return f"{ref_name}[{column('ref' + str(index), '', index)}]"

    def per_rank(leaf: PerRank) -> str:
        values = [leaf.of(r) for r in ranks]
        if all(v == values[0] for v in values):
            return writer.literal(values[0])
        return column(f"rank{id(leaf)}", "", values)

    arguments = writer.arguments(call.args, call.kwargs, read, per_rank)
    text = f"{writer.callable(call.function)}({arguments})"
    if not reads:
        assert len(ranks) == 1, call
        text = f"[{text}]"
    else:
        table = writer.constant("lanes", list(zip(*columns, strict=True)))
        text = f"[{text} for {', '.join(reads.values())}, in {table}]"
    if not call.sequence:
        writer.line(f"{call.outputs[0]} = {text}")
    else:
        writer.line(f"many = {text}")
        for position, name in enumerate(call.outputs):
            writer.line(f"{name} = [each[{position}] for each in many]")


def gather_lanes(values: list[Tensor], layout: Layout, shape: tuple[int, ...], lanes: Lanes) -> Tensor:
    """The global tensor that the lanes hold together, pending sums included."""
    steps = steps_between(layout, Layout.replicated(layout.mesh, layout.ndim), shape)
    return run_steps([values[i] for i in lanes], steps, shape)[0]
