"""Plan files: a plan, or a part of one, as text that a person can read, compare and edit.

One JSON file, one line an operator and a parameter. Layouts stand in their text form over the file's mesh; those over
another mesh name it. An operator is known by the path of its module, its name, and which of that name it is there, so that
a file outlives changes elsewhere in the model. ``"complete": true`` says that every operator of the graph has an entry.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardwright.capture.graph import Graph, Node
from shardwright.errors import LayoutError, Problems, ShardwrightError
from shardwright.layout import Layout
from shardwright.mesh import Mesh
from shardwright.plan.overview import pattern
from shardwright.plan.plan import Search
from shardwright.rules.operator import TensorMeta

if TYPE_CHECKING:
    from shardwright.plan.plan import Plan

FORMAT, VERSION = "shardwright plan", 1
_ENTRY = {
    "operators": ("inputs", "outputs", "shapes"),
    "parameters": ("layout", "shape", "dtype"),
    "inputs": ("layout", "shape"),
}
_REQUIRED = {"operators": ("inputs",), "parameters": ("layout",), "inputs": ("layout",)}
_KEYS = (
    "format", "version", "devices", "mesh", "mode", "complete", "machine", "states", "memory_limit", "search", "notes",
    *_ENTRY,
)  # fmt: skip


@dataclass(frozen=True)
class OperatorEntry:
    """How a file says that an operator runs; ``None`` where it leaves something unsaid."""

    key: str
    line: int
    inputs: tuple[Layout, ...]
    outputs: tuple[Layout, ...] | None
    shapes: str | None


@dataclass(frozen=True)
class TensorEntry:
    """Where a file says that a parameter, or an input of the program, is."""

    key: str
    line: int
    layout: Layout
    shape: tuple[int, ...] | None


@dataclass(frozen=True)
class PlanFile:
    """A plan file, read and checked as far as can be without a graph.

    Args:
        complete: whether it says how every operator of its graph runs.
        operators: by key, which may be a pattern; see :func:`operator_keys`.
        parameters: by qualified name. ``inputs``: by position.
    """

    path: str
    devices: int
    mesh: Mesh
    mode: str = ""
    complete: bool = False
    machine: str = ""
    states: float | None = None
    memory_limit: float | None = None
    search: Search | None = None
    notes: tuple[str, ...] = ()
    operators: dict[str, OperatorEntry] = field(default_factory=dict)
    parameters: dict[str, TensorEntry] = field(default_factory=dict)
    inputs: dict[str, TensorEntry] = field(default_factory=dict)

    def where(self, entry: OperatorEntry | TensorEntry) -> str:
        return f"{self.path}:{entry.line}"

    def __str__(self) -> str:
        complete = "a complete plan" if self.complete else "a part of a plan"
        return (
            f"{self.path}: {complete} for {self.devices} devices, mesh {self.mesh or '()'}, "
            f"{len(self.operators)} operators, {len(self.parameters)} parameters"
        )


def operator_keys(graph: Graph) -> dict[str, str]:
    """For every node, by name, how files call its operator: ``layers.0.query/aten.linear``, the second one there with ``#2``.

    >>> import torch
    >>> from shardwright.rules.operator import Operator
    >>> add = Operator(torch.ops.aten.add.Tensor, (), {}, (), ())
    >>> nodes = tuple(Node(name, add, (), (), "block") for name in ("add", "add_1"))
    >>> operator_keys(Graph((), nodes, ()))
    {'add': 'block/aten.add', 'add_1': 'block/aten.add#2'}
    """
    counts: dict[str, int] = {}
    keys = {}
    for node in graph.nodes:
        stem = f"{node.module}/{node.op.name}" if node.module else node.op.name
        counts[stem] = counts.get(stem, 0) + 1
        keys[node.name] = stem if counts[stem] == 1 else f"{stem}#{counts[stem]}"
    return keys


def key_pattern(key: str) -> str:
    """An operator's key with the numbers of layers left open.

    >>> key_pattern("layers.0.query/aten.linear#2")
    'layers.*.query/aten.linear#2'
    """
    module, slash, rest = key.rpartition("/")
    return f"{pattern(module)}{slash}{rest}"


def shapes_text(node: Node) -> str:
    """The shapes of an operator's inputs and outputs: ``8x64 16x64 -> 8x16``."""
    left, right = (" ".join(map(_shape_text, metas)) for metas in (node.op.inputs, node.op.outputs))
    return f"{left} -> {right}".strip()


def _shape_text(meta: TensorMeta) -> str:
    return "x".join(map(str, meta.shape)) or "()"


# -- saving ---------------------------------------------------------------------------------------------------------------


def save_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Writes all of a plan; :func:`load_plan_file` reads it, and the same graph gets the very same plan from it."""
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
    """The text of a file: one line an entry."""
    head: dict[str, Any] = {
        "format": FORMAT, "version": VERSION, "devices": plan.mesh.size, "mesh": str(plan.mesh), "mode": plan.mode,
    }  # fmt: skip
    if operators and parameters:
        head["complete"] = True
        if plan.machine is not None:
            head["machine"] = getattr(plan.machine, "name", str(plan.machine))
        head |= {"states": plan.states, "memory_limit": plan.memory_limit}
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
    """Every parameter, and buffers that are not the same on all ranks."""
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


# -- loading --------------------------------------------------------------------------------------------------------------

# What a plan that comes from a file notes; the path follows.
LOADED = "as saved in "


def load_plan_file(path: str | os.PathLike[str]) -> PlanFile:
    """Reads a plan file and checks all that can be checked without a graph.

    Raises:
        StrategyError: every problem of the file, each with its line and what to change.
        ShardwrightError: it cannot be read.
    """
    name = os.fspath(path)
    try:
        text = Path(name).read_text("utf-8")
    except FileNotFoundError:
        raise ShardwrightError(f"there is no plan file {name}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ShardwrightError(f"the plan file {name} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    problems = Problems()
    found = _Reader(name, text, problems).read()
    problems.raise_if_any(f"the plan file {name} cannot be followed")
    assert found is not None
    return found


class _Reader:
    """Reads the text of one file; what is wrong with it goes to ``problems``."""

    def __init__(self, path: str, text: str, problems: Problems):
        self.path, self.text, self.problems = path, text, problems
        self.layouts: dict[str, Layout | None] = {}
        self.mesh = Mesh((), ())
        self.at, self.number = 0, 1  # the key that was asked for last, and its line

    def refuse(self, line: int, why: str) -> None:
        self.problems.add(f"{self.path}:{line}: {why}")

    def read(self) -> PlanFile | None:
        try:
            data = json.loads(self.text, object_pairs_hook=self._object)
        except json.JSONDecodeError as error:
            self.refuse(error.lineno, f"this is not JSON: {error.msg} at column {error.colno}")
            return None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            self.refuse(1, f'this is not a plan file: it does not say "format": "{FORMAT}"')
            return None
        if data.get("version") != VERSION:
            given = data.get("version")
            self.refuse(self.line("version"), f"version {given!r} is not known, only {VERSION}; save the plan again")
            return None
        for key in data:
            if key not in _KEYS:
                self.refuse(self.line(key), f"{key!r} is not known; use {', '.join(_KEYS)}")
        if not self._mesh(data) or not self._head(data):
            return None
        operators = self._entries(data, "operators", self._operator)
        parameters = self._entries(data, "parameters", self._tensor)
        inputs = self._entries(data, "inputs", self._tensor)
        search = _search(data.get("search"))
        known = {k: data[k] for k in ("mode", "complete", "machine", "states", "memory_limit") if k in data}
        return PlanFile(
            self.path, self.mesh.size, self.mesh, **known, search=search, notes=tuple(data.get("notes", ())),
            operators=operators, parameters=parameters, inputs=inputs,
        )  # fmt: skip

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """An object whose keys are all different."""
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                places = [self.text.count("\n", 0, m.start()) + 1 for m in self._pattern(key).finditer(self.text)]
                others = f" (lines {', '.join(map(str, places))})" if len(places) < 6 else ""
                self.refuse(places[-1], f"{key!r} stands more than once in one object{others}; keep one of them")
            result[key] = value
        return result

    def _mesh(self, data: dict[str, Any]) -> bool:
        devices, mesh = data.get("devices"), data.get("mesh")
        if not isinstance(devices, int) or isinstance(devices, bool) or devices < 1:
            self.refuse(self.line("devices"), f'"devices" is {devices!r}; give the number of ranks')
            return False
        try:
            self.mesh = Mesh.parse(mesh) if isinstance(mesh, str) else Mesh((), ())
        except LayoutError as error:
            self.refuse(self.line("mesh"), str(error))
            return False
        if not isinstance(mesh, str) or self.mesh.size != devices:
            self.refuse(self.line("mesh"), f'"mesh" is {mesh!r}, which does not have {devices} ranks; write "dp=2,mp=4"')
            return False
        return True

    def _head(self, data: dict[str, Any]) -> bool:
        kinds: dict[str, Any] = {
            "mode": str, "complete": bool, "machine": str, "states": (int, float), "memory_limit": (int, float, type(None)),
            "search": (dict, type(None)), "notes": list, **dict.fromkeys(_ENTRY, dict),
        }  # fmt: skip
        fine = True
        for key, kind in kinds.items():
            if key in data and not isinstance(data[key], kind):
                self.refuse(self.line(key), f"{key!r} is {data[key]!r}; see docs/plan_files.md for what it may be")
                fine = False
        return fine

    def _entries(self, data: dict[str, Any], section: str, read: Callable[..., Any]) -> dict[str, Any]:
        result = {}
        self.at, self.number = 0, 1
        self.line(section)
        for key, entry in data.get(section, {}).items():
            line = self.line(key)
            if not isinstance(entry, dict):
                self.refuse(line, f"{key!r} is {entry!r}; give an object with {', '.join(_REQUIRED[section])}")
                continue
            unknown, missing = set(entry) - set(_ENTRY[section]), set(_REQUIRED[section]) - set(entry)
            if unknown or missing:
                odd = [*(f"has {k!r}, which is not known" for k in sorted(unknown)), *(f"lacks {k!r}" for k in sorted(missing))]
                self.refuse(line, f"{key!r} {' and '.join(odd)}; use {', '.join(_ENTRY[section])}")
                continue
            found = read(key, line, entry)
            if found is not None:
                result[key] = found
        return result

    def _operator(self, key: str, line: int, entry: dict[str, Any]) -> OperatorEntry | None:
        inputs = self._layouts(key, line, "inputs", entry["inputs"])
        outputs = self._layouts(key, line, "outputs", entry["outputs"]) if entry.get("outputs") is not None else None
        shapes = entry.get("shapes")
        if shapes is not None and not isinstance(shapes, str):
            self.refuse(line, f'{key!r}: "shapes" is {shapes!r}; write "8x64 16x64 -> 8x16", or leave it out')
            return None
        if inputs is None or (outputs is None and entry.get("outputs") is not None):
            return None
        return OperatorEntry(key, line, inputs, outputs, shapes)

    def _tensor(self, key: str, line: int, entry: dict[str, Any]) -> TensorEntry | None:
        layout, shape = self._layout(key, line, entry["layout"]), entry.get("shape")
        if shape is not None and not (isinstance(shape, list) and all(isinstance(s, int) for s in shape)):
            self.refuse(line, f'{key!r}: "shape" is {shape!r}; write [64, 256], or leave it out')
            return None
        return None if layout is None else TensorEntry(key, line, layout, None if shape is None else tuple(shape))

    def _layouts(self, key: str, line: int, name: str, texts: Any) -> tuple[Layout, ...] | None:
        if not isinstance(texts, list):
            self.refuse(line, f'{key!r}: "{name}" is {texts!r}; give a list with one layout a tensor, ["dp,None"]')
            return None
        found = [self._layout(key, line, text) for text in texts]
        return None if any(layout is None for layout in found) else tuple(found)  # type: ignore[arg-type]

    def _layout(self, key: str, line: int, text: Any) -> Layout | None:
        if not isinstance(text, str):
            self.refuse(line, f'{key!r}: the layout {text!r} is a {type(text).__name__}; write text such as "dp,None"')
            return None
        if text not in self.layouts:
            try:
                self.layouts[text] = Layout.parse(text, self.mesh)
            except ShardwrightError as error:
                self.refuse(line, f"{key!r}: cannot read the layout {text!r}: {error}")
                return None
        return self.layouts[text]

    def line(self, key: str) -> int:
        """The line of a key; of one that stands in several places, that which follows the one asked for last."""
        quoted = json.dumps(key) + ":"
        where = self.text.find(quoted, self.at)
        if where < 0:
            match = self._pattern(key).search(self.text)
            where = match.start() if match else 0
        start = self.at if where >= self.at else 0
        self.number = (self.number if start else 1) + self.text.count("\n", start, where)
        self.at = where
        return self.number

    @staticmethod
    def _pattern(key: str) -> re.Pattern[str]:
        return re.compile(f"(?:{re.escape(json.dumps(key))}|{re.escape(json.dumps(key, ensure_ascii=False))})\\s*:")


def _search(data: dict[str, Any] | None) -> Search | None:
    """What a search found, as saved; ``None`` where it was edited beyond use, as nothing depends on it."""
    try:
        tried = tuple((tuple(sizes), float(seconds)) for sizes, seconds in (data or {}).get("tried", ()))
        return Search(**{**data, "tried": tried}) if data else None
    except (TypeError, ValueError):
        return None
