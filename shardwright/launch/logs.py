"""Logs of a job: a file for each rank, one of the launcher, and the last words of a rank that failed."""

from __future__ import annotations

import logging
import os
import re
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

_LINES, _WIDTH, _READ = 12, 500, 60_000  # of a rank's last words, and the bytes that they are sought in
_FRAME = re.compile(r'(\[rank\d+\]: )?  File "(?P<file>[^"]+)", line \d+')
_START = re.compile(r"Traceback \(most recent call last\):$|^Fatal Python error: ")
_NOISE = ("Thread 0x", "Current thread 0x", "Extension modules: ")  # between the frames of a process that a signal ended
_INDENTED = re.compile(r"(\[rank\d+\]: )?  ")
_LIBRARIES = ("<", str(Path(__file__).resolve().parents[1]), sysconfig.get_path("stdlib"))
_ELASTIC = "torch.distributed.elastic"


class Logs(LogsSpecs):
    """Destinations of each rank's output.

    With ``joins_streams`` a rank writes both streams into its log, which is shown with its rank before each line; else
    only its errors, which are shown as they are.

    Args:
        folder: directory of the logs; it exists.
        name: how their names begin.
        shown: ranks whose output is printed; ``None``: all.
        joins_streams: whether standard output goes into the log too.
    """

    def __init__(self, folder: Path, name: str, shown: tuple[int, ...] | None, joins_streams: bool):
        super().__init__(str(folder))
        self.folder, self.name, self.shown, self.joins_streams = folder, name, shown, joins_streams

    @property
    def root_log_dir(self) -> str:
        return str(self.folder)

    def path(self, rank: int) -> Path:
        """Returns the log of a rank."""
        return self.folder / f"{self.name}_{rank}.log"

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Names the files of an attempt's ranks; keeps the logs of the attempt before under another name."""
        files, shown, failures = {}, {}, {}
        for local, variables in envs.items():
            rank, attempt = int(variables["RANK"]), int(variables["TORCHELASTIC_RESTART_COUNT"])
            path = self.path(rank)
            if attempt and path.exists():
                path.replace(path.with_suffix(f".attempt_{attempt - 1}.log"))
            files[local] = str(path)
            if self.shown is None or rank in self.shown:
                shown[local] = str(path)
            failures[local] = variables["TORCHELASTIC_ERROR_FILE"] = str(path.with_suffix(".error.json"))
            Path(failures[local]).unlink(missing_ok=True)
        console = dict.fromkeys(envs, "")
        if self.joins_streams:
            return LogsDest(files, console, shown, {}, failures)
        if self.shown is not None:
            console = {local: "" if local in shown else os.devnull for local in envs}
        return LogsDest(console, files, {}, shown, failures)


class LauncherLog:
    """The launcher's own messages: on the terminal, and in its log.

    Args:
        path: its log; ``None``: none.
        in_background: whether standard error is that log already.
    """

    def __init__(self, path: Path | None, in_background: bool = False):
        self._file: TextIO | None = None
        self._is_stderr = in_background
        self.names_files = False  # whether it has told where ranks' logs are, which then stay
        if in_background:
            self._file = sys.stderr
        elif path is not None:
            self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115

    def say(self, text: str) -> None:
        """Prints a message."""
        if not self._is_stderr:
            print(f"shardwright: {text}", file=sys.stderr, flush=True)
        self.note(text)

    def note(self, text: str) -> None:
        """Writes into the log only."""
        if self._file is not None:
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", file=self._file, flush=True)

    def close(self) -> None:
        """Closes the log."""
        if self._file is not None and not self._is_stderr:
            self._file.close()
        self._file = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Puts what torch's launcher logs into the log instead of on the terminal, where it would hide what counts."""
        logger = logging.getLogger(_ELASTIC)
        before = logger.propagate
        handler: logging.Handler = logging.NullHandler()
        if self._file is not None:
            handler = logging.StreamHandler(self._file)
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.propagate = before


def make_folder(path: Path) -> None:
    """Makes a directory of logs that only its owner may read; leaves one that is there as it is.

    Raises:
        OSError: it cannot be made, or not be written.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written")


def last_lines(path: Path) -> list[str]:
    """Returns the last lines of a log that are not empty; of a traceback the user's lines and the error.

    A log that is not there has none.
    """
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _READ))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = [line[:_WIDTH] for line in re.split(r"[\r\n]+", text) if line.strip()]
    starts = [at for at, line in enumerate(lines) if _START.search(line)]
    if not starts:
        return lines[-_LINES:]
    found = _without_libraries(lines[starts[-1] :])
    if lines[starts[-1]].startswith("Fatal"):  # where the process was when a signal ended it; why stands before it
        return [*lines[max(0, starts[-1] - 2) : starts[-1]], *found[:_LINES]]
    return found[-_LINES:]


def _without_libraries(lines: list[str]) -> list[str]:
    """Leaves out those frames of a traceback that are in libraries and in this package."""
    kept, keeps = [], True
    for line in lines:
        match = _FRAME.match(line)
        if match is not None:
            keeps = not (match["file"].startswith(_LIBRARIES) or "site-packages" in match["file"])
        elif not _INDENTED.match(line):
            keeps = not line.startswith(_NOISE)
        if keeps:
            kept.append(line)
    return kept
