"""The command line: ``shardwright layout``, ``run`` and ``calibrate``, also as ``python -m shardwright``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shardwright.cli import plan as cli_plan
from shardwright.cli.calibrate import CALIBRATE_EXAMPLES, CALIBRATE_HELP, _calibrate
from shardwright.cli.layout import LAYOUT_EXAMPLES, LAYOUT_HELP, _layout
from shardwright.cli.options import _count, _ints, _names, _Parser, _seconds, _UsageError
from shardwright.cli.run import DEFAULT_DEVICES, DEVICES, RUN_EXAMPLES, RUN_HELP, _run

if TYPE_CHECKING:
    pass


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
    style = argparse.RawDescriptionHelpFormatter

    layout = commands.add_parser(
        "layout",
        help="print and draw which slice of a tensor every rank holds",
        description=LAYOUT_HELP,
        epilog=LAYOUT_EXAMPLES,
        formatter_class=style,
    )
    layout.mixed = True
    layout.set_defaults(command=_layout, name="layout")
    layout.add_argument("--devices", required=True, type=_ints, metavar="2,2,2", help="device matrix: ranks along each axis")
    layout.add_argument("--axes", required=True, type=_names, metavar="dp,sp,mp", help="alias of each axis")
    layout.add_argument("--ranks", type=_ints, metavar="0,2,1,...", help="rank at each position, row-major; default 0,1,...")
    layout.add_argument(
        "--shape",
        required=True,
        type=_ints,
        action="append",
        metavar="32,784",
        help="global shape of the tensor; one for all layouts, or one for each in their order",
    )
    layout.add_argument("--draw", metavar="FILE", help="draw the tensor and the device grid to a .png or .svg file")
    layout.add_argument("layouts", nargs="+", metavar="LAYOUT", help='one entry a dim: "mp,(sp,dp)"')

    run = commands.add_parser(
        "run",
        help="run a script on simulated devices, or in several processes",
        description=RUN_HELP,
        epilog=RUN_EXAMPLES,
        formatter_class=style,
    )
    run.set_defaults(command=_run, name="run")
    run.add_argument(
        "--devices", type=_count, metavar="N", help=f"number of devices; default: {DEVICES}, else {DEFAULT_DEVICES}"
    )
    run.add_argument("--distributed", action="store_true", help="start N processes instead of simulating N ranks")
    run.add_argument("script", metavar="script.py", help="the script to run")
    run.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the script")

    cli_plan.add_parser(commands, _count, _ints, _names, _seconds)

    calibrate = commands.add_parser(
        "calibrate",
        help="measure this machine: its collectives, and what operators and steps take",
        description=CALIBRATE_HELP,
        epilog=CALIBRATE_EXAMPLES,
        formatter_class=style,
    )
    calibrate.set_defaults(command=_calibrate, name="calibrate")
    calibrate.add_argument("--ranks", type=_count, default=4, metavar="N", help="number of processes; default: 4")
    calibrate.add_argument(
        "--seconds",
        type=_seconds,
        default=20.0,
        metavar="S",
        help="of collectives; operators take half as much besides, steps as much at least; default: 20",
    )
    calibrate.add_argument("--no-steps", action="store_true", help="leave out the training steps")
    calibrate.add_argument(
        "--output", type=Path, metavar="FILE.json", help="where to keep it, instead of where jobs look; the machine: FILE.toml"
    )
    return parser


# -- layout -------------------------------------------------------------------------------------------------------


# -- run ----------------------------------------------------------------------------------------------------------


# -- calibrate ----------------------------------------------------------------------------------------------------
