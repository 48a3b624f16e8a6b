"""The plan as a short table: repeated layers in one row, with prices; for graphs of thousands of operators."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shardwright.cost.communication import CollectivePrice
from shardwright.plan.table import bytes_text

if TYPE_CHECKING:
    from shardwright.plan.plan import Plan

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
    """A plan as text: parameters and operators, alike ones together, with seconds and communication.

    Views that cost nothing are left out; a redistribution that several operators share stands at the first of them. Seconds
    are those of the operators, their own collectives and the redistributions beside them; of several tensors each has a line.
    """
    from rich.console import Console  # here: importing it draws from Python's random generator

    console = Console(file=io.StringIO(), width=width, no_color=True, highlight=False, legacy_windows=False)
    console.print(_parameters(plan))
    console.print(_operators(plan))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


def pattern(name: str) -> str:
    """A qualified name with its numbers left open.

    >>> pattern("blocks.12.attention.query")
    'blocks.*.attention.query'
    """
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", name)


def alike_name(names: Sequence[str]) -> str:
    """What names of alike things have in common: numbers that differ are left open, those that do not stay.

    >>> alike_name(["blocks.0.up.0", "blocks.1.up.0"]), alike_name(["blocks.7.norm"])
    ('blocks.*.up.0', 'blocks.7.norm')
    """
    parts = [re.split(r"([./ ])", name) for name in dict.fromkeys(names)]
    if len({len(each) for each in parts}) > 1:
        return pattern(names[0])
    return "".join(each[0] if len(set(each)) == 1 else "*" for each in zip(*parts))


def seconds_text(seconds: float) -> str:
    """A time for people.

    >>> seconds_text(0.00312), seconds_text(2.5)
    ('3.12 ms', '2.50 s')
    """
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds >= 1 / scale or unit == "µs":
            return f"{seconds * scale:.3g} {unit}" if seconds * scale >= 100 else f"{seconds * scale:.2f} {unit}"
    raise AssertionError


def _parameters(plan: Plan) -> object:
    from rich.table import Table

    table = Table(title="parameters", title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("", "name", "shape", "stored as", "a rank holds"):
        table.add_column(column, overflow="fold", justify="right" if column == "" else "left")
    groups: dict[tuple[str, str, str], list[tuple[str, float]]] = {}
    for i in plan.graph.inputs:
        if i.kind == "parameter" and str(i.target) in plan.price.parameters:
            price = plan.price.parameters[str(i.target)]
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
        price = plan.price.operators.get(node.name)
        if price is None:  # made where it is wanted, by every rank
            continue
        place = (node.module, node.op.name)
        seen[place] = seen.get(place, 0) + 1
        choice = plan.choices[node.name]
        moves = [move for move in plan.price.moves_to(node.name) if move.readers[0] == node.name]
        seconds = price.seconds + sum(move.seconds for move in moves)
        if not seconds and not moves:  # a view
            continue
        row = _Row(
            node.op.name.removeprefix("aten."),
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
