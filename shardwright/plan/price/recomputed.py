"""Prices what a plan computes and sends a second time, in the backward, instead of keeping it.

Recomputation does not depend on layouts, and no search asks for it: it is read from the local program, as it runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from shardwright.cost.communication import CollectivePrice
from shardwright.cost.saved import NOTHING, saved_by
from shardwright.ir.instructions import Call, FusedMoves, KeepSliceForBackward, Move, StartMoves
from shardwright.ir.program import LocalProgram
from shardwright.ir.visitor import InstructionVisitor
from shardwright.partition.local_program import first_rank_program
from shardwright.plan.price.own_orders import steps_price
from shardwright.redistribute.links import machine_links
from shardwright.redistribute.planner import Options
from shardwright.rules.traits import traits_of

if TYPE_CHECKING:
    from shardwright.ir.machine import Machine
    from shardwright.ir.plan import Plan
    from shardwright.plan.price.values import MovePrice, PlanPrice

PART = "recompute"


def with_again(plan: Plan, price: PlanPrice, machine: Machine) -> PlanPrice:
    """Adds to a price, as a part of its own, all that the backward repeats.

    Args:
        plan: the plan.
        price: of a step in which everything is kept.
        machine: the machine.
    """
    if not plan.passes:
        return price
    links = machine_links(machine, plan.mesh)
    again = _Again(plan, first_rank_program(plan), machine.device)
    again.find()
    seconds = sum(price.operators[cause].forward for cause in again.nodes if cause in price.operators)
    sent: list[CollectivePrice] = []
    stored = {move.value: move for move in price.moves if move.of_parameter}
    for move in again.moves:
        size = move.itemsize("forward")
        steps = steps_price(move.redistribution.forward, move.redistribution.shape, size, Options(links, size))
        sent += steps
        own = stored.get(move.source)
        seconds += sum(step.seconds for step in steps) if own is None else _gather(own, steps, machine)
    if not seconds:
        return price
    parts: dict[str, float] = {}
    for name, of_part in price.parts.items():
        if name == "optimizer":  # which comes after
            parts[PART] = seconds
        parts[name] = of_part
    return replace(price, seconds=sum(parts.values()), parts=parts, again=tuple(sent))


class _Again(InstructionVisitor[None]):
    """Finds the operators and redistributions of a program that are repeated: those that the backward needs.

    The last operators before a kept value may be marked, and yet save nothing for the backward, as a sum of two tensors does;
    those are not repeated. ``nodes`` and ``moves`` are those that are.
    """

    def __init__(self, plan: Plan, program: LocalProgram, device: str):
        self.program, self.device = program, device
        self.graph_nodes = {node.name: node for node in plan.graph.nodes}
        self.needs_grad = plan.graph.needs_grad
        self.parameters = {i.name for i in program.inputs if i.kind == "parameter"}
        self.wanted: set[str] = set()  # local values
        self.nodes: set[str] = set()
        self.moves: list[Move] = []

    def find(self) -> None:
        for instruction in reversed(self.program.instructions):
            self.visit(instruction)

    def move(self, move: Move) -> None:
        self._moves(move)

    def fused_moves(self, fused: FusedMoves) -> None:
        self._moves(fused)

    def start_moves(self, start: StartMoves) -> None:
        """Does nothing, as a move is repeated where its result is needed."""

    def keep_slice(self, keep: KeepSliceForBackward) -> None:
        if keep.cut.source in self.wanted:
            self.moves.append(keep.gather)

    def _moves(self, instruction: Move | FusedMoves) -> None:
        """Records moves that share collectives as one; a gather goes ahead of everything that might need it."""
        if not instruction.recompute:
            return
        moves = instruction.ends
        if any(self._is_wanted(move.output) or move.source in self.parameters for move in moves):
            self.moves += moves
            self.wanted.update(move.source for move in moves)

    def _is_wanted(self, value: str) -> bool:
        """Tells whether the backward needs a value that is not there any more."""
        return value in self.wanted and value not in self.program.kept

    def call(self, call: Call) -> None:
        node, refs = self.graph_nodes.get(call.cause), call.reads
        saved = NOTHING
        if node is not None and node.grad:
            needs_grad = tuple(value in self.needs_grad for value in node.inputs)
            saved = saved_by(node.op, needs_grad, self.device, node.autocast)
        if node is not None and len(refs) == len(node.inputs):
            self.wanted.update(refs[slot] for slot in saved.inputs)
        elif (
            saved.inputs and not traits_of(call.function).linear
        ):  # the operator is several calls, and this one may save its inputs
            self.wanted.update(refs)
        results = saved.outputs and not self.program.kept.issuperset(call.outputs)
        if call.recompute and (results or saved.extra or any(map(self._is_wanted, call.outputs))):
            self.nodes.add(call.cause)
            self.wanted.update(refs)


def _gather(move: MovePrice, steps: Iterable[CollectivePrice], machine: Machine) -> float:
    """Computes the seconds of a parameter's gather that do not hide. Launches are shared as the first time."""
    shared = move.launches[0] * (1 - move.share)
    return float(machine.exposed(max(0.0, sum(step.seconds for step in steps) - shared), 0.0))
