"""Writes plans, strategies and layouts of parameters to files."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardwright.errors import ShardwrightError
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.ir.names import LOADED, operator_keys, shapes_text
from shardwright.plan.file.format import FORMAT, VERSION

if TYPE_CHECKING:
    from shardwright.ir.plan import Plan


def save_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Writes all of a plan; from the file :func:`load_plan_file` and the same graph give the very same plan."""
    _write(path, _text(plan, operators=True, parameters=True))


def save_strategies(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Writes how a plan's operators run, and leaves open how its parameters are stored."""
    _write(path, _text(plan, operators=True, parameters=False))


def save_parameter_layouts(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Writes how a plan stores its parameters, and leaves open how its operators run."""
    _write(path, _text(plan, operators=False, parameters=True))


def _write(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file whole or not at all; the ranks of a job may all write the same one."""
    part = Path(f"{os.fspath(path)}.{os.getpid()}.part")
    try:
        part.write_text(text, "utf-8")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ShardwrightError(f"{os.fspath(path)} cannot be written: {error}") from None


def _text(plan: Plan, operators: bool, parameters: bool) -> str:
    """Builds the text of a file, with one line per entry."""
    head: dict[str, Any] = {
        "format": FORMAT, "version": VERSION, "devices": plan.mesh.size, "mesh": str(plan.mesh), "mode": plan.mode,
    }  # fmt: skip
    if operators and parameters:
        head["complete"] = True
        if plan.machine is not None:
            head["machine"] = getattr(plan.machine, "name", str(plan.machine))
        head |= {"states": plan.optimizer_bytes_per_byte, "memory_limit": plan.memory_limit}
        if plan.search is not None:
            head["search"] = dataclasses.asdict(plan.search)
        head["notes"] = [note for note in plan.notes if not note.startswith(LOADED)]
    lines = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
    if operators:
        lines.append(_section("operators", _operators(plan)))
    if parameters:
        lines.append(_section("parameters", _parameters(plan)))
    if operators and parameters:
        lines.append(_section("inputs", _inputs(plan)))
    return "{\n  " + ",\n  ".join(lines) + "\n}\n"


def _section(name: str, entries: dict[str, Any]) -> str:
    lines = [f"    {json.dumps(key)}: {json.dumps(entry)}" for key, entry in entries.items()]
    return f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n  }" if lines else f"{json.dumps(name)}: {{}}"


def _operators(plan: Plan) -> dict[str, Any]:
    keys = operator_keys(plan.graph)
    texts: dict[Layout, str] = {}

    def text(layout: Layout) -> str:
        if layout not in texts:
            texts[layout] = _layout_text(layout, plan.mesh)
        return texts[layout]

    entries = {}
    for node in plan.graph.nodes:
        choice = plan.choices[node.name]
        entries[keys[node.name]] = {
            "inputs": [text(layout) for layout in choice.inputs],
            "outputs": [text(layout) for layout in choice.outputs],
            "shapes": shapes_text(node),
        }
    return entries


def _parameters(plan: Plan) -> dict[str, Any]:
    """Collects every parameter, and buffers that are not the same on all ranks."""
    entries = {}
    for i in plan.graph.inputs:
        layout = plan.input_layouts[i.value]
        if i.kind == "parameter" or (i.kind != "input" and not layout.is_replicated):
            dtype = str(i.meta.dtype).removeprefix("torch.")
            entries[str(i.target)] = {
                "shape": list(i.meta.shape), "dtype": dtype, "layout": _layout_text(layout, plan.mesh)
            }  # fmt: skip
    return entries


def _inputs(plan: Plan) -> dict[str, Any]:
    return {
        str(i.target): {"shape": list(i.meta.shape), "layout": _layout_text(plan.input_layouts[i.value], plan.mesh)}
        for i in plan.graph.inputs
        if i.kind == "input"
    }


def _layout_text(layout: Layout, mesh: Mesh) -> str:
    return layout.short() if layout.mesh == mesh else str(layout)
