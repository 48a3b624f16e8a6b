"""Formats a plan as a short table: repeated layers in one row, with prices; for graphs of thousands of operators."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shardwright.base.operators import without_library
from shardwright.base.text import alike_name, bytes_text, pattern, seconds_text
from shardwright.cost.communication import CollectivePrice
from shardwright.plan.price.price_of import price_of

if TYPE_CHECKING:
    from shardwright.ir.plan import Plan

WIDTH = 168


@dataclass
class _Row:
    """Operators that are alike: same place in alike modules, same layouts, same communication."""

    operator: str
    inputs: str
    outputs: str
    forward: str
    backward: str
    modules: list[str] = field(default_factory=list)
    seconds: float = 0.0


def overview(plan: Plan, width: int = WIDTH) -> str:
    """Formats a plan as text: parameters and operators, alike ones together, with seconds and communication.

    Views that cost nothing are left out; a redistribution that several operators share is counted at the first of them.
    Seconds are those of the operators, their own collectives and the redistributions beside them. Of several tensors each has
    a line.

    Args:
        plan: the plan.
        width: of the text, in characters.
    """
    from rich.console import Console  # here: importing it draws from Python's random generator

    console = Console(file=io.StringIO(), width=width, no_color=True, highlight=False, legacy_windows=False)
    console.print(_parameters(plan))
    console.print(_operators(plan))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


def _parameters(plan: Plan) -> object:
    from rich.table import Table

    table = Table(title="parameters", title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("", "name", "shape", "stored as", "a rank holds"):
        table.add_column(column, overflow="fold", justify="right" if column == "" else "left")
    groups: dict[tuple[str, str, str], list[tuple[str, float]]] = {}
    for i in plan.graph.inputs:
        if i.kind == "parameter" and str(i.target) in price_of(plan).parameters:
            price = price_of(plan).parameters[str(i.target)]
            key = (pattern(str(i.target)), str(list(i.meta.shape)), plan.input_layouts[i.value].short())
            groups.setdefault(key, []).append((str(i.target), price.bytes))
    for (_, shape, layout), members in groups.items():
        name, size = alike_name([name for name, _ in members]), sum(size for _, size in members)
        table.add_row(_times(len(members)), name, shape, layout, bytes_text(int(size)))
    return table


def _times(count: int) -> str:
    return f"{count} ×" if count > 1 else ""


def _operators(plan: Plan) -> object:
    from rich.table import Table

    table = Table(title="operators", title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("", "module", "operator", "inputs", "outputs", "seconds", "forward", "backward"):
        whole = column not in ("forward", "backward")  # to be found and copied
        table.add_column(column, overflow="fold", no_wrap=whole, justify="right" if column in ("", "seconds") else "left")
    for row in _rows(plan):
        times, module = _times(len(row.modules)), alike_name(row.modules)
        seconds = seconds_text(row.seconds)
        table.add_row(times, module, row.operator, row.inputs, row.outputs, seconds, row.forward, row.backward)
    return table


def _rows(plan: Plan) -> Iterable[_Row]:
    rows: dict[tuple[object, ...], _Row] = {}
    seen: dict[tuple[str, str], int] = {}
    for node in plan.graph.nodes:
        price = price_of(plan).operators.get(node.name)
        if price is None:  # made where it is wanted, by every rank
            continue
        place = (node.module, node.op.name)
        seen[place] = seen.get(place, 0) + 1
        choice = plan.choices[node.name]
        moves = [move for move in price_of(plan).moves_to(node.name) if move.readers[0] == node.name]
        seconds = price.seconds + sum(move.seconds for move in moves)
        if not seconds and not moves:  # a view
            continue
        row = _Row(
            without_library(node.op.name),
            "\n".join(layout.short() for layout in choice.inputs),
            "\n".join(layout.short() for layout in choice.outputs),
            "\n".join(map(_step, [*(s for move in moves for s in move.forward), *price.own[0]])),
            "\n".join(map(_step, [*price.own[1], *(s for move in moves for s in move.backward)])),
        )
        key = (pattern(node.module), seen[place], row.operator, row.inputs, row.outputs, row.forward, row.backward)
        row = rows.setdefault(key, row)
        row.modules.append(node.module)
        row.seconds += seconds
    return rows.values()


def _step(step: CollectivePrice) -> str:
    return f"{step.kind} {','.join(map(str, step.axes)) or 'all'} {bytes_text(int(step.bytes))}"
