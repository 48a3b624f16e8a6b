"""Every folder's ``__init__`` maps its files, and the facade names what users may touch."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import shardwright

PACKAGE = Path(shardwright.__file__).parent
FOLDERS = sorted({path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE})


@pytest.mark.whole
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(PACKAGE)))
def test_a_folder_maps_its_files(folder):
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8"))) or ""
    there = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("__")}
    there |= {f"{path.name}/" for path in folder.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    mapped = {line.split("``")[1] for line in text.splitlines() if line.startswith("``")}
    assert mapped == there


def test_the_facade_shows_what_users_may_touch():
    assert dir(shardwright) == sorted(shardwright.__all__)
    rooms = {folder.name for folder in FOLDERS if folder.parent == PACKAGE}
    assert not rooms.intersection(dir(shardwright)) - {"data"}
    assert all(hasattr(shardwright, name) for name in shardwright.__all__)
