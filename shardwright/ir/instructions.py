"""Instructions of a local program: calls on local tensors, and moves of values between layouts.

All of them have the same attributes, so that readers of a program seldom ask for the type of an instruction:

- ``reads`` and ``outputs``, names of local values; ``cause``, the graph node that the instruction comes from;
- ``starts``, the moves that it starts, and ``ends``, the moves whose results exist after it;
- ``recompute``, whether its results are computed again in the backward pass instead of kept for it.

Code that differs per type uses :class:`~shardwright.ir.visitor.InstructionVisitor`.
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
    """One tensor that the program receives, already laid out as ``layout``."""

    name: str
    kind: str
    target: str | int
    meta: TensorMeta
    layout: Layout


@dataclass(frozen=True)
class Call:
    """One local call.

    ``cause`` is the name of the graph node it comes from. With ``recompute`` its results, and what it saves for the
    backward pass, are computed again there instead of kept.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[str, ...]
    sequence: bool
    cause: str
    rank_groups: RankGroups
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
        """Names of the tensors that it changes in place."""
        if not isinstance(self.function, OpOverload):
            positions = getattr(self.function, "writes", ())
            return [self.args[position].name for position in positions]
        found = []
        for position, argument in enumerate(self.function._schema.arguments):
            value = self.args[position] if position < len(self.args) else self.kwargs.get(argument.name)
            # the schema of norms does not show that they write to running statistics
            is_written = argument.name in STATISTICS or (argument.alias_info is not None and argument.alias_info.is_write)
            if is_written and isinstance(value, Ref):
                found.append(value.name)
        return found


@dataclass(frozen=True)
class Wire:
    """Dtypes in which a move travels, where they differ from the value's dtype.

    Args:
        forward: dtype that the value is cast to before it moves; ``result``: dtype after it.
        backward: dtype that the gradient is cast to before it moves back. The source gets it in its own dtype.
    """

    forward: torch.dtype
    result: torch.dtype
    backward: torch.dtype

    def of(self, phase: str, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        """Returns the dtype in which a value of ``dtype`` travels, and its dtype after.

        In the backward phase the value is a gradient.
        """
        return (self.backward, dtype) if phase == "backward" else (self.forward, self.result)


@dataclass(frozen=True)
class Move:
    """One redistribution of one value. It reduces the source layout's pending sums, and on the way back the gradient's."""

    source: str
    output: str
    redistribution: Redistribution
    dtype: torch.dtype
    cause: str
    edge: str
    rank_groups: RankGroups
    needs_grad: bool
    grad: bool = True
    autocast: Autocast = None
    started: bool = False  # a StartMoves before it starts it
    recompute: bool = False  # its result is moved again in the backward pass instead of kept for it
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
        """Returns the dtypes before and after the move, in the phase ``forward`` or ``backward``."""
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
        """True if ranks send each other anything when the move goes forward."""
        return any_communicates(self.redistribution.forward)

    @property
    def communicates_backward(self) -> bool:
        """True if ranks send each other anything of its gradient."""
        return self.needs_grad and any_communicates(self.redistribution.backward)

    def itemsize(self, phase: str) -> int:
        """Returns the bytes per element as it travels, ``forward`` or ``backward``."""
        return (self.dtype if self.wire is None else self.wire.of(phase, self.dtype)[0]).itemsize


@dataclass(frozen=True)
class StartMoves:
    """Starts moves that their own instructions end. They travel meanwhile; in the backward pass the roles swap.

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
        return False  # it has no results; its moves have theirs when they end

    @property
    def cause(self) -> str:
        return self.moves[0].cause


@dataclass(frozen=True)
class FusedMoves:
    """Moves of one kind over the same axes that share their collectives. They do so in the backward pass too."""

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
    """Keeps, for the backward pass, only the piece of a value that ``cut`` makes. There, ``gather`` makes it whole again."""

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
    """Marks a local function with the positions of the arguments that it changes in place.

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
    """An argument that each rank computes for itself, such as a local size or offset.

    Args:
        of: the value on a given rank.
    """

    def __init__(self, of: Callable[[int], Any]):
        self.of = of


def is_call(instruction: Instruction) -> bool:
    """Tells whether an instruction computes something instead of moving it."""
    return isinstance(instruction, Call)


def calls_of(instructions: Iterable[Instruction]) -> list[Call]:
    """Lists the local calls, in order."""
    return [i for i in instructions if isinstance(i, Call)]


def moves_alone(instructions: Iterable[Instruction]) -> list[Move]:
    """Lists the moves that do not share their collectives, in order."""
    return [i for i in instructions if isinstance(i, Move)]
