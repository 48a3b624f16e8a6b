"""Files, and functions without their docstrings, are as long as one can read at once.

What is longer is listed with its length, and may not grow.
"""

from __future__ import annotations

import ast
from pathlib import Path

import shardwright

PACKAGE = Path(shardwright.__file__).parent
FILE, FUNCTION = 400, 60

LONG_FILES: dict[str, int] = {}
LONG_FUNCTIONS: dict[str, int] = {}


def lengths() -> tuple[dict[str, int], dict[str, int]]:
    files, functions = {}, {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name, text = str(path.relative_to(PACKAGE)), path.read_text("utf-8")
        files[name] = text.count("\n")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                text = node.body[0] if ast.get_docstring(node) else None
                said = 0 if text is None else (text.end_lineno or 0) - text.lineno + 1
                size = (node.end_lineno or 0) - node.lineno + 1 - said
                functions[f"{name}: {node.name}"] = max(size, functions.get(f"{name}: {node.name}", 0))
    return files, functions


def test_files_and_functions_are_short():
    files, functions = lengths()
    assert {n: size for n, size in files.items() if size > LONG_FILES.get(n, FILE)} == {}
    assert {n: size for n, size in functions.items() if size > LONG_FUNCTIONS.get(n, FUNCTION)} == {}


def test_what_is_listed_as_long_still_is():
    files, functions = lengths()
    assert [n for n in LONG_FILES if files.get(n, 0) <= FILE] == []
    assert [n for n in LONG_FUNCTIONS if functions.get(n, 0) <= FUNCTION] == []
