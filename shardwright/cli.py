"""The command line: ``shardwright layout``, ``run`` and ``calibrate``, also as ``python -m shardwright``."""

from __future__ import annotations

import argparse
import io
import math
import os
import runpy
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardwright import cli_plan
from shardwright.cost.machine import PRESETS, Machine, calibrated, load_machine
from shardwright.cost.machine import VARIABLE as MACHINE
from shardwright.errors import LayoutError, ShardwrightError
from shardwright.layout import Layout
from shardwright.world.calibration import VARIABLE as CALIBRATION
from shardwright.world.calibration import Calibration, location
from shardwright.world.current import init

if TYPE_CHECKING:
    from shardwright.cost.calibration import Sample

DEVICES = "SHARDWRIGHT_DEVICES"
DEFAULT_DEVICES = 8

LAYOUT_HELP = """\
Print which slice of a tensor every rank holds under a layout, and draw it.

A layout has one entry a dim, separated by commas: the alias of an axis, None, several aliases in parentheses that
split the dim jointly (the leftmost axis of the device matrix is the most significant), or an order of your own such
as sp>dp. Piece sizes may follow in brackets: "dp[20 12],None". Quote a layout, so that the shell leaves it alone."""

LAYOUT_EXAMPLES = """\
examples:
  shardwright layout --devices 2,2,2 --axes dp,sp,mp --shape 32,784 "mp,(sp,dp)"
  shardwright layout --devices 2,2,2 --axes dp,sp,mp --shape 32,784 "mp,(sp,dp)" --shape 784,512 "(sp,dp),None"
  shardwright layout --devices 8 --axes tp --shape 512,512 "tp,None" --draw weight.png"""

RUN_HELP = """\
Run a Python script with several devices.

By default the devices are simulated: the script runs once, in this process, and every parallel program in it runs on N
ranks with the values that a real job has. With --distributed the script runs in N processes on this machine, as
torchrun starts them, over gloo or NCCL."""

RUN_EXAMPLES = """\
examples:
  shardwright run --devices 8 examples/mnist_ops.py --epochs 2
  shardwright run --devices 4 --distributed examples/mnist_ops.py
  torchrun --nproc-per-node 8 examples/mnist_ops.py        (the same job as with --distributed, started by hand)"""

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


class _UsageError(Exception):
    """A mistake in the arguments; its text is one clear line."""


class _Parser(argparse.ArgumentParser):
    """A parser whose layouts may stand between its options: ``--shape 4,4 "dp,None" --shape 4 "dp"``."""

    mixed = False

    def error(self, message: str) -> Any:
        """Says what is wrong in a line, without all that the command takes."""
        self.exit(2, f"{self.prog}: error: {message}\n  {self.prog} --help says what it takes\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        if not self.mixed:
            return super().parse_known_args(args, namespace)
        self.mixed = False  # parse_known_intermixed_args comes back here
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self.mixed = True


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


# -- layout -------------------------------------------------------------------------------------------------------


def _layout(arguments: argparse.Namespace) -> int:
    tensors = _tensors(arguments)
    print(_layout_table(tensors))
    if arguments.draw is not None:
        from shardwright.report.draw import draw_layouts

        try:
            draw_layouts(tensors, arguments.draw)
        except (ShardwrightError, ImportError, OSError) as error:
            raise _UsageError(f"--draw {arguments.draw}: {error}") from None
        print(f"\ndrawn to {arguments.draw}")
    return 0


def _tensors(arguments: argparse.Namespace) -> list[tuple[Layout, tuple[int, ...]]]:
    """Each layout with its shape, checked."""
    texts, shapes = arguments.layouts, arguments.shape
    if len(shapes) not in (1, len(texts)):
        raise _UsageError(f"{len(texts)} layouts and {len(shapes)} shapes: give one --shape for all, or one a layout")
    if any(size < 0 for shape in shapes for size in shape):
        raise _UsageError("--shape holds a negative size")
    shapes = shapes * len(texts) if len(shapes) == 1 else shapes
    try:
        base = Layout(arguments.devices, arguments.axes, arguments.ranks)
    except ShardwrightError as error:
        raise _UsageError(str(error)) from None
    return [(_one_layout(base, text, shape), shape) for text, shape in zip(texts, shapes, strict=True)]


def _one_layout(base: Layout, text: str, shape: tuple[int, ...]) -> Layout:
    try:
        if "@" in text:
            raise LayoutError("the mesh is given by --devices and --axes; leave out '@ ...'")
        layout = Layout.parse(f"{text} @ {base.mesh}") if text.strip() else base()
        layout.slices(shape)
    except ShardwrightError as error:
        raise _UsageError(f"layout {text!r}: {error}") from None
    return layout


def _layout_table(tensors: Sequence[tuple[Layout, tuple[int, ...]]]) -> str:
    from rich.table import Table  # here: importing it draws from Python's random generator

    mesh = tensors[0][0].mesh
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column(f"({', '.join(mesh.axes)})", no_wrap=True)
    for layout, _ in tensors:
        table.add_column(f"slice of {layout.short() or 'the scalar'}", no_wrap=True)
        table.add_column("local shape", no_wrap=True)
    slices = [layout.slices(shape) for layout, shape in tensors]
    for rank in sorted(mesh.ranks):
        row = [str(rank), f"({', '.join(map(str, mesh.coordinates(rank).values()))})"]
        for (layout, shape), held in zip(tensors, slices, strict=True):
            row += [_slice_text(held[rank]), str(list(layout.local_shape(shape, rank)))]
        table.add_row(*row)
    return _printed(*(f"{layout} of {list(shape)}" for layout, shape in tensors), "", table)


def _slice_text(slices: Sequence[slice]) -> str:
    return "[" + ", ".join(f"{s.start}:{s.stop}" for s in slices) + "]"


# -- run ----------------------------------------------------------------------------------------------------------


def _run(arguments: argparse.Namespace) -> int:
    if {"RANK", "WORLD_SIZE"} <= set(os.environ):
        raise _UsageError(
            f"this process is already rank {os.environ['RANK']} of a job of {os.environ['WORLD_SIZE']}: start the "
            "script itself, torchrun --nproc-per-node 8 script.py"
        )
    if not Path(arguments.script).is_file():
        raise _UsageError(f"there is no file {arguments.script}")
    devices = arguments.devices or _devices_from_environment()
    if arguments.distributed:
        return _run_distributed(devices, arguments.script, arguments.arguments)
    _run_simulated(devices, arguments.script, arguments.arguments)
    return 0


def _devices_from_environment() -> int:
    text = os.environ.get(DEVICES)
    try:
        return DEFAULT_DEVICES if text is None else _count(text)
    except argparse.ArgumentTypeError as error:
        raise _UsageError(f"{DEVICES}={error}") from None


def _run_simulated(devices: int, script: str, arguments: list[str]) -> None:
    """Runs the script as ``python script.py arguments`` would, on simulated ranks."""
    before = os.environ.get(DEVICES), sys.argv, sys.path[:]
    os.environ[DEVICES] = str(devices)
    sys.argv = [script, *arguments]
    sys.path[:1] = [str(Path(script).resolve().parent)]
    try:
        init(devices)
        runpy.run_path(script, run_name="__main__")
    finally:
        count, sys.argv, sys.path[:] = before
        if count is None:
            del os.environ[DEVICES]
        else:
            os.environ[DEVICES] = count


def _run_distributed(devices: int, script: str, arguments: list[str]) -> int:
    """Starts the script in ``devices`` processes on this machine; returns the job's exit code."""
    # the store listens on this machine only, and gloo too: nobody else is to join
    at = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--rdzv-id", f"shardwright-{os.getpid()}"]
    command = ["-m", "torch.distributed.run", *at, "--local-addr", "127.0.0.1", "--nproc-per-node", str(devices), script]
    command += arguments
    environment = dict(os.environ)
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # torchrun warns where this is unset; processes with more threads than cores stand in each other's way
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))
    root = Path(__file__).resolve().parent.parent
    if root.name not in ("site-packages", "dist-packages"):  # a checkout that may not be installed
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), environment.get("PYTHONPATH")]))
    return _become([sys.executable, *command], environment)


# What a service manager, a closed terminal or a scheduler sends; torchrun ends its ranks at each.
_SIGNALS = ("SIGTERM", "SIGHUP", "SIGINT", "SIGQUIT")


def _become(command: list[str], environment: dict[str, str]) -> int:
    """Runs a command in the place of this process, so that signals reach it; where that cannot be, hands them on."""
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "posix":
        os.execve(command[0], command, environment)
    with subprocess.Popen(command, env=environment) as job:
        known = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
        before = {number: signal.signal(number, lambda number, frame: job.send_signal(number)) for number in known}
        try:
            return job.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


# -- calibrate ----------------------------------------------------------------------------------------------------


def _calibrate(arguments: argparse.Namespace) -> int:
    from rich.console import Console  # here: importing it draws from Python's random generator
    from rich.progress import Progress

    from shardwright.cost.calibration import fit_machine, save_machine
    from shardwright.world.calibrate import measure

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
            # from the preset: what an older calibration found is over
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
    """The machine on which the prices of whole steps are nearest the times they take, and what became of it."""
    from shardwright.cost.fit import fit_terms
    from shardwright.whole_steps import measure_steps

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
    """What operators reach, by family, and how many times off their prices are."""
    from rich.table import Table

    from shardwright.cost.calibration import errors_of

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
    """What was chosen: the fastest algorithms, by the size up to which they are."""
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


def _printed(*tables: Any) -> str:
    """Tables and texts as text, whatever the terminal."""
    from rich.console import Console  # here: importing it draws from Python's random generator

    console = Console(file=io.StringIO(), width=10_000, no_color=True, highlight=False, markup=False)
    for table in tables:
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.rstrip().splitlines())


def _limit_text(limit: float) -> str:
    if limit == math.inf:
        return ""
    return f" {limit / 1024:.0f} KB" if limit < 1 << 20 else f" {limit / (1 << 20):.0f} MB"
