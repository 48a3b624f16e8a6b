"""Prices of a plan's operators, moves and parameters, and their sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from shardwright.cost.communication import CollectivePrice
from shardwright.ir.layout import Layout
from shardwright.ir.machine import Machine


@dataclass(frozen=True)
class OperatorPrice:
    """Seconds of one operator, of the busiest rank, and the bytes that it keeps for the backward.

    ``collectives``: seconds of those that the operator runs itself, which are ``own``, forward and backward.
    """

    forward: float
    backward: float
    collectives: float
    kept: float
    own: tuple[tuple[CollectivePrice, ...], tuple[CollectivePrice, ...]] = ((), ())

    @property
    def bytes(self) -> float:
        """Bytes that the busiest rank sends within the operator, forward and backward."""
        return sum(step.bytes for phase in self.own for step in phase)

    @property
    def seconds(self) -> float:
        return self.forward + self.backward + self.collectives


@dataclass(frozen=True)
class MovePrice:
    """One redistribution: from a value (or from its shared reading) to those who read it.

    ``readers`` are names of nodes, ``output`` where the program returns it. ``of_parameter``: a parameter's gather and the
    reduction of its gradient; then ``seconds`` are those that do not hide behind computing.
    """

    value: str
    readers: tuple[str, ...]
    source: Layout
    target: Layout
    gradient: tuple[str, ...]
    forward: tuple[CollectivePrice, ...]
    backward: tuple[CollectivePrice, ...]
    of_parameter: bool
    seconds: float
    # of a parameter's forward and backward collectives, the part shared with others of the same kind over the same axes;
    # the share of it that ``seconds`` counts; and bytes of the larger end
    launches: tuple[float, float] = (0.0, 0.0)
    share: float = 0.0
    size: float = 0.0

    @property
    def shared(self) -> float:
        """Seconds that a parameter saves as its collectives are also those of others."""
        return sum(self.launches) * (1 - self.share)

    @property
    def is_hidden(self) -> bool:
        """Tells whether some of it runs behind computing."""
        alone = sum(step.seconds for step in (*self.forward, *self.backward))
        return self.of_parameter and self.seconds < (alone - self.shared) * (1 - 1e-9)

    @property
    def bytes(self) -> float:
        """Bytes that the busiest rank sends, forward and backward."""
        return sum(step.bytes for step in (*self.forward, *self.backward))


@dataclass(frozen=True)
class ParameterPrice:
    """A stored parameter: its layout, a rank's bytes of it, bytes with gradient and optimizer, optimizer's seconds."""

    layout: Layout
    bytes: float
    state_bytes: float
    seconds: float


@dataclass(frozen=True)
class PlanPrice:
    """Price of a step of a plan.

    Args:
        seconds: the whole; the sum of ``parts``.
        parts: seconds of ``forward``, ``backward``, ``redistribution``, ``parameters`` (gathers and gradient reductions that
            do not hide), ``recompute`` (what is computed and sent a second time in the backward, where a plan does that),
            ``optimizer`` and ``step`` (what a step takes besides).
        operators, moves, parameters: by node, in order, and by parameter name.
        unshared: seconds, within ``parameters``, of parameters' collectives that find fewer others to share a launch with
            than there are parameters. A search, which prices one parameter at a time, assumes that all share.
        again: collectives that ``recompute`` repeats.
    """

    machine: Machine
    seconds: float
    parts: dict[str, float]
    operators: dict[str, OperatorPrice]
    moves: tuple[MovePrice, ...]
    parameters: dict[str, ParameterPrice]
    unshared: float = 0.0
    again: tuple[CollectivePrice, ...] = ()
    _by_reader: dict[str, list[MovePrice]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def bytes(self) -> float:
        """Bytes that the busiest rank sends in a step."""
        once = sum(move.bytes for move in self.moves) + sum(price.bytes for price in self.operators.values())
        return once + sum(step.bytes for step in self.again)

    def moves_to(self, node: str) -> Sequence[MovePrice]:
        """Returns the redistributions that a node pays for."""
        if not self._by_reader:
            for move in self.moves:
                for reader in move.readers:
                    self._by_reader.setdefault(reader, []).append(move)
        return self._by_reader.get(node, ())
