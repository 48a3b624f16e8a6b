"""``shardwright run``: runs a script on simulated ranks, or on processes of this machine and others."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shardwright.cli.options import _count, _Parser, _UsageError
from shardwright.cli.run_flags import REAL_FLAGS
from shardwright.cli.run_settings import DEFAULT_DEVICES, DEVICES, devices_from_environment, find_launch
from shardwright.launch.background import start_in_background
from shardwright.launch.job import Launch, python_command, worker_variables
from shardwright.launch.logs import make_folder
from shardwright.launch.meeting import interface_toward
from shardwright.world.current import init

RUN_HELP = """\
Run a Python script with several devices.

By default the devices are simulated: the script runs once, in this process, and every parallel program in it runs on N
ranks with the values that a real job has. With --distributed, or any option of jobs, the script runs in a process for
each rank, over gloo or NCCL, under torch's own launcher. Where a rank fails, the job ends and says which and why."""
RUN_EXAMPLES = """\
examples:
  shardwright run --devices 8 examples/mnist_ops.py --epochs 2
  shardwright run --nproc-per-node 4 --log-dir logs examples/mnist_ops.py
  shardwright run --nnodes 2 --node-rank 0 --nproc-per-node 8 --master-addr n1 --master-port 29500 train.py
  shardwright run --nproc-per-node 2 pytest tests/test_parallel.py
  shardwright run --nproc-per-node 4 --dry-run train.py

The script is a file, or python, python3 or pytest with arguments, or a module after -m. Options may also come from
variables as torchrun reads them: PET_NPROC_PER_NODE, PET_NNODES, PET_NODE_RANK and so on."""


class _RunParser(_Parser):
    """A parser whose ``--join`` and ``--dry-run`` may have a value or none."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        return super().parse_known_args(self._with_values(list(sys.argv[1:] if args is None else args)), namespace)

    def _with_values(self, args: list[str]) -> list[str]:
        """Writes a value after each ``--join`` and ``--dry-run`` before the script."""
        at = 0
        while at < len(args) and args[at].startswith("-") and args[at] != "--":
            name, following = args[at], args[at + 1] if at + 1 < len(args) else ""
            if name == "--join":
                args[at : at + 2] = [f"--join={following}"] if following in ("True", "False") else ["--join=True", following]
            elif name == "--dry-run":
                args[at : at + 2] = [f"--dry-run={following}"] if following.isdecimal() else ["--dry-run=all", following]
            elif "=" not in name:
                action = self._option_string_actions.get(name)
                at += 0 if action is None or action.nargs == 0 else 1
            at += 1
        return [arg for number, arg in enumerate(args) if arg or number < at]


def add_parser(commands: Any) -> None:
    """Adds the command and its arguments to the command line's commands."""
    commands._parser_class, before = _RunParser, commands._parser_class
    parser = commands.add_parser(
        "run",
        help="run a script on simulated devices, or in several processes",
        description=RUN_HELP,
        epilog=RUN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands._parser_class = before
    parser.set_defaults(command=_run, name="run")
    parser.add_argument(
        "--devices", type=_count, metavar="N", help=f"number of devices; default: {DEVICES}, else {DEFAULT_DEVICES}"
    )
    parser.add_argument("--distributed", action="store_true", help="start N processes instead of simulating N ranks")
    _add_job(parser.add_argument_group("jobs of processes"))
    parser.add_argument("-m", "--module", action="store_true", help="the script is a module, as with python -m")
    parser.add_argument("script", metavar="script.py", help="the script to run, or python, python3 or pytest")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the script")


def _add_job(group: Any) -> None:
    """Adds the options of jobs; ``REAL_FLAGS`` has their names, metavars and help."""
    for flag in REAL_FLAGS:
        names = [flag.name, *flag.older]
        if flag.metavar:
            group.add_argument(*names, metavar=flag.metavar, help=flag.help)
        else:
            group.add_argument(*names, action="store_const", const="1", help=flag.help)
    group.add_argument("--no-join", dest="join", action="store_const", const="False", help="return at once; see --join")


def _run(arguments: argparse.Namespace) -> int:
    if {"RANK", "WORLD_SIZE"} <= set(os.environ):
        raise _UsageError(
            f"this process is already rank {os.environ['RANK']} of a job of {os.environ['WORLD_SIZE']}: start the "
            "script itself, torchrun --nproc-per-node 8 script.py"
        )
    is_program = arguments.module or arguments.script in ("python", "python3", "pytest")
    if not is_program and not Path(arguments.script).is_file():
        raise _UsageError(f"there is no file {arguments.script}")
    command = python_command(arguments.script, arguments.arguments, arguments.module)
    launch, devices = find_launch(arguments, command, os.environ)
    if launch is None:
        _run_simulated(devices or devices_from_environment(os.environ), arguments)
        return 0
    if arguments.dry_run is not None:
        return _print_ranks(launch, arguments.dry_run)
    return _start(launch, arguments.join != "False")


def _start(launch: Launch, joins: bool) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        if launch.folder is not None:
            make_folder(Path(launch.folder))
    except OSError as error:
        raise _UsageError(f"--log-dir {launch.folder}: {error.strerror or error}; name another directory") from None
    if joins:
        from shardwright.launch.engine import run_job

        return run_job(launch)
    number, path = start_in_background(launch)
    print(f"started in the background: pid {number}, log {path}")
    return 0


def _print_ranks(launch: Launch, wanted: str) -> int:
    """Prints the variables and the command line of all ranks or of one, as a shell takes them."""
    import shlex

    size = launch.nodes * launch.ranks
    if wanted != "all" and int(wanted) >= size:
        raise _UsageError(f"--dry-run {wanted}: the job's ranks go from 0 to {size - 1}")
    variables = worker_variables(launch, interface_toward(launch.address, launch.port)[1])
    for rank in range(size) if wanted == "all" else (int(wanted),):
        node, local = divmod(rank, launch.ranks)
        places = {
            "RANK": rank,
            "LOCAL_RANK": local,
            "WORLD_SIZE": size,
            "LOCAL_WORLD_SIZE": launch.ranks,
            "GROUP_RANK": node,
            "GROUP_WORLD_SIZE": launch.nodes,
            "MASTER_ADDR": launch.address,
            "MASTER_PORT": launch.port or 29500,
            **variables,
        }
        bound = ["taskset", "-c", ",".join(map(str, launch.cores[local]))] if local in launch.cores else []
        if local in launch.memory_nodes:
            bound += ["numactl", f"--membind={launch.memory_nodes[local]}"]
        print(shlex.join(["env", *(f"{name}={value}" for name, value in places.items()), *bound, *launch.command]))
    return 0


def _run_simulated(devices: int, arguments: argparse.Namespace) -> None:
    """Runs the script as ``python script.py arguments`` would, on simulated ranks."""
    script, rest, is_module = _as_python_runs(arguments)
    before = os.environ.get(DEVICES), sys.argv, sys.path[:]
    os.environ[DEVICES] = str(devices)
    sys.argv = [script, *rest]
    sys.path[:1] = [os.getcwd() if is_module else str(Path(script).resolve().parent)]
    try:
        init(devices)
        if is_module:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(script, run_name="__main__")
    finally:
        count, sys.argv, sys.path[:] = before
        if count is None:
            del os.environ[DEVICES]
        else:
            os.environ[DEVICES] = count


def _as_python_runs(arguments: argparse.Namespace) -> tuple[str, Sequence[str], bool]:
    """Returns the script or module that is run, its arguments, and whether it is a module."""
    script, rest = arguments.script, arguments.arguments
    if arguments.module or script == "pytest":
        return script, rest, True
    if script not in ("python", "python3"):
        return script, rest, False
    if rest[:1] == ["-m"] and len(rest) > 1:
        return rest[1], rest[2:], True
    if not rest or rest[0].startswith("-"):
        raise _UsageError("on simulated ranks python runs a file or -m module: name one, or start processes with --distributed")
    if not Path(rest[0]).is_file():
        raise _UsageError(f"there is no file {rest[0]}")
    return rest[0], rest[1:], False
