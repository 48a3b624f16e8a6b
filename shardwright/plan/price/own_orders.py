"""Prices moves where axes split a dim in another order than the mesh's.

Tables of prices have no such layouts: they assume the axes of every dim in the mesh's order, and find permutes where there
are none, and none where there are some. There a finished plan is priced by its own redistributions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from shardwright.cost.communication import CollectivePrice
from shardwright.ir.graph import Node
from shardwright.ir.layout import Layout
from shardwright.ir.machine import Machine
from shardwright.ir.step import Step
from shardwright.redistribute.links import machine_links
from shardwright.redistribute.planner import Options
from shardwright.redistribute.steps import redistribution
from shardwright.redistribute.volume import sent_elements

if TYPE_CHECKING:
    from shardwright.ir.plan import Plan
    from shardwright.plan.price.values import MovePrice, PlanPrice


@lru_cache(maxsize=65536)
def has_own_order(layout: Layout) -> bool:
    """Tells whether some dim's axes are in another order than the mesh's."""
    return any(axes != layout.mesh.ordered(axes) for axes in layout.bound)


def in_true_orders(plan: Plan, price: PlanPrice, machine: Machine, of: type[MovePrice]) -> PlanPrice:
    """Replaces the prices at layouts with another order of axes by those of the real moves.

    Args:
        plan: the plan.
        price: its price by tables.
        machine: the machine.
        of: the class of prices of redistributions.
    """
    orders = _Orders(plan, machine, of)
    if not orders.values and not orders.nodes:
        return price
    operators = dict(price.operators)
    for node in orders.nodes:
        if node.name in operators:
            own = orders.own(node)
            seconds = sum(step.seconds for phase in own for step in phase)
            operators[node.name] = replace(operators[node.name], collectives=seconds, own=own)
    kept = [move for move in price.moves if move.value not in orders.values]
    moves = (*kept, *orders.moves())
    parts = {
        **price.parts,
        "redistribution": sum(m.seconds for m in moves if not m.of_parameter) + sum(p.collectives for p in operators.values()),
        "parameters": sum(m.seconds for m in moves if m.of_parameter),
    }
    return replace(price, seconds=sum(parts.values()), parts=parts, operators=operators, moves=moves)


def steps_price(
    steps: tuple[Step, ...], shape: tuple[int, ...], itemsize: int, options: Options
) -> tuple[CollectivePrice, ...]:
    """Prices the collectives of a redistribution; local slices are left out.

    Args:
        steps: its steps.
        shape: global shape.
        itemsize: bytes per element.
        options: which steps redistributions may use and their costs.
    """
    return tuple(
        CollectivePrice(
            step.kind, step.axes, sent_elements(step, shape) * itemsize, options.links.seconds(step, shape, itemsize)
        )
        for step in steps
        if step.communicates
    )  # fmt: skip


class _Orders:
    """Finds where a plan has layouts of another order, and prices that.

    ``values``: those that are made or read in one; ``nodes``: those that do their sums into one.
    """

    def __init__(self, plan: Plan, machine: Machine, of: type[MovePrice]):
        self.plan, self.machine, self.of = plan, machine, of
        self.graph, self.links = plan.graph, machine_links(machine, plan.mesh)
        self.made = dict(plan.input_layouts)
        self.values: set[str] = set()
        self.nodes: list[Node] = []
        for node in self.graph.nodes:
            choice = plan.choices[node.name]
            self.made.update(zip(node.outputs, choice.outputs))
            self.values.update(v for v, layout in zip(node.inputs, choice.inputs) if has_own_order(layout))
            if any(map(has_own_order, choice.outputs)):
                self.nodes.append(node)
        self.values.update(value for value, layout in self.made.items() if has_own_order(layout))

    def own(self, node: Node) -> tuple[tuple[CollectivePrice, ...], tuple[CollectivePrice, ...]]:
        """Returns the collectives by which an operator does its sums, forward and backward."""
        choice, found = self.plan.choices[node.name], ([], [])  # type: ignore[var-annotated]
        for value, before, after in zip(node.outputs, choice.computed, choice.outputs):
            for phase, steps in zip(found, self._steps(value, before, after, ())):
                phase += steps
        return tuple(found[0]), tuple(found[1])

    def moves(self) -> Iterator[MovePrice]:
        """Yields the redistributions of all values with another order, one per way of reading."""
        parameters = {i.value for i in self.graph.inputs if i.kind == "parameter"}
        whole = set(self.graph.made_whole)
        read: dict[str, dict[tuple[Layout, tuple[str, ...]], list[str]]] = {}
        for node in self.graph.nodes:
            choice = self.plan.choices[node.name]
            for value, layout, gradient in zip(node.inputs, choice.inputs, choice.partial_gradient):
                if value in self.values:
                    read.setdefault(value, {}).setdefault((layout, gradient), []).append(node.name)
        for value in sorted(self.values & whole, key=list(self.made).index):
            layout = Layout.replicated(self.plan.mesh, self.made[value].ndim)
            read.setdefault(value, {}).setdefault((layout, ()), []).append("output")
        for value, needs in read.items():
            for (layout, gradient), readers in needs.items():
                forward, backward = self._steps(value, self.made[value], layout, gradient)
                ahead, back = (sum(step.seconds for step in phase) for phase in (forward, backward))
                stored = value in parameters
                seconds = self.machine.exposed(ahead, back) if stored else ahead + back
                if forward or backward:
                    yield self.of(
                        value, tuple(readers), self.made[value], layout, gradient, forward, backward, stored, seconds
                    )  # fmt: skip

    def _steps(
        self, value: str, before: Layout, after: Layout, gradient: tuple[str, ...]
    ) -> tuple[tuple[CollectivePrice, ...], tuple[CollectivePrice, ...]]:
        meta = self.graph.metas[value]
        options = Options(self.links, meta.dtype.itemsize)
        plan = redistribution(before, after, meta.shape, gradient, options)
        backward = plan.backward if value in self.graph.needs_grad else ()
        forward, back = (steps_price(steps, meta.shape, meta.dtype.itemsize, options) for steps in (plan.forward, backward))
        return forward, back
