"""The folders of steps: made whole or not at all, the newest, and those that are dropped."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from shardwright.checkpoint.files import sync
from shardwright.checkpoint.index import NAME, read_index
from shardwright.errors import CheckpointError

_STEP = re.compile(r"step-(\d+)")


def folder_of(folder: Path, step: int) -> Path:
    """Returns the folder of a step."""
    return folder / f"step-{step}"


def unfinished(folder: Path, step: int) -> Path:
    """Returns the folder in which a step is saved, until it is whole."""
    return folder / f".step-{step}.saving"


def steps_in(folder: Path) -> list[int]:
    """Lists the steps that a folder has whole checkpoints of, oldest first."""
    found = [_STEP.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for match in found if match is not None and (folder / match[0] / NAME).is_file())


def prepare(folder: Path, step: int) -> Path:
    """Makes the folder in which a step is saved, and clears away what saves left that were cut short.

    Args:
        folder: of the checkpoints.
        step: the step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    recover(folder)
    for path in folder.glob(".step-*.saving"):
        shutil.rmtree(path, ignore_errors=True)
    place = unfinished(folder, step)
    place.mkdir()
    return place


def recover(folder: Path) -> None:
    """Puts a step back that was being replaced when its process ended."""
    for path in folder.glob(".step-*.old") if folder.is_dir() else ():
        step = folder / path.name[1 : -len(".old")]
        if step.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(step)


def publish(folder: Path, step: int) -> Path:
    """Gives a step that is saved whole its name.

    Args:
        folder: of the checkpoints.
        step: the step.
    """
    place, final, old = unfinished(folder, step), folder_of(folder, step), folder / f".step-{step}.old"
    sync(place)
    if final.exists():
        final.rename(old)
    place.rename(final)
    sync(folder)
    shutil.rmtree(old, ignore_errors=True)
    return final


def drop_others(folder: Path, keep_last: int | None, keep_best: int | None) -> None:
    """Deletes steps but for the newest and the best ones.

    Args:
        folder: of the checkpoints.
        keep_last: how many of the newest are kept; ``None``: all, unless ``keep_best`` is given.
        keep_best: how many of those with the largest metric are kept.
    """
    if keep_last is None and keep_best is None:
        return
    steps = steps_in(folder)
    kept = set(steps[-max(keep_last or 1, 1) :])
    if keep_best:
        metrics = {step: read_index(folder_of(folder, step)).metric for step in steps}
        kept |= set(sorted((s for s in steps if metrics[s] is not None), key=lambda s: (metrics[s], s))[-keep_best:])
    for step in steps:
        if step not in kept:
            gone = folder / f".step-{step}.saving"  # a name that the next save clears away, if this is cut short
            os.replace(folder_of(folder, step), gone)
            shutil.rmtree(gone, ignore_errors=True)


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """Returns the folder of the newest checkpoint; ``None`` without one.

    Args:
        folder: of the checkpoints.

    >>> latest("/nowhere") is None
    True
    """
    steps = steps_in(Path(folder))
    return folder_of(Path(folder), steps[-1]) if steps else None


def newest(folder: Path, step: int | None = None) -> Path:
    """Returns the folder of a checkpoint: the folder itself, that of a step, or that of the newest.

    Args:
        folder: what was given.
        step: the step; ``None``: the newest.

    Raises:
        CheckpointError: there is none.
    """
    if step is None and (folder / NAME).is_file():
        return folder
    steps = steps_in(folder)
    if not steps or (step is not None and step not in steps):
        there = f"it has the steps {', '.join(map(str, steps))}" if steps else "it has none"
        wanted = "checkpoint" if step is None else f"step {step}"
        raise CheckpointError(f"{folder} has no {wanted}: {there}; save one with sw.save({str(folder)!r}, ...)")
    return folder_of(folder, steps[-1] if step is None else step)
