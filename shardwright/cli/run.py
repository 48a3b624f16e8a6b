"""``shardwright run``: runs a script on simulated ranks, or on processes of this machine."""

from __future__ import annotations

import argparse
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from shardwright.cli.options import _count, _UsageError
from shardwright.world.current import init

DEVICES = "SHARDWRIGHT_DEVICES"
DEFAULT_DEVICES = 8
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


def add_parser(commands: Any) -> None:
    """Adds the command and its arguments to the command line's commands."""
    parser = commands.add_parser(
        "run",
        help="run a script on simulated devices, or in several processes",
        description=RUN_HELP,
        epilog=RUN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=_run, name="run")
    parser.add_argument(
        "--devices", type=_count, metavar="N", help=f"number of devices; default: {DEVICES}, else {DEFAULT_DEVICES}"
    )
    parser.add_argument("--distributed", action="store_true", help="start N processes instead of simulating N ranks")
    parser.add_argument("script", metavar="script.py", help="the script to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the script")


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
    # the store and gloo listen on this machine only, so that nobody else can join
    at = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--rdzv-id", f"shardwright-{os.getpid()}"]
    command = ["-m", "torch.distributed.run", *at, "--local-addr", "127.0.0.1", "--nproc-per-node", str(devices), script]
    command += arguments
    environment = dict(os.environ)
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # torchrun warns where this is unset; processes with more threads than cores stand in each other's way
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))
    root = Path(__file__).resolve().parents[2]
    if root.name not in ("site-packages", "dist-packages"):  # a checkout that may not be installed
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), environment.get("PYTHONPATH")]))
    return _become([sys.executable, *command], environment)


# What a service manager, a closed terminal or a scheduler sends; torchrun ends its ranks at each.
_SIGNALS = ("SIGTERM", "SIGHUP", "SIGINT", "SIGQUIT")


def _become(command: list[str], environment: dict[str, str]) -> int:
    """Replaces this process by a command, so that signals reach it; where the system cannot, passes signals on."""
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
