"""The local program: what one rank runs.

A list of calls on local tensors and of moves (redistributions). It names collectives by axes, never by process groups,
so the same program runs in every world. ``lanes`` says, for every value, which ranks hold the same tensor: two ranks
in one lane compute the same thing. A distributed rank ignores it, the simulated world computes each lane once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from shardwright.capture.torch_private import pytree
from shardwright.layout import Layout
from shardwright.redistribute.steps import Redistribution
from shardwright.rules.lowering import PerRank, Ref
from shardwright.rules.norm import update_running
from shardwright.rules.operator import OpOverload, TensorMeta, operator_name

Lanes = tuple[int, ...]
Autocast = tuple[Any, ...] | None


@dataclass(frozen=True)
class ProgramInput:
    """A tensor handed to the program, already laid out as ``layout``."""

    name: str
    kind: str
    target: str | int
    meta: TensorMeta
    layout: Layout


@dataclass(frozen=True)
class Call:
    """A local call. ``cause`` is the name of the graph node it comes from; with ``recompute`` its results, and what it saves
    within, are not kept for the backward pass but computed again there."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[str, ...]
    sequence: bool
    cause: str
    lanes: Lanes
    autocast: Autocast = None
    grad: bool = True
    recompute: bool = False


    @property
    def written(self) -> list[str]:
        """Names of the tensors that it changes."""
        if self.function is update_running:
            return [argument.name for argument in self.args[:2]]
        if not isinstance(self.function, OpOverload):
            return []
        found = []
        for position, argument in enumerate(self.function._schema.arguments):
            value = self.args[position] if position < len(self.args) else self.kwargs.get(argument.name)
            is_written = argument.name in _WRITTEN or (argument.alias_info is not None and argument.alias_info.is_write)
            if is_written and isinstance(value, Ref):
                found.append(value.name)
        return found


# Arguments that operators write to though their schema does not say so.
_WRITTEN = frozenset({"running_mean", "running_var"})


@dataclass(frozen=True)
class Wire:
    """The dtypes in which a move travels, where they are not the value's own.

    Args:
        forward: what the value is cast to before it moves; ``result``: after it.
        backward: what the gradient is cast to before it moves back. The source gets it in its own dtype.
    """

    forward: torch.dtype
    result: torch.dtype
    backward: torch.dtype

    def of(self, phase: str, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        """What a value of ``dtype``, or its gradient, is cast to before it moves, and what after, in a phase of a step."""
        return (self.backward, dtype) if phase == "backward" else (self.forward, self.result)


@dataclass(frozen=True)
class Move:
    """A redistribution of one value; the source layout's pending sums and the gradient's are reduced on the way."""

    source: str
    output: str
    redistribution: Redistribution
    dtype: torch.dtype
    cause: str
    edge: str
    lanes: Lanes
    needs_grad: bool
    grad: bool = True
    autocast: Autocast = None
    started: bool = False  # a Start before it begins it
    recompute: bool = False  # its result is not kept for the backward pass but moved again there
    copy: int | None = None  # the copy whose tensor it moves, where operators run in copies
    wire: Wire | None = None

    @property
    def outputs(self) -> tuple[str, ...]:
        return (self.output,)

    def itemsize(self, phase: str) -> int:
        """Bytes an element as it travels, ``forward`` or ``backward``."""
        return (self.dtype if self.wire is None else self.wire.of(phase, self.dtype)[0]).itemsize


@dataclass(frozen=True)
class Start:
    """Begins moves, whose own instructions end them: they travel meanwhile. In the backward pass it is the other way round.

    Several moves share their collectives: in the backward pass these begin when the last of the gradients is there.
    """

    moves: tuple[Move, ...]

    @property
    def outputs(self) -> tuple[str, ...]:
        return ()

    @property
    def cause(self) -> str:
        return self.moves[0].cause


@dataclass(frozen=True)
class Together:
    """Moves of one kind over the same axes that share their collectives, forward and backward, and again."""

    moves: tuple[Move, ...]

    @property
    def recompute(self) -> bool:
        return self.moves[0].recompute

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(move.output for move in self.moves)

    @property
    def cause(self) -> str:
        return self.moves[0].cause


@dataclass(frozen=True)
class KeepPiece:
    """From here on a value is kept for the backward pass as the piece that ``cut`` makes; ``gather`` makes it whole again."""

    cut: Move
    gather: Move

    @property
    def outputs(self) -> tuple[str, ...]:
        return ()

    @property
    def cause(self) -> str:
        return self.cut.cause


Instruction = Call | Move | Start | Together | KeepPiece


@dataclass(frozen=True)
class LocalProgram:
    """What one rank runs.

    ``outputs`` are names of values held whole by every rank, or constants; ``places`` names the local value that holds
    each value of the graph, as it comes out of its operator. ``kept`` names results of instructions with ``recompute`` that
    are kept nevertheless: those of a whole that is computed again. ``copies`` gives the copy that the calls of a node belong
    to, where operators run in copies.
    """

    world_size: int
    inputs: tuple[ProgramInput, ...]
    instructions: tuple[Instruction, ...]
    outputs: tuple[Any, ...]
    updates: tuple[tuple[str, str], ...]
    lanes: dict[str, Lanes]
    layouts: dict[str, Layout]
    places: dict[str, str] = field(default_factory=dict)
    kept: frozenset[str] = frozenset()
    copies: dict[str, int] = field(default_factory=dict)

    def text(self, rank: int = 0) -> str:
        """The program of one rank as readable code."""
        names = ", ".join(i.name for i in self.inputs)
        lines = [f"def rank_{rank}({names}):"]
        for i in self.inputs:
            local = list(i.layout.local_shape(i.meta.shape, rank))
            lines.append(f"    # {i.name}: {i.kind} {i.target} {local} of {list(i.meta.shape)}, {i.layout.short() or 'scalar'}")
        for instruction in self.instructions:
            lines.append(f"    {_instruction_text(instruction, rank)}{self._remark(instruction)}")
        lines.append(f"    return {', '.join(str(o) for o in self.outputs)}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text(0)

    def _remark(self, instruction: Instruction) -> str:
        if isinstance(instruction, (Start, KeepPiece)) or not instruction.recompute:
            return ""
        if self.kept.issuperset(instruction.outputs):
            return ", kept; what it saves within is computed again"
        return ", computed again in the backward"

    @property
    def moves(self) -> list[Move]:
        """Every move, in order."""
        found: list[Move] = []
        for instruction in self.instructions:
            if isinstance(instruction, Move):
                found.append(instruction)
            elif isinstance(instruction, Together):
                found += instruction.moves
        return found

    @property
    def together(self) -> list[tuple[Move, ...]]:
        """The moves that share their collectives."""
        return [i.moves for i in self.instructions if isinstance(i, (Start, Together)) and len(i.moves) > 1]

    def refs_of(self, instruction: Instruction) -> tuple[str, ...]:
        if isinstance(instruction, Move):
            return (instruction.source,)
        if isinstance(instruction, KeepPiece):
            return (instruction.cut.source,)
        if isinstance(instruction, (Start, Together)):
            return tuple(move.source for move in instruction.moves)
        leaves = pytree.tree_leaves((instruction.args, instruction.kwargs))
        return tuple(leaf.name for leaf in leaves if isinstance(leaf, Ref))

    def last_uses(self) -> list[tuple[str, ...]]:
        """For every instruction, the values that nothing reads after it."""
        kept = {o for o in self.outputs if isinstance(o, str)} | {v for _, v in self.updates}
        seen: set[str] = set(kept)
        result: list[tuple[str, ...]] = []
        for instruction in reversed(self.instructions):
            dying = []
            for name in (*self.refs_of(instruction), *instruction.outputs):
                if name not in seen:
                    seen.add(name)
                    dying.append(name)
            result.append(tuple(dying))
        return result[::-1]


def resolve(argument: Any, rank: int) -> Any:
    """The argument with every :class:`PerRank` replaced by its value on ``rank``."""
    return pytree.tree_map(lambda leaf: leaf.of(rank) if isinstance(leaf, PerRank) else leaf, argument)


def argument_text(argument: Any) -> str:
    if isinstance(argument, (list, tuple)):
        inner = ", ".join(argument_text(a) for a in argument)
        return f"[{inner}]" if isinstance(argument, list) else f"({inner}{',' if len(argument) == 1 else ''})"
    if isinstance(argument, slice):
        return f"slice({argument.start}, {argument.stop})"
    return repr(argument)


def _instruction_text(instruction: Instruction, rank: int) -> str:
    if isinstance(instruction, Start):
        edges = "; ".join(m.edge for m in instruction.moves)
        return f"start({', '.join(m.output for m in instruction.moves)})  # {edges}"
    if isinstance(instruction, KeepPiece):
        return f"keep_piece({instruction.cut.source}, {str(instruction.cut.redistribution)!r})  # {instruction.cause}"
    if isinstance(instruction, Together):
        names, sources = ", ".join(instruction.outputs), ", ".join(m.source for m in instruction.moves)
        edges = "; ".join(m.edge for m in instruction.moves)
        what = f"{str(instruction.moves[0].redistribution)!r}{_wire_text(instruction.moves[0])}"
        return f"{names} = move_together({sources}, {what})  # {edges}"
    if isinstance(instruction, Move):
        what = f"{str(instruction.redistribution)!r}{_wire_text(instruction)}"
        return f"{instruction.output} = move({instruction.source}, {what})  # {instruction.edge}"
    args, kwargs = resolve((instruction.args, instruction.kwargs), rank)
    parts = [*(argument_text(a) for a in args), *(f"{k}={argument_text(v)}" for k, v in kwargs.items())]
    name = operator_name(instruction.function)
    return f"{', '.join(instruction.outputs)} = {name}({', '.join(parts)})  # {instruction.cause}"


def _wire_text(move: Move) -> str:
    if move.wire is None:
        return ""
    names = [str(dtype).removeprefix("torch.") for dtype in (move.wire.forward, move.wire.result, move.wire.backward)]
    return f", '{names[0]} -> {names[1]} | {names[2]}'"
