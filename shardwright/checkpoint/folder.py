"""Folders of checkpoints: each is written beside, and renamed when it is whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from shardwright.errors import WorldError

INDEX = "index.json"
VERSION = 1
_PARTIAL, _REPLACED = ".partial-", ".replaced-"


def begin(folder: Path, step: int) -> Path:
    """Removes what saves that were cut off have left, and returns a new folder to write in."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in [*folder.glob(f"{_PARTIAL}*"), *folder.glob(f"{_REPLACED}*")]:
        step_folder = folder / left.name.removeprefix(_REPLACED)
        if left.name.startswith(_REPLACED) and not step_folder.exists():
            left.rename(step_folder)  # the save that would replace it ended between two renames
        else:
            shutil.rmtree(left)
    path = folder / f"{_PARTIAL}step-{step}"
    path.mkdir()
    return path


def finish(partial: Path, index: dict[str, Any]) -> Path:
    """Writes the index, last, and gives the folder its name. Returns it."""
    path = partial / INDEX
    path.write_text(json.dumps(index), "utf-8")
    sync(path)
    sync(partial)
    name = partial.name.removeprefix(_PARTIAL)
    final, replaced = partial.with_name(name), partial.with_name(_REPLACED + name)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """Returns the checkpoint of the highest step in a folder; ``None`` without one.

    >>> latest("/nowhere") is None
    True
    """
    found = [p for p in Path(folder).glob("step-*") if p.name[5:].isdigit() and (p / INDEX).is_file()]
    return max(found, key=lambda p: int(p.name[5:]), default=None)


def read_index(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Returns a checkpoint's folder, the newest where several are in ``folder``, and its index.

    Raises:
        WorldError: there is none, or it is of another version.
    """
    path = folder if (folder / INDEX).is_file() else latest(folder)
    if path is None:
        raise WorldError(f"{folder} holds no checkpoint: give a folder that sw.save(folder, ...) wrote to")
    try:
        index = json.loads((path / INDEX).read_text("utf-8"))
        version = index["version"]
        whole = all(isinstance(index[key], dict) for key in ("tensors", "values"))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WorldError(f"{path / INDEX} is no index of a checkpoint ({error}): load another step") from error
    if version != VERSION or not whole:
        raise WorldError(f"{path / INDEX} is of version {version}, and this reads version {VERSION}: load another step")
    return path, index
