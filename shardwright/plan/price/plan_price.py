"""Prices a plan on a machine, by operator, by redistribution and by parameter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from shardwright.cost.communication import CollectivePrice
from shardwright.ir.choice import Choice
from shardwright.ir.machine import Machine
from shardwright.plan.choose.tables import codes_of, layout_of, table_of_choice
from shardwright.plan.price.own_orders import in_true_orders
from shardwright.plan.price.values import MovePrice, OperatorPrice, ParameterPrice, PlanPrice
from shardwright.plan.problem.blocks import blocks_of
from shardwright.plan.problem.formulation import Folded, Formulation, Use
from shardwright.plan.problem.prices import Pricing, bytes_of_parameters, gradient_codes, launches_of
from shardwright.plan.problem.ready import ready_values
from shardwright.search.solve import solve

if TYPE_CHECKING:
    from shardwright.ir.plan import Plan


def formulation_of(plan: Plan, pricing: Pricing, full_batch: bool, optimizer_bytes_per_byte: float) -> Formulation:
    """Writes the problem whose only answer is the plan, with alike layers written once.

    Args:
        plan: the plan.
        pricing: the prices of the machine.
        full_batch: whether every rank is given the whole batch.
        optimizer_bytes_per_byte: bytes of optimizer state per byte of parameter.
    """
    graph, mesh = plan.graph, plan.mesh
    layouts = {i.value: plan.input_layouts[i.value] for i in graph.inputs if i.kind == "parameter"}
    blocks = blocks_of(graph, layouts, lambda node: _layouts(plan.choices[node.name]))
    folded = Folded(graph, ready_values(graph, full_batch), blocks)
    memo: dict[Any, Any] = {}

    def table(site: int) -> Any:
        node = graph.nodes[site]
        choice = plan.choices[node.name]
        key = (id(node.op), _layouts(choice))
        if key not in memo:
            memo[key] = pricing.interned_table(table_of_choice(node.op, plan.signatures[node.name], mesh, choice))
        return memo[key]

    def codes(value: str) -> Any:
        return pricing.interned(codes_of([plan.input_layouts[value]], mesh))

    tables = {site: table(site) for site in folded.sites}
    stored = {value: codes(value) for value in layouts if value in folded.uses}
    given = {
        i.value: codes(i.value) for i in graph.inputs if i.kind != "parameter" and i.value not in folded.ready
    }  # fmt: skip
    return Formulation(folded, mesh, pricing, tables, stored, given, optimizer_bytes_per_byte)


def _layouts(choice: Choice) -> Any:
    """Returns the key that distinguishes one choice of an operator from another."""
    return choice.inputs, choice.partial_gradient, choice.computed, choice.outputs


def price_plan(plan: Plan, machine: Machine, full_batch: bool = True, optimizer_bytes_per_byte: float = 2.0) -> PlanPrice:
    """Prices a plan, whoever made it.

    Args:
        plan: the plan.
        machine: the machine.
        full_batch: whether every rank is given the whole batch.
        optimizer_bytes_per_byte: bytes of optimizer state per byte of parameter; 2 for Adam.
    """
    pricing = Pricing(machine, plan.mesh, bytes_of_parameters(plan.graph), plan.schedule)
    formulation = formulation_of(plan, pricing, full_batch, optimizer_bytes_per_byte)
    solution = solve(formulation.problem)
    return in_true_orders(plan, _Breakdown(formulation, solution.choices).price(), machine, MovePrice)


class _Breakdown:
    """Splits the price of an answer up, for every copy of a repeated layer."""

    def __init__(self, formulation: Formulation, choices: Sequence[Any]):
        self.form, self.choices = formulation, choices
        self.graph, self.pricing, self.mesh = formulation.graph, formulation.pricing, formulation.mesh
        self.known: dict[Any, Any] = {}
        self.names: dict[int, list[str]] = {}
        self.copies: dict[str, list[tuple[int, str]]] = {}

    def price(self) -> PlanPrice:
        operators: dict[str, OperatorPrice] = {}
        for site in self.form.folded.sites:
            price = self._operator(site)
            operators.update((self.graph.nodes[node].name, price) for _, node in self.form.folded.copies(site))
        alone = self._moves()
        moves = self._sharing(alone)
        unshared = sum(m.seconds for m in moves) - sum(m.seconds for m in alone)
        parameters: dict[str, ParameterPrice] = {}
        for value in self.form.at_parameter:
            price_of = self._parameter(value)
            names = [name for _, name in self.form.parameter_copies(value)]
            parameters.update((str(self.form.parameters[name].target), price_of) for name in names)
        parts = {
            "forward": sum(p.forward for p in operators.values()),
            "backward": sum(p.backward for p in operators.values()),
            "redistribution": sum(m.seconds for m in moves if not m.of_parameter)
            + sum(p.collectives for p in operators.values()),
            "parameters": sum(m.seconds for m in moves if m.of_parameter),
            "optimizer": sum(p.seconds for p in parameters.values()),
            "step": self.pricing.machine.step_launch,
        }
        return PlanPrice(self.pricing.machine, sum(parts.values()), parts, operators, moves, parameters, unshared)

    def _row(self, variable: int, copy: int = 0) -> int:
        rows = self.choices[variable]
        return int(rows if isinstance(rows, (int, np.integer)) else rows[copy])

    def _operator(self, site: int) -> OperatorPrice:
        table, node = self.form.tables[site], self.graph.nodes[site]
        row = self._row(self.form.at_site[site])
        needs_grad = self.form.needs_grad(node)
        forward, backward, own = self.pricing.operator_parts(table, needs_grad)
        kept = self.form.problem.nodes[self.form.at_site[site]].memory
        held = 0.0 if kept is None else float(kept[row])
        steps = self.pricing.own_steps(table, row, any(needs_grad)) if own[row] else ((), ())
        return OperatorPrice(float(forward[row]), float(backward[row]), float(own[row]), held, steps)

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

    # -- redistributions ----------------------------------------------------------------------------------------------

    def _moves(self) -> list[MovePrice]:
        found: list[MovePrice] = []
        for value, uses in self.form.folded.uses.items():
            for copy, name in self._copies(value):
                found += self._moves_of(value, name, copy, uses)
        none = (False,) * len(self.mesh.axes)
        for value in self.form.kept_whole:
            if self.form.folded.producer.get(value) in self.form.at_site:
                copy, name = list(self._copies(value))[-1]
                whole = ((-1,) * len(self.mesh.axes), none)
                found.append(self._move(value, name, ("output",), self._code(value, copy), whole, False, 1))
        return [move for move in found if move.forward or move.backward]

    def _sharing(self, moves: Sequence[MovePrice]) -> tuple[MovePrice, ...]:
        """Shares the launches of parameters' moves whose collectives are alike, as they are when run."""

        def kinds(move: MovePrice) -> list[Any]:
            phases = (move.forward, move.backward)
            return [(phase, *((step.kind, step.axes) for step in steps)) for phase, steps in enumerate(phases)]

        count: Counter[Any] = Counter()
        size: Counter[Any] = Counter()
        for move in moves:
            if any(move.launches):
                for kind in kinds(move):
                    count[kind] += 1
                    size[kind] += move.size  # type: ignore[assignment]
        result = []
        for move in moves:
            if any(move.launches):
                buckets = self.pricing.gathers if move.forward else self.pricing.sums
                shares = [launches_of(buckets, size[kind], count[kind]) / count[kind] - move.share for kind in kinds(move)]
                more = [launch * share for launch, share in zip(move.launches, shares)]
                move = replace(move, seconds=move.seconds + self.pricing.machine.exposed(*more))
            result.append(move)
        return tuple(result)

    def _copies(self, value: str) -> list[tuple[int, str]]:
        """Returns ``(copy, name)`` of every value that a value of the problem stands for."""
        if value not in self.copies:
            self.copies[value] = self._all_copies(value)
        return self.copies[value]

    def _names(self, site: int) -> list[str]:
        """Returns the names of the nodes that a site stands for."""
        if site not in self.names:
            self.names[site] = [self.graph.nodes[node].name for _, node in self.form.folded.copies(site)]
        return self.names[site]

    def _all_copies(self, value: str) -> list[tuple[int, str]]:
        if value in self.form.at_parameter:
            return self.form.parameter_copies(value)
        producer = self.form.folded.producer.get(value)
        if producer is None or producer not in self.form.folded.block_of:
            return [(0, value)]
        position = self.graph.nodes[producer].outputs.index(value)
        return [(c, self.graph.nodes[n].outputs[position]) for c, n in self.form.folded.copies(producer)]

    def _readers(self, value: str, copy: int, use: Use) -> list[str]:
        """Returns the nodes that read a copy of a value by a use."""
        folded = self.form.folded
        block = folded.block_of.get(use.node)
        producer = folded.producer.get(value)
        inside = producer is not None and folded.block_of.get(producer) is block and block is not None
        if block is None:
            own = folded.block_of.get(producer) if producer is not None else None
            return [self.graph.nodes[use.node].name] if own is None or copy == own.count - 1 else []
        names = self._names(use.node)
        if inside or (value in self.form.at_parameter and len(self._copies(value)) > 1):
            at = copy + (use.scope == "carried")
            return [names[at]] if at < len(names) else []
        return names[:1] if use.scope == "first" else names

    def _moves_of(self, value: str, name: str, copy: int, uses: Sequence[Use]) -> list[MovePrice]:
        readers: dict[Any, list[str]] = {}
        for use in uses:
            names = self._readers(value, copy, use)
            if names:
                needs, row = self.form.needs(use), self._row(self.form.at_site[use.node])
                key = (tuple(needs.codes[row].tolist()), tuple(needs.gradients[row].tolist()))
                readers.setdefault(key, []).extend(names)
        code, stored, found = self._code(value, copy), value in self.form.at_parameter, []
        if value in self.form.at_value:
            state, row = self.form.needs_of_value[value], self._row(self.form.at_value[value], copy)
            shared = (tuple(state.codes[row].tolist()), tuple(state.gradients[row].tolist()))
            found.append(self._move(value, name, tuple(readers.pop(shared, ())), code, shared, stored, 1))
            code, stored = state.codes[row], False
        for need, names in readers.items():
            found.append(self._move(value, name, tuple(names), code, need, stored, len(names)))
        return found

    def _code(self, value: str, copy: int) -> Any:
        source = self.form.source(value)
        if source is None:
            return self.form.given[value][0]
        variable, codes = source
        return codes[self._row(variable, copy)]

    def _move(
        self, value: str, name: str, readers: tuple[str, ...], code: Any, need: Any, stored: bool, times: int
    ) -> MovePrice:
        key = (value, tuple(code.tolist()), need, stored)
        if key not in self.known:
            self.known[key] = self._one_move(value, code, need, stored)
        move: MovePrice = self.known[key]
        return replace(move, value=name, readers=readers, seconds=move.seconds * times)

    def _one_move(self, value: str, code: Any, need: Any, stored: bool) -> MovePrice:
        meta, grad = self.graph.metas[value], value in self.graph.needs_grad
        target, mask = np.array(need[0], dtype=np.int8), np.array(need[1], dtype=bool)
        describe, size = self.pricing.communication.describe, meta.dtype.itemsize
        forward = describe(meta.shape, size, code.tolist(), target.tolist())
        backward: tuple[CollectivePrice, ...] = ()
        if grad:
            back_from, back_to = gradient_codes(code[None], target[None], mask[None])
            backward = describe(meta.shape, size, back_from[0].tolist(), back_to[0].tolist())
        axes = tuple(a for a, partial in zip(self.mesh.axes, need[1]) if partial) if grad else ()
        phases, launches = [sum(step.seconds for step in steps) for steps in (forward, backward)], (0.0, 0.0)
        seconds, share, bytes_ = sum(phases), 0.0, 0.0
        if stored:
            pair = (meta, code[None], target[None], mask[None], grad)
            ahead, back, shares = self.pricing.launches(*pair)
            launches, share = (float(ahead[0, 0]), float(back[0, 0])), float(shares[0, 0])
            bytes_ = float(max(self.pricing.piece_bytes(meta, codes[None])[0] for codes in (code, target)))
            saved = [float(each[0, 0]) for each in self.pricing.saved_by_sharing(*pair)]
            seconds = self.pricing.machine.exposed(*(phase - less for phase, less in zip(phases, saved)))
        ndim = len(meta.shape)
        here, there = layout_of(code, ndim, self.mesh), layout_of(target, ndim, self.mesh)
        return MovePrice(value, (), here, there, axes, forward, backward, stored, seconds, launches, share, bytes_)
