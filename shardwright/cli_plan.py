"""The command ``shardwright plan``: a plan for devices one does not have, from a script, on shapes alone."""

from __future__ import annotations

import argparse
import inspect
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardwright.errors import ShardwrightError
from shardwright.plan.plan import Plan
from shardwright.planning import plan_for, planning

HELP = """\
Plan a model for a number of devices that need not exist, and say what a step would cost there.

Nothing is computed: models and inputs on the meta device hold no memory, so a laptop plans what a cluster trains.

The script either defines two functions, model() that returns an nn.Module (or a forward function) and inputs() that
returns its inputs as a tuple; or it trains with shardwright.AutoParallel, and is then run until the first call that would
be planned, whose plan is shown. In that case --meta makes its tensors without memory."""

EXAMPLES = """\
examples:
  shardwright plan examples/llama.py --devices 1024 --machine h100 --set size=70b --set batch=512
  shardwright plan train.py --devices 8 --mode recursive_programming --memory 40GB
  shardwright plan train.py --devices 64 --mesh 8,8 --axes dp,tp --html plan.html --save plan.json
  shardwright plan train.py --devices 8 --explain 'layers.0.*'"""


def add_parser(commands: Any, count: Callable[[str], int], ints: Callable[[str], Any], names: Callable[[str], Any]) -> None:
    """Adds the command to the command line's commands."""
    parser = commands.add_parser(
        "plan",
        help="plan a script's model for devices that need not exist",
        description=HELP,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=run, name="plan")
    parser.add_argument("script", metavar="script.py", help="the script with the model")
    parser.add_argument("--devices", type=count, required=True, metavar="N", help="number of devices")
    parser.add_argument("--machine", default="h100", metavar="M", help="a preset or a TOML file; --machine list lists them")
    parser.add_argument("--mode", help="parallel mode; default: auto, or what the script's AutoParallel says")
    parser.add_argument("--mesh", type=ints, metavar="32,8", help="device matrix; default: the best of several")
    parser.add_argument("--axes", type=names, default=(), metavar="dp,tp", help="aliases of the device matrix's axes")
    parser.add_argument("--memory", metavar="80GB", help="memory of a device; default: the machine's")
    parser.add_argument("--optimizer", default="adamw", metavar="NAME", help="whose states count; default: adamw")
    parser.add_argument("--seconds", type=float, default=30.0, metavar="S", help="how long to search; default: 30")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="argument of model() or inputs()")
    parser.add_argument("--meta", action="store_true", help="run a training script with tensors on the meta device")
    parser.add_argument("--load", type=Path, metavar="FILE", help="start from the layouts in a plan file")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the plan as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page to look at")
    parser.add_argument("--explain", action="append", default=[], metavar="NAME", help="why an operator or module is as it is")
    parser.add_argument("--summary", action="store_true", help="print the summary only")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    from shardwright.cost.machine import machines

    if arguments.machine == "list":
        print("\n".join(machines()))
        return 0
    if not Path(arguments.script).is_file():
        print(f"shardwright plan: there is no file {arguments.script}", file=sys.stderr)
        return 2
    try:
        plan = make_plan(arguments)
        show(plan, arguments)
    except ShardwrightError as error:
        print(f"shardwright plan: {error}", file=sys.stderr)
        return 2
    return 0


def make_plan(arguments: argparse.Namespace) -> Plan:
    given = _settings(arguments.set)
    options = {
        "machine": arguments.machine, "mesh": arguments.mesh, "axes": arguments.axes, "memory": arguments.memory,
        "optimizer": arguments.optimizer, "seconds": arguments.seconds, "file": arguments.load,
    }  # fmt: skip
    found: dict[str, Any] = {}
    # a script without `if __name__ == "__main__":` trains already when it is looked at
    with planning(arguments.devices, arguments.mode, arguments.meta, options) as plans:
        found = _run(arguments.script, "__shardwright_plan__")
    if not plans and callable(found.get("model")) and callable(found.get("inputs")):
        return _of_functions(found, given, arguments, options)
    if given:
        raise ShardwrightError(f"--set: {arguments.script} defines no model() and inputs()")
    if not plans:
        with planning(arguments.devices, arguments.mode, arguments.meta, options) as plans:
            _run(arguments.script, "__main__")
    if not plans:
        raise ShardwrightError(
            f"{arguments.script} called no AutoParallel and defines no model() and inputs(): define them, or train with it"
        )
    return plans[0]


def _of_functions(found: dict[str, Any], given: dict[str, Any], arguments: argparse.Namespace, options: dict[str, Any]) -> Plan:
    """The plan of what a script's model() and inputs() return."""
    unused = [name for name in given if not any(_accepts(found[f], name) for f in ("model", "inputs"))]
    if unused:
        raise ShardwrightError(f"--set {unused[0]}: neither model() nor inputs() of {arguments.script} has that argument")
    target = found["model"](**_for(found["model"], given))
    inputs = found["inputs"](**_for(found["inputs"], given))
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    return plan_for(arguments.devices, target, *inputs, mode=arguments.mode or "auto", **options)


def show(plan: Plan, arguments: argparse.Namespace) -> None:
    from shardwright.plan.overview import overview

    if arguments.explain:
        for name in arguments.explain:
            print(plan.explain(name))
    elif not arguments.summary:
        print(overview(plan))
        print()
    print(plan.summary())
    if arguments.save is not None:
        plan.save(arguments.save)
        print(f"saved to {arguments.save}")
    if arguments.html is not None:
        from shardwright.report.page import write_page

        write_page(plan, arguments.html)
        print(f"drawn to {arguments.html}")


def _run(script: str, name: str) -> dict[str, Any]:
    """What a script defines when run under a name."""
    before = sys.argv, sys.path[:]
    sys.argv = [script]
    sys.path[:1] = [str(Path(script).resolve().parent)]
    try:
        return runpy.run_path(script, run_name=name)
    finally:
        sys.argv, sys.path[:] = before


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
