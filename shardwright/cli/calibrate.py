"""``shardwright calibrate``: measures this machine for the price model."""

from __future__ import annotations

import argparse
import math
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardwright.cli.options import _count, _printed, _seconds, _UsageError
from shardwright.cost.algorithms import VARIABLE as CALIBRATION
from shardwright.cost.algorithms import Calibration, location
from shardwright.cost.machine_files import PRESETS, calibrated, load_machine
from shardwright.cost.machine_files import VARIABLE as MACHINE
from shardwright.errors import ShardwrightError
from shardwright.ir.machine import Machine

if TYPE_CHECKING:
    from shardwright.calibrate.operators import Sample


CALIBRATE_HELP = """\
Measure this machine: which algorithm is fastest for each collective, and what operators and training steps take.

Starts N processes that communicate over gloo and lets all algorithms take turns, from 1 KB to 16 MB, among 2 to N ranks.
What is found is kept in a file that jobs read when they start: what SHARDWRIGHT_CALIBRATION names, else
shardwright/calibration.json in XDG_CACHE_HOME, else in ~/.cache. It changes how long collectives take, never what they
compute. NCCL has its own ways and needs no calibration.

Then all ranks time operators, which takes half as long again, and train three small models under many plans, about two
minutes. This makes the machine cpu-gloo, on which plans are priced: shardwright/cpu-gloo.toml beside the other file.

Run it while the machine has nothing else to do. Without the files, values measured on a machine of two cores hold."""
CALIBRATE_EXAMPLES = """\
examples:
  shardwright calibrate
  shardwright calibrate --ranks 8 --seconds 60
  shardwright calibrate --no-steps                    (prices are then further from the times that steps take)
  shardwright calibrate --output cluster.json         (then SHARDWRIGHT_CALIBRATION=cluster.json torchrun ... train.py,
                                                       and SHARDWRIGHT_MACHINE=cluster.toml for prices)"""


def add_parser(commands: Any) -> None:
    """Adds the command and its arguments to the command line's commands."""
    parser = commands.add_parser(
        "calibrate",
        help="measure this machine: its collectives, and what operators and steps take",
        description=CALIBRATE_HELP,
        epilog=CALIBRATE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=_calibrate, name="calibrate")
    parser.add_argument("--ranks", type=_count, default=4, metavar="N", help="number of processes; default: 4")
    parser.add_argument(
        "--seconds",
        type=_seconds,
        default=20.0,
        metavar="S",
        help="of collectives; operators take half as much besides, steps as much at least; default: 20",
    )
    parser.add_argument("--no-steps", action="store_true", help="leave out the training steps")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help="where to keep it, instead of where jobs look; the machine: FILE.toml"
    )


def _calibrate(arguments: argparse.Namespace) -> int:
    from rich.console import Console  # here: importing it draws from Python's random generator
    from rich.progress import Progress

    from shardwright.calibrate.collectives import measure
    from shardwright.calibrate.operators import fit_machine, save_machine

    ranks, seconds = arguments.ranks, arguments.seconds
    path = arguments.output or location()
    toml = calibrated() if arguments.output is None else path.with_suffix(".toml")
    if toml == path:
        raise _UsageError(f"--output {path}: the machine goes into {toml}; name another file, {path.with_suffix('.json')}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(f"measuring {ranks} ranks", total=1.0)
            found = measure(ranks, seconds, lambda done: progress.update(task, completed=done))
            found.collectives.save(path)
            # from the preset: results of an older calibration do not count
            base, said = load_machine(PRESETS / "cpu-gloo.toml"), f"measured by shardwright calibrate with {ranks} ranks"
            machine = fit_machine(base, found.operators, found.collectives.links, said)
            texts = [_calibration_table(found.collectives), _machine_table(machine, found.operators)]
            if not arguments.no_steps:
                steps = progress.add_task(f"training on {ranks} ranks", total=1.0)
                machine, text = _fit_steps(arguments, machine, path, lambda done: progress.update(steps, completed=done))
                texts.append(text)
        save_machine(machine, toml)
    except ShardwrightError as error:
        raise _UsageError(str(error)) from None
    except OSError as error:
        raise _UsageError(f"{path} cannot be written: {error}") from None
    print("\n\n".join(texts))
    print(f"\nkept in {path} and {toml}")
    if arguments.output is None and os.environ.get(MACHINE):
        print(f"plans are priced on {os.environ[MACHINE]} all the same, which {MACHINE} names")
    return 0


def _fit_steps(
    arguments: argparse.Namespace, machine: Machine, calibration: Path, progress: Callable[[float], None]
) -> tuple[Machine, str]:
    """Fits the machine to the times that whole steps take.

    Returns:
        The machine, and a text that says how far off prices were and are.
    """
    from shardwright.calibrate.fit import fit_terms
    from shardwright.calibrate.steps import measure_steps

    before = os.environ.get(CALIBRATION)
    os.environ[CALIBRATION] = str(calibration)  # the steps use the collectives just found to be the fastest
    try:
        steps = measure_steps(arguments.ranks, arguments.seconds, machine, progress)
    finally:
        del os.environ[CALIBRATION]
        if before is not None:
            os.environ[CALIBRATION] = before
    found = fit_terms(machine, [s.price for s in steps], [s.terms for s in steps], [s.seconds for s in steps])
    level = found.machine.levels[0]
    return found.machine, (
        f"in training steps a collective takes {found.machine.collective_launch * 1e6:.0f} µs, a message "
        f"{level.latency * 1e6:.0f} µs, and a rank sends {level.bandwidth / 1e6:.0f} MB/s;\nprices of {len(steps)} steps were "
        f"{found.before:.0%} off in the median, and now are {found.after:.0%}"
    )


def _machine_table(machine: Machine, samples: Sequence[Sample]) -> str:
    """Builds a table of operators' rates by family, and how far off their prices are."""
    from rich.table import Table

    from shardwright.calibrate.operators import errors_of

    off = errors_of(machine, samples)
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for name in ("operators", "GFLOP/s", "GB/s", "off by"):
        table.add_column(name, justify="left" if name == "operators" else "right", no_wrap=True)
    for family, dtype in dict.fromkeys((s.family, s.dtype) for s in samples if s.family in off):
        works = any(s.flops for s in samples if s.family == family)
        rate = machine.rate(family, dtype) if works else machine.bandwidth_of(family)
        name, text = f"{family} {dtype}" if works else family, f"{rate / 1e9:.1f}"
        table.add_row(name, *((text, "") if works else ("", text)), f"{off[family]:.2f}×")
    launch = f"a call takes {machine.operator_launch * 1e6:.1f} µs to start"
    if not off:
        return launch
    return f"{_printed(table)}\n\n{launch}; prices of operators are {statistics.median(off.values()):.2f}× off in the median"


def _calibration_table(found: Calibration) -> str:
    """Builds a table of the fastest algorithms, each with the size up to which it is."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for name, justify in (("collective", "left"), ("ranks", "right"), ("fastest, up to that many bytes", "left")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for operation, measured in found.tables.items():
        for ranks, rows in measured.items():
            last = [i + 1 == len(rows) or rows[i + 1][1][0] != names[0] for i, (_, names) in enumerate(rows)]
            best = [names[0] + _limit_text(limit) for (limit, names), is_last in zip(rows, last) if is_last]
            table.add_row(operation, str(ranks), ", ".join(best))
    links = found.links
    said = (
        f"an operation takes {links.launch * 1e6:.0f} µs, a message {links.latency * 1e6:.0f} µs, and a rank sends "
        f"{links.bandwidth / 1e6:.0f} MB/s when all do"
    )
    return f"{_printed(table)}\n\n{said}"


def _limit_text(limit: float) -> str:
    if limit == math.inf:
        return ""
    return f" {limit / 1024:.0f} KB" if limit < 1 << 20 else f" {limit / (1 << 20):.0f} MB"
