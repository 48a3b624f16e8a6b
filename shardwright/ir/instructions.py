"""Instructions: what a local program is made of, calls on local tensors and moves of values between layouts.

All of them answer the same questions, so that who reads a program seldom has to ask which instruction it is:

- ``reads`` and ``outputs``, local values by name; ``cause``, the graph node that it comes from;
- ``starts``, the moves that it begins, and ``ends``, the moves whose results are there after it;
- ``recompute``, whether its results are not kept for the backward pass but made again there.

Where each needs an answer of its own there is :class:`~shardwright.ir.visitor.InstructionVisitor`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from shardwright.base.operators import STATISTICS
from shardwright.base.torch_private import pytree
from shardwright.ir.layout import Layout
from shardwright.ir.operator import OpOverload, TensorMeta
from shardwright.ir.rank_groups import RankGroups
from shardwright.ir.redistribution import Redistribution
from shardwright.ir.step import Step, any_communicates

F = TypeVar("F", bound=Callable[..., Any])
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
    lanes: RankGroups
    autocast: Autocast = None
    grad: bool = True
    recompute: bool = False

    @property
    def reads(self) -> tuple[str, ...]:
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return tuple(leaf.name for leaf in leaves if isinstance(leaf, Ref))

    @property
    def starts(self) -> tuple[Move, ...]:
        return ()

    @property
    def ends(self) -> tuple[Move, ...]:
        return ()

    @property
    def written(self) -> list[str]:
        """Names of the tensors that it changes."""
        if not isinstance(self.function, OpOverload):
            positions = getattr(self.function, "writes", ())
            return [self.args[position].name for position in positions]
        found = []
        for position, argument in enumerate(self.function._schema.arguments):
            value = self.args[position] if position < len(self.args) else self.kwargs.get(argument.name)
            # their schema does not say that norms write to running statistics
            is_written = argument.name in STATISTICS or (argument.alias_info is not None and argument.alias_info.is_write)
            if is_written and isinstance(value, Ref):
                found.append(value.name)
        return found


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
    lanes: RankGroups
    needs_grad: bool
    grad: bool = True
    autocast: Autocast = None
    started: bool = False  # a StartMoves before it begins it
    recompute: bool = False  # its result is not kept for the backward pass but moved again there
    copy: int | None = None  # the copy whose tensor it moves, where operators run in copies
    wire: Wire | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.source,)

    @property
    def outputs(self) -> tuple[str, ...]:
        return (self.output,)

    def steps(self, phase: str) -> tuple[Step, ...]:
        """Returns the steps of a phase of a training step, ``forward`` or ``backward``."""
        return self.redistribution.backward if phase == "backward" else self.redistribution.forward

    def dtypes(self, phase: str) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
        """Returns the dtypes of what is handed in, as it travels, and of what is handed on, ``forward`` or ``backward``."""
        result = self.dtype if self.wire is None else self.wire.result
        travels = self.dtype if self.wire is None else self.wire.of(phase, self.dtype)[0]
        return (result, travels, self.dtype) if phase == "backward" else (self.dtype, travels, result)

    @property
    def starts(self) -> tuple[Move, ...]:
        return ()

    @property
    def ends(self) -> tuple[Move, ...]:
        return (self,)

    @property
    def communicates(self) -> bool:
        """Whether ranks send each other anything when the move goes forward."""
        return any_communicates(self.redistribution.forward)

    @property
    def communicates_backward(self) -> bool:
        """Whether ranks send each other anything of its gradient."""
        return self.needs_grad and any_communicates(self.redistribution.backward)

    def itemsize(self, phase: str) -> int:
        """Returns the bytes an element as it travels, ``forward`` or ``backward``."""
        return (self.dtype if self.wire is None else self.wire.of(phase, self.dtype)[0]).itemsize


@dataclass(frozen=True)
class StartMoves:
    """Begins moves, whose own instructions end them: they travel meanwhile. In the backward pass it is the other way round.

    Several moves share their collectives: in the backward pass these begin when the last of the gradients is there.
    """

    moves: tuple[Move, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(move.source for move in self.moves)

    @property
    def outputs(self) -> tuple[str, ...]:
        return ()

    @property
    def starts(self) -> tuple[Move, ...]:
        return self.moves

    @property
    def ends(self) -> tuple[Move, ...]:
        return ()

    @property
    def recompute(self) -> bool:
        return False  # it has no results: those of its moves are there when they end

    @property
    def cause(self) -> str:
        return self.moves[0].cause


@dataclass(frozen=True)
class FusedMoves:
    """Moves of one kind over the same axes that share their collectives, forward and backward, and again."""

    moves: tuple[Move, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(move.source for move in self.moves)

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(move.output for move in self.moves)

    @property
    def starts(self) -> tuple[Move, ...]:
        return ()

    @property
    def ends(self) -> tuple[Move, ...]:
        return self.moves

    @property
    def recompute(self) -> bool:
        return self.moves[0].recompute

    @property
    def cause(self) -> str:
        return self.moves[0].cause


@dataclass(frozen=True)
class KeepSliceForBackward:
    """From here on a value is kept for the backward pass as the piece that ``cut`` makes; ``gather`` makes it whole again."""

    cut: Move
    gather: Move

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.cut.source,)

    @property
    def outputs(self) -> tuple[str, ...]:
        return ()

    @property
    def starts(self) -> tuple[Move, ...]:
        return ()

    @property
    def ends(self) -> tuple[Move, ...]:
        return ()

    @property
    def recompute(self) -> bool:
        return False  # it has no results

    @property
    def cause(self) -> str:
        return self.cut.cause


Instruction = Call | Move | StartMoves | FusedMoves | KeepSliceForBackward


def resolve(argument: Any, rank: int) -> Any:
    """Returns the argument with every :class:`PerRank` replaced by its value on ``rank``."""
    return pytree.tree_map(lambda leaf: leaf.of(rank) if isinstance(leaf, PerRank) else leaf, argument)


@dataclass(frozen=True)
class Ref:
    """A value of the local program, by name."""

    name: str

    def __repr__(self) -> str:
        return self.name


def writes(*positions: int) -> Callable[[F], F]:
    """Says of a local function which of its positional arguments it changes in place.

    >>> @writes(0)
    ... def clear(value):
    ...     return value.zero_()
    >>> clear.writes
    (0,)
    """

    def mark(function: F) -> F:
        function.writes = positions  # type: ignore[attr-defined]
        return function

    return mark


class PerRank:
    """An argument that each rank computes for itself, such as a local size or an offset.

    Args:
        of: the value on a given rank.
    """

    def __init__(self, of: Callable[[int], Any]):
        self.of = of


def is_call(instruction: Instruction) -> bool:
    """Returns whether an instruction computes something, rather than move it."""
    return isinstance(instruction, Call)


def calls_of(instructions: Iterable[Instruction]) -> list[Call]:
    """Returns the local calls, in order."""
    return [i for i in instructions if isinstance(i, Call)]


def moves_alone(instructions: Iterable[Instruction]) -> list[Move]:
    """Returns the moves that are instructions of their own, in order: not those that share their collectives."""
    return [i for i in instructions if isinstance(i, Move)]
