"""The pages say the truth: every python block of README.md and docs/ runs, and prints what the page says it prints.

The blocks of a page share a namespace. A ```text block right after a python block is what that prints: ``...`` stands
for anything, and runs of blanks count as one.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

import shardwright as sw

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
NAMES = [page.stem for page in PAGES]

_BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n?^```text\n(.*?)^```$)?", re.M | re.S)
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Block(NamedTuple):
    line: int
    code: str
    expected: str | None


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    return [Block(text.count("\n", 0, m.start(1)) + 1, m[1], m[2]) for m in _BLOCK.finditer(text)]


def run(page: Path, block: Block, namespace: dict[str, object]) -> str:
    """Runs a block; a traceback shows the line of the page."""
    code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, namespace)
    return printed.getvalue()


@pytest.mark.whole
@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_block_runs_and_prints_what_the_page_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shardwright.world.current._current", [])
    sw.init(devices=8)
    namespace = vars(ModuleType("page"))
    found = blocks(page)
    if page.name != "performance.md":
        assert found, f"{page.name} has no example"
    for block in found:
        printed = run(page, block, namespace)
        if block.expected is not None:
            same = doctest.OutputChecker().check_output(block.expected, printed, _FLAGS)
            assert same, f"{page.name}, line {block.line}: the page says\n{block.expected}\nbut it prints\n{printed}"


@pytest.mark.whole
@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_link_leads_somewhere(page):
    dead = [link for link in _LINK.findall(page.read_text("utf-8")) if not (page.parent / link).exists()]
    assert not dead


def test_the_readme_links_to_every_page():
    linked = {link for link in _LINK.findall((ROOT / "README.md").read_text("utf-8"))}
    assert {f"docs/{page.name}" for page in PAGES if page.parent.name == "docs"} <= linked


def test_a_page_that_says_something_else_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\nprint(2.34)\n```\n\n```text\n1\n2...\n```\n\n```python\nx = 1\n```\n")
    first, second = blocks(page)
    assert (first.line, first.expected, second.expected) == (2, "1\n2...\n", None)
    assert doctest.OutputChecker().check_output(first.expected or "", run(page, first, {}), _FLAGS)
    assert not doctest.OutputChecker().check_output("1\n3...\n", run(page, first, {}), _FLAGS)
