"""Formats a plan as a table: one row per operator, with layouts, local shapes and collectives."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

from shardwright.base.text import bytes_text
from shardwright.ir.step import Step
from shardwright.redistribute.volume import sent_elements

if TYPE_CHECKING:
    from rich.table import Table

    from shardwright.ir.graph import Node
    from shardwright.ir.instructions import Move
    from shardwright.ir.plan import Plan
    from shardwright.ir.program import LocalProgram

WIDTH = 168


def plan_table(plan: Plan, program: LocalProgram | None = None, width: int = WIDTH) -> str:
    """Formats a plan as text: parameters, operators with their collectives, totals and notes."""
    from rich.console import Console  # here: importing it draws from Python's random generator

    console = Console(file=io.StringIO(), width=width, no_color=True, highlight=False, legacy_windows=False)
    mesh = plan.mesh if plan.mesh.axes else "()"
    console.print(f"plan for {plan.mesh.size} ranks, mesh {mesh}, mode {plan.mode}", markup=False)
    console.print(_parameters(plan))
    console.print(_operators(plan, program))
    for line in [*_totals(plan, program), *(f"note: {note}" for note in plan.notes)]:
        console.print(line, markup=False)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _parameters(plan: Plan) -> Table:
    table = _table("parameters", "name", "shape", "layout", "on rank 0")
    rank = plan.mesh.ranks[0]
    for i in plan.graph.inputs:
        if i.kind == "parameter":
            layout = plan.input_layouts[i.value]
            local = list(layout.local_shape(i.meta.shape, rank))
            table.add_row(str(i.target), str(list(i.meta.shape)), _short(layout), str(local))
    return table


def _short(layout: object) -> str:
    return getattr(layout, "short")()  # noqa: B009


def _operators(plan: Plan, program: LocalProgram | None) -> Table:
    table = _table("operators", "module", "operator", "inputs", "outputs", "local output", "forward", "backward")
    moves = _moves_by_cause(program)
    rank = plan.mesh.ranks[0]
    for node in plan.graph.nodes:
        choice = plan.choices[node.name]
        local = [
            str(list(layout.local_shape(meta.shape, rank)))
            for layout, meta in zip(choice.outputs, node.op.outputs, strict=True)
        ]
        forward, backward = _communication(moves.get(node.name, ()))
        table.add_row(
            _module(node),
            node.name,
            " | ".join(_short(layout) for layout in choice.inputs),
            " | ".join(_short(layout) for layout in choice.outputs),
            " ".join(local),
            forward,
            backward,
        )
    forward, backward = _communication(moves.get("", ()))
    if forward or backward:
        table.add_row("", "return", "", "", "", forward, backward)
    return table


def _module(node: Node) -> str:
    return node.module + (" *" if node.mark is not None and node.mark.in_strategy is not None else "")


def _moves_by_cause(program: LocalProgram | None) -> dict[str, list[Move]]:
    result: dict[str, list[Move]] = {}
    if program is not None:
        nodes = {call.cause for call in program.calls}
        for move in program.moves:
            result.setdefault(move.cause if move.cause in nodes else "", []).append(move)
    return result


def _communication(moves: Iterable[Move]) -> tuple[str, str]:
    forward: list[str] = []
    backward: list[str] = []
    for move in moves:
        plan = move.redistribution
        forward += [_step(s, plan.shape, move.itemsize("forward")) for s in plan.forward if s.communicates]
        if move.needs_grad:
            backward += [_step(s, plan.shape, move.itemsize("backward")) for s in plan.backward if s.communicates]
    return "\n".join(forward), "\n".join(backward)


def _step(step: Step, shape: tuple[int, ...], itemsize: int) -> str:
    axes = ",".join(step.axes) or "all"
    return f"{step.kind} {axes} {bytes_text(sent_elements(step, shape) * itemsize)}"


def _totals(plan: Plan, program: LocalProgram | None) -> list[str]:
    if program is None:
        return []
    totals = {"forward": [0, 0], "backward": [0, 0]}
    shared = {move.output: at for at, members in enumerate(program.shared_moves) for move in members}
    seen: set[object] = set()
    for move in program.moves:
        redistribution = move.redistribution
        steps = {"forward": redistribution.forward, "backward": redistribution.backward if move.needs_grad else ()}
        for phase, of_phase in steps.items():
            for step in of_phase:
                if step.communicates:
                    launch = (phase, shared.get(move.output, move.output), step.kind)
                    totals[phase][0] += move.output not in shared or launch not in seen
                    totals[phase][1] += sent_elements(step, redistribution.shape) * move.itemsize(phase)
                    seen.add(launch)
    held = sum(instruction_bytes(plan, i.value) for i in plan.graph.inputs if i.kind == "parameter")
    whole = sum(i.meta.bytes for i in plan.graph.inputs if i.kind == "parameter")
    return [
        ", ".join(f"{phase}: {_collectives(n)}, {bytes_text(b)} a rank" for phase, (n, b) in totals.items()),
        f"parameters on rank {plan.mesh.ranks[0]}: {bytes_text(held)} of {bytes_text(whole)}",
    ]


def _collectives(count: int) -> str:
    return "1 collective" if count == 1 else f"{count} collectives"


def instruction_bytes(plan: Plan, value: str) -> int:
    """Counts the bytes of a graph input that the first rank holds."""
    meta, layout = plan.graph.metas[value], plan.input_layouts[value]
    count = 1
    for size in layout.local_shape(meta.shape, plan.mesh.ranks[0]):
        count *= size
    return count * meta.dtype.itemsize
