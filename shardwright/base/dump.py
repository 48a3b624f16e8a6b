"""Dump: writes the text of graph, plan and program after each pass.

``SHARDWRIGHT_DUMP=folder`` turns it on: a folder per call that is planned, a file per pass, numbered in their order.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable
from pathlib import Path

VARIABLE = "SHARDWRIGHT_DUMP"

_calls = itertools.count()


class Dump:
    """Writes texts to files of one folder; without a folder it writes nothing.

    >>> Dump().write("graph", "capture", lambda: "a text that nobody asks for")
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self._steps = itertools.count()

    def write(self, kind: str, name: str, text: Callable[[], str]) -> None:
        """Writes the text of what a pass made.

        Args:
            kind: ``graph``, ``plan`` or ``program``.
            name: of the pass.
            text: makes the text; called only if one is written.
        """
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{next(self._steps):02d}-{kind}-{re.sub('[^a-z0-9]+', '-', name.lower())}.txt"
            path.write_text(text() + "\n", "utf-8")


NO_DUMP = Dump()


def dump_of(name: str, rank: int | None) -> Dump:
    """Makes the dump of one call of a target, in a new folder.

    Args:
        name: of the target.
        rank: of this process in a job; ``None`` if one process simulates all.
    """
    root = os.environ.get(VARIABLE)
    if not root:
        return NO_DUMP
    folder = Path(root) if rank is None else Path(root) / f"rank{rank}"
    return Dump(folder / f"{next(_calls):03d}-{name}")
