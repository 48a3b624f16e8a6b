"""Reads arguments and prints errors, for all commands."""

from __future__ import annotations

import argparse
import io
import math
from typing import Any


class _UsageError(Exception):
    """A mistake in the arguments; its text is one clear line."""


class _Parser(argparse.ArgumentParser):
    """A parser whose layouts may stand between its options: ``--shape 4,4 "dp,None" --shape 4 "dp"``."""

    mixed = False

    def error(self, message: str) -> Any:
        """Prints an error as one line, without the usage of the command, and exits."""
        self.exit(2, f"{self.prog}: error: {message}\n  {self.prog} --help says what it takes\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        if not self.mixed:
            return super().parse_known_args(args, namespace)
        self.mixed = False  # parse_known_intermixed_args comes back here
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self.mixed = True


def _ints(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if text.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of ints; write 2,2,2") from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of devices; write 8")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds; write 20")
    return seconds


def _printed(*tables: Any) -> str:
    """Renders tables and texts as text, whatever the terminal."""
    from rich.console import Console  # here: importing it draws from Python's random generator

    console = Console(file=io.StringIO(), width=10_000, no_color=True, highlight=False, markup=False)
    for table in tables:
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.rstrip().splitlines())
