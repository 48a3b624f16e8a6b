"""Price of doing things again: what a plan computes and sends a second time, in the backward, instead of keeping it.

What is done again is no business of layouts, and no search asks for it: it is read off the local program, as it runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from shardwright.cost.communication import CollectivePrice
from shardwright.partition.program import Call, KeepPiece, LocalProgram, Move, Together
from shardwright.plan.memory.first_rank import first_rank_program
from shardwright.plan.price_orders import steps_price
from shardwright.redistribute.planner import Options

if TYPE_CHECKING:
    from shardwright.cost.machine import Machine
    from shardwright.plan.plan import Plan
    from shardwright.plan.price import MovePrice, PlanPrice

PART = "recompute"


def with_again(plan: Plan, price: PlanPrice, machine: Machine) -> PlanPrice:
    """The price with all that the plan does again in the backward as a part of its own; the same where there is nothing.

    Args:
        price: of a step in which everything is kept.
    """
    if not plan.passes:
        return price
    links = machine.links(plan.mesh)
    program = first_rank_program(plan, Options(links), plan.passes)
    causes = {i.cause for i in program.instructions if isinstance(i, Call) and i.recompute}
    seconds = sum(price.operators[cause].forward for cause in causes if cause in price.operators)
    sent: list[CollectivePrice] = []
    stored = {move.value: move for move in price.moves if move.of_parameter}
    for move in _moves_again(program):
        size = move.itemsize("forward")
        steps = steps_price(move.redistribution.forward, move.redistribution.shape, size, Options(links, size))
        sent += steps
        own = stored.get(move.source)
        seconds += sum(step.seconds for step in steps) if own is None else _gather(own, steps, machine)
    if not seconds:
        return price
    parts = dict(price.parts)
    last = {name: parts.pop(name) for name in ("optimizer", "step") if name in parts}
    parts = {**parts, PART: seconds, **last}
    return replace(price, seconds=sum(parts.values()), parts=parts, again=tuple(sent))


def _moves_again(program: LocalProgram) -> Iterator[Move]:
    """The moves that are done again, and those that make whole again what was kept in pieces."""
    for instruction in program.instructions:
        if isinstance(instruction, KeepPiece):
            yield instruction.gather
        elif isinstance(instruction, (Move, Together)) and instruction.recompute:
            moves = instruction.moves if isinstance(instruction, Together) else (instruction,)
            yield from (move for move in moves if move.output not in program.kept)


def _gather(move: MovePrice, steps: Iterable[CollectivePrice], machine: Machine) -> float:
    """Seconds of a parameter's gather that do not hide, launches shared with others as they are the first time."""
    shared = move.launches[0] * (1 - move.share)
    return float(machine.exposed(max(0.0, sum(step.seconds for step in steps) - shared), 0.0))
