"""Prices every other choice of an operator, with everything around it unchanged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from shardwright.ir.graph import Node
from shardwright.ir.layout import Layout
from shardwright.plan.choose.tables import ChoiceTable, choices_of, code_of, layout_of, table_of_choice
from shardwright.plan.problem.prices import Array, Pricing, bytes_of_parameters
from shardwright.plan.problem.ready import ready_values

if TYPE_CHECKING:
    from shardwright.ir.plan import Plan

# Alternatives are looked at only where there are at most so many.
_MOST_CHOICES = 20000


@dataclass(frozen=True)
class Alternative:
    """Another choice of an operator: its layouts, and seconds of the operator with the redistributions next to it.

    ``more``: seconds above those of the choice in the plan.
    """

    inputs: tuple[Layout, ...]
    outputs: tuple[Layout, ...]
    seconds: float
    more: float


@dataclass
class _Readings:
    """Readings of a value by others: distinct codes and gradients, and the number of readers of each."""

    codes: Array
    gradients: Array
    counts: Array


class Repricer:
    """Prices choices of single operators of a plan, with their neighbours fixed."""

    def __init__(self, plan: Plan):
        from shardwright.cost.machine_files import load_machine

        self.plan, self.graph, self.mesh = plan, plan.graph, plan.mesh
        machine = load_machine(plan.machine or "cpu-gloo")
        self.pricing = Pricing(machine, plan.mesh, bytes_of_parameters(plan.graph), plan.schedule)
        self.ready = ready_values(plan.graph, plan.full_batch)
        self.producer = {value: node for node in plan.graph.nodes for value in node.outputs}
        self.uses: dict[str, list[tuple[Node, int]]] = {}
        for node in plan.graph.nodes:
            if self.is_priced(node):
                for slot, value in enumerate(node.inputs):
                    self.uses.setdefault(value, []).append((node, slot))
        self.parameters = {i.value for i in plan.graph.inputs if i.kind == "parameter"}
        self.returned = set(plan.graph.made_whole)

    def is_priced(self, node: Node) -> bool:
        """Tells whether an operator costs anything. Those whose pieces every rank makes itself do not."""
        return not all(v in self.ready for v in node.outputs)

    def alternatives(self, node: Node, most: int = 4) -> list[Alternative]:
        """Returns the choices that would cost least in place of the plan's, the best first."""
        choice, signature = self.plan.choices[node.name], self.plan.signatures[node.name]
        symbols = 1 + 2 * len(signature.order)
        if choice.mesh != self.mesh or not self.is_priced(node) or symbols ** len(self.mesh.axes) > 100 * _MOST_CHOICES:
            return []
        now = self.pricing.interned_table(table_of_choice(node.op, signature, self.mesh, choice))
        table = self.pricing.interned_table(choices_of(node.op, signature, self.mesh))
        if len(table) > _MOST_CHOICES:
            return []
        current, seconds = float(self.cost(node, now)[0]), self.cost(node, table)
        seen = {_key(now, 0)}
        found: list[Alternative] = []
        for row in np.argsort(seconds, kind="stable"):
            key = _key(table, int(row))
            if len(found) == most or not np.isfinite(seconds[row]):
                break
            if key not in seen:
                seen.add(key)
                inputs = _layouts(table.inputs, node.op.inputs, int(row), self.mesh)
                outputs = _layouts(table.outputs, node.op.outputs, int(row), self.mesh)
                found.append(Alternative(inputs, outputs, float(seconds[row]), float(seconds[row]) - current))
        return found

    def cost(self, node: Node, table: ChoiceTable) -> Array:
        """Computes the seconds of each choice: the operator, and the changes of the redistributions next to it."""
        total = self.pricing.operator(table, tuple(v in self.graph.needs_grad for v in node.inputs))
        read: set[Any] = set()
        for slot, value in enumerate(node.inputs):
            key = (value, id(table.inputs[slot]), id(table.gradients[slot]))
            if value not in self.ready and key not in read:  # read twice in the same way, it comes once
                total = total + self._reading(node, value, table.inputs[slot], table.gradients[slot])
            read.add(key)
        for value, codes in zip(node.outputs, table.outputs):
            total = total + self._handing_on(value, codes)
        return np.asarray(total)

    # -- the two sides of an operator ---------------------------------------------------------------------------------

    def _reading(self, node: Node, value: str, codes: Array, gradients: Array) -> Array:
        """Prices reading a value, above what its other readers pay anyway."""
        meta, grad, stored = self.graph.metas[value], value in self.graph.needs_grad, value in self.parameters
        source = self._source(value)
        straight = self.pricing.move(meta, source, codes, gradients, grad, stored=stored)[0][0]
        others = self._readings(value, node)
        if others is None or not (stored or value in self.producer):
            return straight
        to_state = self.pricing.move(meta, source, others.codes, others.gradients, grad, stored=stored)[0][0]
        between = self._read(value, others.codes, others.gradients, others.codes, others.gradients)
        alone = to_state + between @ others.counts
        shared = alone[:, None] + self._read(value, others.codes, others.gradients, codes, gradients)
        through = straight + self._read(value, codes, gradients, others.codes, others.gradients) @ others.counts
        return np.minimum(shared.min(axis=0), through) - alone.min()

    def _handing_on(self, value: str, codes: Array) -> Array:
        """Prices bringing an output to its readers."""
        meta, grad = self.graph.metas[value], value in self.graph.needs_grad
        total = self.pricing.to_whole(meta, codes, grad) if value in self.returned else np.zeros(len(codes))
        readers = self._readings(value, None)
        if readers is None:
            return total
        between = self._read(value, readers.codes, readers.gradients, readers.codes, readers.gradients)
        to_state = self.pricing.move(meta, codes, readers.codes, readers.gradients, grad)[0]
        return total + (to_state + between @ readers.counts).min(axis=1)

    def _read(self, value: str, state: Array, state_gradients: Array, target: Array, gradients: Array) -> Array:
        meta, grad = self.graph.metas[value], value in self.graph.needs_grad
        return self.pricing.read(meta, state, state_gradients, target, gradients, grad, False)[0]

    # -- what is fixed ------------------------------------------------------------------------------------------------

    def _source(self, value: str) -> Array:
        node = self.producer.get(value)
        if node is None:
            layout = self.plan.input_layouts[value]
        else:
            layout = self.plan.choices[node.name].outputs[node.outputs.index(value)]
        return self.pricing.interned(np.array([code_of(layout, self.mesh)], dtype=np.int8))

    def _readings(self, value: str, besides: Node | None) -> _Readings | None:
        """Collects the readings of a value by all but one node; ``None`` where nobody else reads it."""
        counts: dict[tuple[tuple[int, ...], tuple[bool, ...]], int] = {}
        grad = value in self.graph.needs_grad
        for node, slot in self.uses.get(value, ()):
            if besides is not None and node.name == besides.name:
                continue
            choice = self.plan.choices[node.name]
            partial = choice.partial_gradient[slot] if grad else ()
            key = (code_of(choice.inputs[slot], self.mesh), tuple(a in partial for a in self.mesh.axes))
            counts[key] = counts.get(key, 0) + 1
        if not counts:
            return None
        codes = self.pricing.interned(np.array([code for code, _ in counts], dtype=np.int8))
        gradients = self.pricing.interned(np.array([mask for _, mask in counts], dtype=bool))
        return _Readings(codes, gradients, np.array(list(counts.values()), dtype=float))


def _key(table: ChoiceTable, row: int) -> tuple[bytes, ...]:
    return tuple(codes[row].tobytes() for codes in (*table.inputs, *table.outputs))


def _layouts(codes: Any, metas: Any, row: int, mesh: Any) -> tuple[Layout, ...]:
    return tuple(layout_of(code[row], len(meta.shape), mesh) for code, meta in zip(codes, metas))
