"""Command line: the commands of ``shardwright``, also as ``python -m shardwright``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from shardwright.cli import calibrate, checkpoint, k8s, layout, plan, run
from shardwright.cli.options import _Parser, _UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the arguments; default: those of the process.

    Returns:
        The exit code: 0, 2 for a mistake in the arguments, or that of the job that ``run --distributed`` started. What
        a script raises within ``run``, ``SystemExit`` included, passes through.

    >>> main(["layout", "--devices", "2", "--axes", "dp", "--shape", "5", "dp"])
    dp @ dp=2 of [5]
    <BLANKLINE>
    rank   (dp)   slice of dp   local shape
        0   (0)    [0:3]         [3]
        1   (1)    [3:5]         [2]
    0
    """
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.command(arguments)
    except _UsageError as error:
        print(f"shardwright {arguments.name}: {error}", file=sys.stderr)
        return 2
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shardwright",
        description="Trains a PyTorch model written for one device on many. Each command has a --help of its own.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    for command in (layout, run, plan, calibrate, k8s, checkpoint):
        command.add_parser(commands)
    return parser
