"""``shardwright plan``: plans a script's model for devices that need not exist, on shapes only."""

from __future__ import annotations

import argparse
import inspect
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from shardwright.api.plan_for import plan_for, planning
from shardwright.cli.options import _count, _ints, _names, _seconds
from shardwright.cli.script import run_script
from shardwright.errors import ShardwrightError
from shardwright.pipeline.pipeline_plan import PipelinePlan
from shardwright.report.plan_view import PlanView

HELP = """\
Plan a model for a number of devices that need not exist, and say what a step would cost there.

Nothing is computed: models and inputs on the meta device hold no memory, so a laptop plans what a cluster trains.

The script either defines two functions, model() that returns an nn.Module (or a forward function) and inputs() that
returns its inputs as a tuple; or it trains with shardwright.AutoParallel, and is then run until the first call that would
be planned, whose plan is shown. In that case --meta makes its tensors without memory, and what stands after -- are the
script's own arguments."""

EXAMPLES = """\
examples:
  shardwright plan examples/llama.py --devices 1024 --machine h100 --set size=70b --set batch=512
  shardwright plan train.py --devices 8 --mode recursive_programming --memory 40GB
  shardwright plan train.py --devices 64 --mesh 8,8 --axes dp,tp --html plan.html --save plan.json
  shardwright plan train.py --devices 8 --explain 'layers.0.*'
  shardwright plan train.py --devices 16 --meta -- --layers 48
  shardwright plan --machine list"""


def add_parser(commands: Any) -> None:
    """Adds the command and its arguments to the command line's commands."""
    parser = commands.add_parser(
        "plan",
        help="plan a script's model for devices that need not exist",
        description=HELP,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.mixed = True
    parser.set_defaults(command=run, name="plan")
    parser.add_argument("script", nargs="?", metavar="script.py", help="the script with the model")
    parser.add_argument("arguments", nargs="*", metavar="-- ...", help="arguments of a training script, after --")
    parser.add_argument("--devices", type=_count, metavar="N", help="number of devices")
    parser.add_argument(
        "--machine", metavar="M", help="a preset or a TOML file; --machine list lists them; default: the script's, else h100"
    )
    parser.add_argument("--mode", help="parallel mode; default: auto, or what the script's AutoParallel says")
    parser.add_argument("--mesh", type=_ints, metavar="32,8", help="device matrix; default: the best of several")
    parser.add_argument("--axes", type=_names, default=(), metavar="dp,tp", help="aliases of the device matrix's axes")
    parser.add_argument("--memory", metavar="80GB", help="memory of a device; default: the machine's")
    parser.add_argument("--optimizer", metavar="NAME", help="whose states count; default: the script's, else adamw")
    parser.add_argument("--seconds", type=_seconds, metavar="S", help="how long to search; default: the script's, else 30")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="argument of model() or inputs()")
    parser.add_argument("--meta", action="store_true", help="run a training script with tensors on the meta device")
    parser.add_argument("--load", type=Path, metavar="FILE", help="start from the layouts in a plan file")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the plan as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page to look at")
    parser.add_argument("--explain", action="append", default=[], metavar="NAME", help="why an operator or module is as it is")
    parser.add_argument("--summary", action="store_true", help="print the summary only")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    from shardwright.cost.machine_files import machines

    if arguments.machine == "list":
        print("\n".join(machines()))
        return 0
    try:
        check(arguments)
        plan = make_plan(arguments)
        show(plan, arguments)
    except ShardwrightError as error:
        print(f"shardwright plan: {error}", file=sys.stderr)
        return 2
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Refuses arguments whose mistakes would show only after the plan is made.

    Raises:
        ShardwrightError: a missing argument or file, or a path that cannot be written.
    """
    if arguments.script is None or arguments.devices is None:
        missing = "script" if arguments.script is None else "number of devices"
        raise ShardwrightError(f"the {missing} is missing: write shardwright plan {arguments.script or 'train.py'} --devices 8")
    if not Path(arguments.script).is_file():
        raise ShardwrightError(f"there is no file {arguments.script}")
    for name in ("save", "html"):
        path = getattr(arguments, name)
        if path is not None and path.is_dir():
            raise ShardwrightError(f"--{name} {path}: that is a folder; name a file, {path / ('plan.' + _SUFFIX[name])}")
        if path is not None and not path.absolute().parent.is_dir():
            raise ShardwrightError(f"--{name} {path}: there is no folder {path.parent}; make it, or name another")


_SUFFIX = {"save": "json", "html": "html"}


@contextmanager
def showing_progress() -> Iterator[Callable[[str], None]]:
    """Shows on a terminal what is being done, and removes it afterwards."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console  # here: importing it draws from Python's random generator

    with Console(stderr=True).status("looking at the script") as status:
        yield status.update


def make_plan(arguments: argparse.Namespace) -> PlanView | PipelinePlan:
    """Plans what the command line names: a script, or a model and its inputs.

    Raises:
        ShardwrightError: the script calls no ``AutoParallel`` and defines no ``model()`` and ``inputs()``.
    """
    given = _settings(arguments.set)
    script, own = arguments.script, arguments.arguments
    options = {
        "machine": arguments.machine, "mesh": arguments.mesh, "axes": arguments.axes, "memory": arguments.memory,
        "optimizer": arguments.optimizer, "seconds": arguments.seconds, "file": arguments.load,
    }  # fmt: skip
    with showing_progress() as tell:
        # a script without `if __name__ == "__main__":` trains already when it is looked at
        with planning(arguments.devices, arguments.mode, arguments.meta, options, tell) as plans:
            found = run_script(script, "__shardwright_plan__", own)
        if plans:
            return _without_settings(plans[0], given, script)
        missing = [name for name in ("model", "inputs") if not callable(found.get(name))]
        if not missing:
            return _of_functions(found, given, arguments, options | {"tell": tell})
        with planning(arguments.devices, arguments.mode, arguments.meta, options, tell) as plans:
            run_script(script, "__main__", own)
        if plans:
            return _without_settings(plans[0], given, script)
    has = f"has {'inputs' if missing == ['model'] else 'model'}() but " if len(missing) == 1 else ""
    raise ShardwrightError(
        f"{script} called no AutoParallel and {has}defines no {'() and '.join(missing)}(): define {_them(missing)}, or train "
        "with AutoParallel"
    )


def _them(missing: list[str]) -> str:
    return {"model": "one that returns the module", "inputs": "one that returns its inputs as a tuple"}.get(
        missing[0] if len(missing) == 1 else "", "them"
    )


def _without_settings(plan: PlanView | PipelinePlan, given: dict[str, Any], script: str) -> PlanView | PipelinePlan:
    if given:
        raise ShardwrightError(
            f"--set {next(iter(given))}: {script} defines no model() and inputs() to give it to; arguments of the script "
            "itself stand after --"
        )
    return plan


def _of_functions(
    found: dict[str, Any], given: dict[str, Any], arguments: argparse.Namespace, options: dict[str, Any]
) -> PlanView:
    """Plans what a script's model() and inputs() return."""
    unused = [name for name in given if not any(_accepts(found[f], name) for f in ("model", "inputs"))]
    if unused:
        raise ShardwrightError(f"--set {unused[0]}: neither model() nor inputs() of {arguments.script} has that argument")

    def result_of(name: str) -> Any:
        return run_script(arguments.script, name, call=lambda: found[name](**_for(found[name], given)))

    target, inputs = result_of("model"), result_of("inputs")
    if not isinstance(target, nn.Module) and not callable(target):
        raise ShardwrightError(
            f"model() of {arguments.script} returns {target!r}, a {type(target).__name__}: return an nn.Module or a function"
        )
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    given_options = {name: value for name, value in options.items() if value is not None}
    return plan_for(arguments.devices, target, *inputs, mode=arguments.mode or "auto", **given_options)


def show(plan: PlanView | PipelinePlan, arguments: argparse.Namespace) -> None:
    """Prints the views of a plan that the command line asks for.

    Raises:
        ShardwrightError: the page cannot be written, a view that pipelines do not have.
    """
    from shardwright.report.overview import WIDTH, overview

    if isinstance(plan, PipelinePlan):
        asked = [f"--{name}" for name in ("explain", "save", "html") if getattr(arguments, name)]
        if asked:
            raise ShardwrightError(
                f"{', '.join(asked)}: a pipeline has a plan per stage, and these show one; leave it out, or use "
                "net.plan.stages in the script"
            )
        print(plan.summary() if arguments.summary else plan)
        return
    if arguments.explain:
        for name in arguments.explain:
            print(plan.explain(name))
    elif not arguments.summary:
        print(overview(plan.value, max(WIDTH, shutil.get_terminal_size().columns)))
        print()
    print(plan.summary())
    if arguments.save is not None:
        plan.save(arguments.save)
        print(f"saved to {arguments.save}")
    if arguments.html is not None:
        from shardwright.report.page.page import write_page

        try:
            write_page(plan.value, arguments.html)
        except OSError as error:
            raise ShardwrightError(f"--html {arguments.html} cannot be written: {error.strerror}") from None
        print(f"drawn to {arguments.html}")


def _settings(entries: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not equals or not name.isidentifier():
            raise ShardwrightError(f"--set {entry!r}: write NAME=VALUE")
        settings[name] = int(value) if value.lstrip("-").isdigit() else value
    return settings


def _accepts(function: Callable[..., Any], name: str) -> bool:
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _for(function: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if _accepts(function, name)}
