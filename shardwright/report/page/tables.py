"""Tables of a plan's page: layouts, tensors and operators, each written once however many nodes have it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from shardwright.base.operators import without_library
from shardwright.cost.communication import CollectivePrice
from shardwright.ir.graph import Graph, Node, is_configured
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.ir.operator import Slot, TensorMeta
from shardwright.ir.plan import Plan
from shardwright.plan.price.values import MovePrice, PlanPrice

_MOST_TEXT = 120  # characters of an operator's arguments
_UNSAID = ("device", "pin_memory", "layout")  # arguments that say nothing here


class Tables:
    """Rows of a page's data, which refers to them by position."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Any]] = {"meshes": [], "layouts": [], "tensors": [], "kinds": []}
        self._known: dict[Hashable, int] = {}

    def _add(self, table: str, key: Hashable, row: Any) -> int:
        if (table, key) not in self._known:
            self._known[table, key] = len(self.rows[table])
            self.rows[table].append(row() if callable(row) else row)
        return self._known[table, key]

    def mesh(self, mesh: Mesh) -> int:
        return self._add(
            "meshes", mesh, lambda: {"axes": list(mesh.axes), "sizes": list(mesh.sizes), "ranks": _runs(mesh.ranks)}
        )

    def layout(self, layout: Layout) -> int:
        return self._add("layouts", layout, lambda: self._layout(layout))

    def _layout(self, layout: Layout) -> dict[str, Any]:
        axes = layout.mesh.axes
        row: dict[str, Any] = {
            "mesh": self.mesh(layout.mesh),
            "dims": [[axes.index(a) for a in dim] for dim in layout.bound],
            "text": layout.short(),
        }
        if layout.partial:
            row["partial"] = [[axes.index(a), op] for a, op in layout.partial]
        if any(layout.sizes):
            row["sizes"] = [None if s is None else list(s) for s in layout.sizes]
        return row

    def tensor(self, meta: TensorMeta) -> int:
        name = str(meta.dtype).removeprefix("torch.")
        return self._add("tensors", (meta.shape, name), lambda: [list(meta.shape), name, meta.dtype.itemsize])

    def kind(self, row: dict[str, Any]) -> int:
        """Adds an operator's row: plain data, so that equal rows are found."""
        return self._add("kinds", _frozen(row), row)


def _frozen(data: Any) -> Hashable:
    if isinstance(data, dict):
        return tuple((key, _frozen(value)) for key, value in data.items())
    return tuple(map(_frozen, data)) if isinstance(data, list) else data


def _runs(ranks: Sequence[int]) -> list[list[int]]:
    """Groups ranks into runs ``[first, step, count]``.

    >>> _runs((0, 2, 4, 6, 1))
    [[0, 2, 4], [1, 1, 1]]
    """
    runs: list[list[int]] = []
    for rank in ranks:
        last = runs[-1] if runs else None
        if last and last[2] == 1 and rank > last[0]:
            last[1:] = [rank - last[0], 2]
        elif last and last[2] > 1 and rank == last[0] + last[1] * last[2]:
            last[2] += 1
        else:
            runs.append([rank, 1, 1])
    return runs


def rounded(number: float) -> float:
    """Rounds a number to five digits, which are enough to look at.

    >>> rounded(0.00012345678), rounded(123456789.0)
    (0.00012346, 123460000)
    """
    value = float(f"{number:.4e}")
    return int(value) if value == int(value) else value


# -- redistributions, as their readers pay for them -----------------------------------------------------------------------


def moves_of(price: PlanPrice, graph: Graph, tables: Tables) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Collects the redistributions of each ``(node, value)``: of the value's reader or, with no reader, of its maker.

    A redistribution that several nodes share is paid by the first; the others have it as ``shared``.
    """
    order = {node.name: at for at, node in enumerate(graph.nodes)}
    makers = {value: node.name for node in graph.nodes for value in node.outputs}
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for move in price.moves:
        row = _move(move, tables)
        readers = sorted(dict.fromkeys(move.readers), key=lambda name: order.get(name, len(order)))
        each = _is_paid_by_each(price, move)
        for at, reader in enumerate(readers or [makers.get(move.value, "")]):
            times = move.readers.count(reader) if each else 1
            paid = move.seconds * times / len(move.readers) if each else move.seconds if at == 0 else 0.0
            shared = {"shared": True} if at and not each else {}
            found.setdefault((reader, move.value), []).append({**row, "seconds": rounded(paid), **shared})
    return found


def _is_paid_by_each(price: PlanPrice, move: MovePrice) -> bool:
    """Tells whether each reader redistributes for itself; otherwise they share one redistribution."""
    gather, reduction = (sum(step.seconds for step in steps) for steps in (move.forward, move.backward))
    once = price.machine.exposed(gather, reduction) if move.of_parameter else gather + reduction
    return len(move.readers) > 1 and once > 0 and move.seconds > 1.5 * once


def _move(move: MovePrice, tables: Tables) -> dict[str, Any]:
    row: dict[str, Any] = {
        "from": tables.layout(move.source),
        "to": tables.layout(move.target),
        "forward": [_step(step) for step in move.forward],
        "backward": [_step(step) for step in move.backward],
    }
    said = {"parameter": move.of_parameter, "bucket": move.shared > 0, "hidden": move.is_hidden}
    return {**row, **{name: True for name, holds in said.items() if holds}}


def _step(step: CollectivePrice) -> list[Any]:
    return [step.kind, list(step.axes), rounded(step.bytes), rounded(step.seconds)]


# -- operators ------------------------------------------------------------------------------------------------------------


class Kinds:
    """Numbers the kinds of nodes: those that compute, are laid out, cost and move the same are of one kind."""

    def __init__(self, plan: Plan, price: PlanPrice | None, tables: Tables):
        self.plan, self.price, self.tables = plan, price, tables
        self.names = {i.value: str(i.target) for i in plan.graph.inputs if i.kind != "input"}
        self.moves = moves_of(price, plan.graph, tables) if price is not None else {}

    def of(self, node: Node) -> int:
        choice, tables = self.plan.choices[node.name], self.tables
        row: dict[str, Any] = {
            "op": without_library(node.op.name),
            "inputs": [
                [tables.tensor(meta), tables.layout(layout), self.names.get(value, "").rpartition(".")[2]]
                for meta, layout, value in zip(node.op.inputs, choice.inputs, node.inputs)
            ],
            "outputs": [
                [tables.tensor(meta), tables.layout(layout), tables.layout(computed)]
                for meta, layout, computed in zip(node.op.outputs, choice.outputs, choice.computed)
            ],
        }
        arguments = _arguments(node)
        extras = {"args": arguments, "source": node.source, "configured": is_configured(node), **self._costs(node)}
        return tables.kind({**row, **{name: value for name, value in extras.items() if value}})

    def _costs(self, node: Node) -> Mapping[str, Any]:
        price = self.price.operators.get(node.name) if self.price is not None else None
        moves, after = [], []
        for value in dict.fromkeys(node.inputs):
            found = self.moves.get((node.name, value), ())
            moves += [{"of": node.inputs.index(value), **move} for move in found]
        for position, value in enumerate(node.outputs):
            after += [{"of": position, **move} for move in self.moves.get((node.name, value), ())]
        numbers = [price.forward, price.backward, price.collectives, price.kept] if price is not None else []
        own = [[_step(step) for step in phase] for phase in price.own] if price is not None else []
        return {"price": [rounded(n) for n in numbers], "own": own if any(own) else [], "moves": moves, "after": after}


def _arguments(node: Node) -> str:
    """Formats the arguments that are neither tensors nor defaults.

    >>> import torch
    >>> from shardwright.ir.operator import Operator
    >>> op = Operator(torch.ops.aten.to.dtype, (Slot(0), torch.float32), {"copy": True}, (), ())
    >>> _arguments(Node("to", op, (), ()))
    'dtype=float32, copy=True'
    """
    schema = getattr(node.op.target, "_schema", None)
    named = [(a.name, a.default_value) for a in schema.arguments] if schema is not None else []
    given = [(named[i][0] if i < len(named) else "", a) for i, a in enumerate(node.op.args)]
    defaults = {name: value for name, value in named if value is not None}
    said = [
        f"{name}={_plain(a)}" if name else _plain(a)
        for name, a in [*given, *node.op.kwargs.items()]
        if a is not None and not _is_tensor(a) and name not in _UNSAID and defaults.get(name, _is_tensor) != a
    ]
    text = ", ".join(said)
    return text if len(text) <= _MOST_TEXT else text[: _MOST_TEXT - 1] + "…"


def _is_tensor(argument: Any) -> bool:
    """Tells whether an argument is a tensor, or a list of tensors."""
    if isinstance(argument, (list, tuple)):
        return len(argument) > 0 and all(map(_is_tensor, argument))
    return isinstance(argument, Slot)


def _plain(argument: Any) -> str:
    return repr(argument).replace("torch.", "")
