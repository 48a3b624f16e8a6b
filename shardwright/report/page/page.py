"""Writes a plan as a page: one HTML file, with nothing to fetch and nothing to install.

``page_data`` collects what the page shows, as plain data; ``render`` puts it into the template beside this file, whose
scripts draw it. What repeats is written once, and the scripts compute slices from meshes and layouts, so that the file's
size does not depend on the number of ranks.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardwright.plan.memory import step_memory
from shardwright.plan.price.price_of import price_of
from shardwright.report.page.tables import Kinds, Tables, rounded
from shardwright.report.page.tree import module_tree

if TYPE_CHECKING:
    from shardwright.ir.plan import Plan, Search
    from shardwright.plan.memory import MemoryTimeline
    from shardwright.plan.price.values import PlanPrice

SCRIPTS = ("data.js", "overview.js", "inspector.js", "tree.js", "page.js")  # in the order in which they are joined
_MEMORY_STEPS = 20_000  # the memory over time is drawn in this many steps of the peak


def write_page(plan: Plan, path: str | Path, title: str = "", priced: bool = True) -> None:
    """Writes a plan as a page: one HTML file that needs no network.

    Args:
        plan: the plan.
        path: where to write.
        title: the heading; default: the number of ranks.
        priced: whether to show what a step costs, on the plan's machine (``cpu-gloo`` where none was named).
    """
    Path(path).write_text(render(page_data(plan, title, priced)), encoding="utf-8")


def page_data(plan: Plan, title: str = "", priced: bool = True) -> dict[str, Any]:
    """Collects what the page of a plan shows, as plain data for JSON; see ``docs/plan_page.md``."""
    tables = Tables()
    price = price_of(plan) if priced else None
    kinds_of = Kinds(plan, price, tables)
    kinds = [kinds_of.of(node) for node in plan.graph.nodes]
    values = {name: at for at, name in enumerate(_values(plan))}
    data = {
        "title": title or f"Plan for {plan.mesh.size} {'rank' if plan.mesh.size == 1 else 'ranks'}",
        "mode": plan.mode,
        "mesh": tables.mesh(plan.mesh),
        "notes": list(plan.notes),
        "step": _step(plan, price) if price is not None else None,
        "search": _search(plan.search) if plan.search is not None else None,
        "memory": _memory(plan, step_memory(plan)) if priced and plan.graph.nodes else None,
        "tree": module_tree([node.module for node in plan.graph.nodes], kinds),
        "nodes": {
            "kinds": kinds,
            "names": [node.name for node in plan.graph.nodes],
            "reads": [[values[value] for value in node.inputs] for node in plan.graph.nodes],
        },
        "inputs": [
            [str(i.target), i.kind, tables.tensor(i.meta), tables.layout(plan.input_layouts[i.value])]
            for i in plan.graph.inputs
        ],
        "parameters": _parameters(plan, price, tables),
        "returned": [move for (reader, _), moves in kinds_of.moves.items() if reader == "output" for move in moves],
    }
    return {**data, **tables.rows}


def render(data: dict[str, Any]) -> str:
    """Renders the page that shows some data, as HTML."""
    here = Path(__file__).parent
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":  # nothing in it may end the script, or start a comment
        text = text.replace(character, f"\\u{ord(character):04x}")
    parts = {
        "title": html.escape(str(data["title"])),
        "style": (here / "page.css").read_text("utf-8"),
        "script": "\n".join((here / name).read_text("utf-8") for name in SCRIPTS),
        "data": text,
    }
    template = (here / "page.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _values(plan: Plan) -> list[str]:
    """Lists the values of the graph: its inputs, then what its nodes make."""
    return [i.value for i in plan.graph.inputs] + [value for node in plan.graph.nodes for value in node.outputs]


def _step(plan: Plan, price: PlanPrice) -> dict[str, Any]:
    from shardwright.report.summary import flops_split, parameters_split

    return {
        "machine": price.machine.name,
        "description": price.machine.description,
        "assumed": plan.machine is None,
        "seconds": rounded(price.seconds),
        "parts": {name: rounded(seconds) for name, seconds in price.parts.items()},
        "bytes": rounded(price.bytes),
        "flops_split": rounded(flops_split(plan)),
        "parameters_split": rounded(parameters_split(plan)),
    }


def _search(search: Search) -> dict[str, Any]:
    from shardwright.report.summary import OPTIMAL

    return {
        "method": search.method,
        "gap": None if search.bound <= 0 else 0 if search.gap < OPTIMAL else rounded(search.gap),
        "planning": rounded(search.planning),
        "tried": [[list(sizes), rounded(seconds)] for sizes, seconds in search.tried],
    }


def _memory(plan: Plan, memory: MemoryTimeline) -> dict[str, Any]:
    """Collects the memory over time: bytes of each part at each point, in whole units."""
    order = {node.name: at for at, node in enumerate(plan.graph.nodes)}
    unit = max(memory.peak / _MEMORY_STEPS, 1.0)
    phases: list[list[Any]] = []
    for point in memory.points:
        if not phases or phases[-1][0] != point.phase:
            phases.append([point.phase, 0])
        phases[-1][1] += 1
    return {
        "peak": rounded(memory.peak),
        "highest": memory.points.index(memory.highest),
        "limit": plan.memory_limit if plan.memory_limit is not None else price_of(plan).machine.memory or None,
        "unit": unit,
        "phases": phases,
        "nodes": [order.get(point.node, point.node) for point in memory.points],
        "parts": {
            name: _short([round(point.parts[name] / unit) for point in memory.points]) for name in memory.points[0].parts
        },
        "kept": [[value, module, rounded(size)] for value, module, size in memory.largest[:5]],
    }


def _short(numbers: Sequence[int]) -> list[int] | int:
    """Returns one number where all are equal, else the list."""
    return numbers[0] if len(set(numbers)) == 1 else list(numbers)


def _parameters(plan: Plan, price: PlanPrice | None, tables: Tables) -> list[dict[str, Any]]:
    """Collects the parameters, those of alike layers together."""
    from shardwright.base.text import pattern

    moved: dict[str, float] = {}
    for move in price.moves if price is not None else ():
        if move.of_parameter:
            moved[move.value] = moved.get(move.value, 0.0) + move.seconds
    rows: dict[Any, dict[str, Any]] = {}
    for at, i in enumerate(plan.graph.inputs):
        if i.kind != "parameter":
            continue
        name = str(i.target)
        row: dict[str, Any] = {"tensor": tables.tensor(i.meta), "layout": tables.layout(plan.input_layouts[i.value])}
        of = price.parameters.get(name) if price is not None else None
        if of is not None:
            row |= {"state": rounded(of.state_bytes), "update": rounded(of.seconds), "moves": rounded(moved.get(i.value, 0.0))}
        key = (pattern(name), *row.values())
        rows.setdefault(key, {"name": pattern(name), "inputs": [], **row})["inputs"].append(at)
    return list(rows.values())
