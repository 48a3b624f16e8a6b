"""Reads plan files, and reports all problems at once."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardwright.errors import LayoutError, Problems, ShardwrightError
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.ir.plan import Search
from shardwright.plan.file.format import _ENTRY, _KEYS, _REQUIRED, FORMAT, VERSION, OperatorEntry, PlanFile, TensorEntry


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
    """Reads the text of one file; ``problems`` collects what is wrong with it."""

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
        """Builds an object, and refuses keys that come twice."""
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
        """Returns the line of a key; of a repeated key, the one after the line returned last."""
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
    """Reads the result of a search as saved; ``None`` where it was edited beyond use, as nothing depends on it."""
    try:
        tried = tuple((tuple(sizes), float(seconds)) for sizes, seconds in (data or {}).get("tried", ()))
        return Search(**{**data, "tried": tried}) if data else None
    except (TypeError, ValueError):
        return None
