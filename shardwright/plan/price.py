"""Price: what a plan costs on a machine, by operator, by redistribution and by parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from shardwright.cost.communication import CollectivePrice
from shardwright.cost.machine import Machine
from shardwright.layout import Layout
from shardwright.plan.choices import layout_of, table_of_choice
from shardwright.plan.formulation import Folded, Formulation, ready_values
from shardwright.plan.pricing import Pricing, gradient_codes
from shardwright.search.solve import solve

if TYPE_CHECKING:
    from shardwright.plan.plan import Plan


@dataclass(frozen=True)
class OperatorPrice:
    """Seconds of one operator, of the busiest rank, and the bytes that it keeps for the backward.

    ``collectives`` are those that the operator runs itself.
    """

    forward: float
    backward: float
    collectives: float
    kept: float

    @property
    def seconds(self) -> float:
        return self.forward + self.backward + self.collectives


@dataclass(frozen=True)
class MovePrice:
    """One redistribution: from where a value is (or from its shared reading) to who reads it.

    ``readers`` are names of nodes, ``output`` where the program returns it. ``of_parameter``: a parameter's gather and the
    reduction of its gradient, ``seconds`` being what does not hide behind computing.
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

    @property
    def bytes(self) -> float:
        """Bytes that the busiest rank sends, forward and backward."""
        return sum(step.bytes for step in (*self.forward, *self.backward))


@dataclass(frozen=True)
class ParameterPrice:
    """A stored parameter: its layout, bytes a rank holds of it, bytes with gradient and optimizer, optimizer's seconds."""

    layout: Layout
    bytes: float
    state_bytes: float
    seconds: float


@dataclass(frozen=True)
class PlanPrice:
    """What a step of a plan costs.

    Args:
        seconds: the whole; the sum of ``parts``.
        parts: seconds of ``forward``, ``backward``, ``redistribution``, ``parameters`` (gathers and gradient reductions that
            do not hide) and ``optimizer``.
        operators, moves, parameters: by node, in order, and by parameter name.
    """

    machine: Machine
    seconds: float
    parts: dict[str, float]
    operators: dict[str, OperatorPrice]
    moves: tuple[MovePrice, ...]
    parameters: dict[str, ParameterPrice]
    _by_reader: dict[str, list[MovePrice]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def bytes(self) -> float:
        """Bytes that the busiest rank sends in a step."""
        return sum(move.bytes for move in self.moves)

    def moves_to(self, node: str) -> Sequence[MovePrice]:
        """The redistributions that a node pays for."""
        if not self._by_reader:
            for move in self.moves:
                for reader in move.readers:
                    self._by_reader.setdefault(reader, []).append(move)
        return self._by_reader.get(node, ())


def formulation_of(plan: Plan, pricing: Pricing, full_batch: bool, states: float, fold: bool = False) -> Formulation:
    """The problem whose only answer is the plan."""
    graph, mesh = plan.graph, plan.mesh
    folded = Folded(graph, ready_values(graph, full_batch), fold)
    memo: dict[Any, Any] = {}

    def table(site: int) -> Any:
        node = graph.nodes[site]
        choice = plan.choices[node.name]
        key = (id(node.op), id(choice))
        if key not in memo:
            memo[key] = pricing.interned_table(table_of_choice(node.op, plan.signatures[node.name], mesh, choice))
        return memo[key]

    def codes(value: str) -> Any:
        layout = plan.input_layouts[value]
        return pricing.interned(table_code(layout, mesh))

    tables = {site: table(site) for site in folded.sites}
    stored = {i.value: codes(i.value) for i in graph.inputs if i.kind == "parameter"}
    given = {
        i.value: codes(i.value) for i in graph.inputs if i.kind != "parameter" and i.value not in folded.ready
    }  # fmt: skip
    return Formulation(folded, mesh, pricing, tables, stored, given, states)


def table_code(layout: Layout, mesh: Any) -> Any:
    from shardwright.plan.choices import code_of

    return np.array([code_of(layout, mesh)], dtype=np.int8)


def price_plan(plan: Plan, machine: Machine, full_batch: bool = True, states: float = 2.0) -> PlanPrice:
    """Prices a plan, whoever made it.

    Args:
        states: bytes of optimizer state a byte of parameter; 2 for Adam.
    """
    pricing = Pricing(machine, plan.mesh)
    formulation = formulation_of(plan, pricing, full_batch, states)
    solution = solve(formulation.problem)
    return _Breakdown(formulation, solution.choices).price()


class _Breakdown:
    """Takes the price of an answer apart; of a problem without repeats."""

    def __init__(self, formulation: Formulation, choices: Sequence[Any]):
        self.form, self.choices = formulation, choices
        self.graph, self.pricing, self.mesh = formulation.graph, formulation.pricing, formulation.mesh

    def price(self) -> PlanPrice:
        operators = {self.graph.nodes[s].name: self._operator(s) for s in self.form.folded.sites}
        moves = tuple(self._moves())
        parameters = {str(self.form.parameters[v].target): self._parameter(v) for v in self.form.at_parameter}
        parts = {
            "forward": sum(p.forward for p in operators.values()),
            "backward": sum(p.backward for p in operators.values()),
            "redistribution": sum(m.seconds for m in moves if not m.of_parameter)
            + sum(p.collectives for p in operators.values()),
            "parameters": sum(m.seconds for m in moves if m.of_parameter),
            "optimizer": sum(p.seconds for p in parameters.values()),
        }
        return PlanPrice(self.pricing.machine, sum(parts.values()), parts, operators, moves, parameters)

    def _row(self, variable: int) -> int:
        return int(self.choices[variable])

    def _operator(self, site: int) -> OperatorPrice:
        table, node = self.form.tables[site], self.graph.nodes[site]
        row = self._row(self.form.at_site[site])
        forward, backward, own = self.pricing.operator_parts(table, self.form.needs_grad(node))
        kept = self.form.problem.nodes[self.form.at_site[site]].memory
        return OperatorPrice(
            float(forward[row]), float(backward[row]), float(own[row]), 0.0 if kept is None else float(kept[row])
        )

    def _parameter(self, value: str) -> ParameterPrice:
        at = self.form.at_parameter[value]
        row, meta = self._row(at), self.graph.metas[value]
        code = self.form.stored[value][row]
        held = float(self.pricing.piece_bytes(meta, code))
        variable = self.form.problem.nodes[at]
        memory = held if variable.memory is None else float(variable.memory[row])
        grad = held if value in self.graph.needs_grad else 0.0
        layout = layout_of(code, len(meta.shape), self.mesh)
        return ParameterPrice(layout, held, memory + grad * (1 - self.form.gradients), float(variable.cost[row]))

    def _moves(self) -> list[MovePrice]:
        found = []
        for value, uses in self.form.folded.uses.items():
            readers: dict[Any, list[str]] = {}
            for use in uses:
                needs, row = self.form.needs(use), self._row(self.form.at_site[use.node])
                key = (tuple(needs.codes[row].tolist()), tuple(needs.gradients[row].tolist()))
                readers.setdefault(key, []).append(self.graph.nodes[use.node].name)
            source = self.form.source(value)
            code = self._code(value, source)
            stored = value in self.form.at_parameter
            if value in self.form.at_value:
                state, row = self.form.needs_of_value[value], self._row(self.form.at_value[value])
                shared = (tuple(state.codes[row].tolist()), tuple(state.gradients[row].tolist()))
                names = tuple(readers.pop(shared, ()))
                found.append(self._move(value, names, code, shared, stored, 1))
                code, stored = state.codes[row], False
            for need, names in readers.items():
                found.append(self._move(value, tuple(names), code, need, stored, len(names)))
        for value in self.form._kept_whole:
            if value in self.graph.metas and self.form.folded.producer.get(value) in self.form.at_site:
                none = (False,) * len(self.mesh.axes)
                whole = ((-1,) * len(self.mesh.axes), none)
                found.append(self._move(value, ("output",), self._code(value, self.form.source(value)), whole, False, 1))
        return [move for move in found if move.forward or move.backward]

    def _code(self, value: str, source: Any) -> Any:
        if source is None:
            return self.form.given[value][0]
        variable, codes = source
        return codes[self._row(variable)]

    def _move(self, value: str, readers: tuple[str, ...], code: Any, need: Any, stored: bool, times: int) -> MovePrice:
        meta = self.graph.metas[value]
        target, mask = np.array(need[0], dtype=np.int8), np.array(need[1], dtype=bool)
        describe, size = self.pricing.communication.describe, meta.dtype.itemsize
        forward = tuple(describe(meta.shape, size, code, target))
        backward: tuple[CollectivePrice, ...] = ()
        grad = value in self.graph.needs_grad
        if grad:
            back_from, back_to = gradient_codes(code[None], target[None], mask[None])
            backward = tuple(describe(meta.shape, size, back_from[0], back_to[0]))
        axes = tuple(a for a, partial in zip(self.mesh.axes, need[1]) if partial) if grad else ()
        seconds = sum(s.seconds for s in (*forward, *backward)) * (1 - self.pricing.machine.overlap if stored else 1) * times
        ndim = len(meta.shape)
        return MovePrice(
            value, readers, layout_of(code, ndim, self.mesh), layout_of(target, ndim, self.mesh), axes, forward, backward,
            stored, seconds,
        )  # fmt: skip
