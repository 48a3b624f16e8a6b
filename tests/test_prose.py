"""Docstrings say first what a function does, in the third person, and name what it raises and takes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import shardwright

PACKAGE = Path(shardwright.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
RIDDLES = {"What", "How", "Where", "Whether", "Which", "Of", "That", "When", "Who", "This", "The"}
NOUNS = {"Axes", "Bytes", "Layouts", "Pairs", "Positions", "Ranks", "Seconds", "Steps", "Values"}
LONGEST = 20  # words of a first sentence; fifteen are better
Documented = ast.FunctionDef | ast.ClassDef


def documented(path: Path) -> Iterator[tuple[Documented, str]]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (text := ast.get_docstring(node)):
            yield node, text


def is_property(node: Documented) -> bool:
    return any("property" in ast.unparse(decorator) for decorator in node.decorator_list)


def first_word(text: str) -> str:
    return text.split()[0].strip("`*,.:;")


def does(word: str) -> bool:
    """Whether a word is a verb in the third person, as far as its letters tell."""
    return word[:1].isupper() and word.endswith("s") and word not in NOUNS


@pytest.mark.whole
@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_docstrings(path):
    wrong = []
    for node, text in documented(path):
        word = first_word(text)
        is_function = isinstance(node, ast.FunctionDef) and not is_property(node)
        if not text.startswith(("``", ":", "`` ")) and (not does(word) if is_function else word in RIDDLES - {"The"}):
            wrong.append(f"{node.name}:{node.lineno} begins with {word!r}")
        sentence = re.split(r"(?<=[.:;])\s|\n\s*\n", text, maxsplit=1)[0]
        if is_function and len(sentence.split()) > LONGEST:
            wrong.append(f"{node.name}:{node.lineno} has a first sentence of {len(sentence.split())} words")
    assert wrong == []


def raised_by(node: ast.FunctionDef) -> set[str]:
    """Errors of the package that a function raises itself, not within functions in it."""
    found: set[str] = set()
    todo: list[ast.AST] = list(node.body)
    while todo:
        inner = todo.pop()
        if isinstance(inner, (ast.FunctionDef, ast.Lambda, ast.ClassDef)):
            continue
        if isinstance(inner, ast.Raise) and isinstance(inner.exc, ast.Call) and isinstance(inner.exc.func, ast.Name):
            found.add(inner.exc.func.id)
        todo += ast.iter_child_nodes(inner)
    return {name for name in found if hasattr(shardwright.errors, name)}


@pytest.mark.whole
@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_functions_name_their_errors_and_arguments(path):
    wrong = []
    for node, text in documented(path):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        if raised_by(node) and "Raises:" not in text and "Raises " not in text and "Refuses" not in text:
            wrong.append(f"{node.name}:{node.lineno} raises {', '.join(sorted(raised_by(node)))}")
        takes = [a.arg for a in (*node.args.args, *node.args.kwonlyargs) if a.arg not in ("self", "cls")]
        if len(takes) >= 4 and "Args:" not in text:
            wrong.append(f"{node.name}:{node.lineno} takes {', '.join(takes)}")
    assert wrong == []
