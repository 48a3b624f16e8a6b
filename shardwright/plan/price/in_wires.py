"""Prices moves that mixed precision has travel in other dtypes than their value's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shardwright.cost.communication import CollectivePrice
from shardwright.ir.instructions import Move
from shardwright.ir.layout import Layout
from shardwright.ir.machine import Machine
from shardwright.ir.plan import Plan
from shardwright.partition.local_program import first_rank_program
from shardwright.plan.price.own_orders import steps_price
from shardwright.plan.price.values import MovePrice, PlanPrice
from shardwright.redistribute.links import Links, machine_links
from shardwright.redistribute.planner import Options


def in_wires(plan: Plan, price: PlanPrice, machine: Machine) -> PlanPrice:
    """Replaces the price of each move by that in the dtypes in which it travels.

    Args:
        plan: the plan.
        price: of a step in which every value travels in its own dtype.
        machine: the machine.
    """
    if not any(each.name == "wires" for each in plan.passes):
        return price
    wired = {_key(move): move for move in first_rank_program(plan).moves if move.wire is not None}
    if not wired:
        return price
    links = machine_links(machine, plan.mesh)
    shapes = plan.graph.metas
    moves, parts = [], dict(price.parts)
    for one in price.moves:
        move = wired.get((one.value, one.target.normal(shapes[one.value].shape)))
        if move is not None:
            wire = _in_wire(one, move, links)
            parts["parameters" if one.of_parameter else "redistribution"] += wire.seconds - one.seconds
            one = wire
        moves.append(one)
    return replace(price, moves=tuple(moves), parts=parts, seconds=sum(parts.values()))


def _key(move: Move) -> tuple[str, Layout]:
    return move.edge.partition(" -> ")[0], move.redistribution.target


def _in_wire(price: MovePrice, move: Move, links: Links) -> MovePrice:
    """Prices one move by the steps and dtypes that it has in the program."""

    def steps(phase: str, before: Sequence[CollectivePrice]) -> tuple[CollectivePrice, ...]:
        size = move.itemsize(phase)
        return steps_price(move.steps(phase), move.redistribution.shape, size, Options(links, size)) if before else ()

    forward, backward = steps("forward", price.forward), steps("backward", price.backward)
    before = sum(step.seconds for step in (*price.forward, *price.backward))
    now = sum(step.seconds for step in (*forward, *backward))
    seconds = price.seconds * now / before if before else price.seconds
    return replace(price, forward=forward, backward=backward, seconds=seconds)
