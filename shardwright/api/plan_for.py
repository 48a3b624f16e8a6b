"""Plans for devices one does not have, on shapes only: nothing is computed and no memory taken."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from shardwright.api.pipeline_planning import plan_pipeline
from shardwright.api.settings import SearchSettings, Settings
from shardwright.api.stages import before_compiling, capture_target, make_target, plan_target
from shardwright.base.dump import dump_of
from shardwright.capture.closure import FunctionModule
from shardwright.capture.decisions import explored
from shardwright.capture.repeated import capture_repeated
from shardwright.cost.machine_files import load_machine
from shardwright.errors import ArgumentTypeError, ShardwrightError
from shardwright.ir.machine import Machine
from shardwright.pipeline.pipeline_plan import PipelinePlan
from shardwright.plan.asked.sizes import memory_bytes, optimizer_bytes_per_byte
from shardwright.plan.file.read import load_plan_file
from shardwright.report.plan_view import PlanView
from shardwright.world.current import init

MACHINE = "h100"  # the default machine


def plan_for(
    devices: int,
    target: Callable[..., Any],
    *inputs: Any,
    machine: Machine | str = "h100",
    mode: str = "auto",
    mesh: tuple[int, ...] | None = None,
    axes: tuple[str, ...] = (),
    memory: float | str | None = None,
    optimizer: str | float = "adamw",
    seconds: float = 30.0,
    settings: Settings | None = None,
    file: Any = None,
    tell: Callable[[str], None] | None = None,
) -> PlanView:
    """Plans a module or forward function for a number of devices that need not exist.

    Args:
        devices: the number of devices.
        target: the module or forward function.
        inputs: its inputs, of global shape; tensors on the meta device will do.
        machine: what the devices are: a preset's name, a TOML file or a :class:`~shardwright.ir.machine.Machine`.
        mode: any parallel mode that plans.
        mesh, axes: the device matrix, and the aliases of its axes; default: the best of several.
        memory: bytes that a device may use, ``"80GB"`` or a number; default: what the machine's devices have.
        optimizer: name of the optimizer whose states count, or bytes of state per byte of parameter.
        seconds: how long a search may take.
        settings: further settings, as of an ``AutoParallel``.
        file: a plan file to start from.
        tell: called with a text that says what is being done, now and then.

    Raises:
        ShardwrightError: axes without sizes, or not one alias per axis.
        StrategyError: strategies that cannot be followed.
        MemoryLimitError: no plan fits.

    >>> model = torch.nn.Linear(1024, 1024, device="meta")
    >>> plan = plan_for(8, model, torch.empty(64, 1024, device="meta"), machine="a100")
    >>> plan.mesh.size
    8
    """
    root = target if isinstance(target, nn.Module) else FunctionModule(target)
    options = {"mesh": mesh, "axes": axes, "memory": memory, "optimizer": optimizer, "seconds": seconds, "file": file}
    chosen = _with_options(replace(settings or Settings(), mode=mode), machine=machine, **options)
    plan = _planned(devices, root, inputs, {}, chosen, tell=tell)
    assert isinstance(plan, PlanView)  # only an AutoParallel asks for a pipeline
    return plan


def _with_options(
    settings: Settings,
    machine: Machine | str | None = None,
    mesh: tuple[int, ...] | None = None,
    axes: tuple[str, ...] = (),
    memory: float | str | None = None,
    optimizer: str | float | None = None,
    seconds: float | None = None,
    file: Any = None,
) -> Settings:
    """Returns the settings, replaced by those options of :func:`plan_for` that are given.

    Raises:
        ShardwrightError: axes without sizes, or not one alias per axis.
    """
    if axes and len(axes) != len(mesh or ()):
        sizes = "no mesh" if mesh is None else f"the mesh {','.join(map(str, mesh))}"
        raise ShardwrightError(
            f"axes {','.join(axes)}: {len(axes)} aliases for {sizes}; give one a size, as in mesh=(4, 2), axes=('dp', 'tp')"
        )
    own = settings.search
    limit = own.memory if memory is None else memory_bytes(memory)
    if machine is None and own.machine is not None:
        machine = own.machine
    elif memory is None:  # no such machine is at hand: its devices set the limit
        limit = own.memory or load_machine(machine or MACHINE).memory or None
    search = SearchSettings(
        load_machine(machine or MACHINE),
        limit,
        mesh or own.mesh,
        tuple(axes) if mesh else own.axes,
        own.optimizer_bytes_per_byte if optimizer is None else optimizer_bytes_per_byte(optimizer),
        own.seconds if seconds is None else seconds,
    )
    return replace(settings, search=search, file=settings.file if file is None else load_plan_file(file))


def _planned(
    devices: int,
    root: nn.Module,
    args: Any,
    kwargs: dict[str, Any],
    settings: Settings,
    may_be_a_step: bool = False,
    tell: Callable[[str], None] | None = None,
) -> PlanView | PipelinePlan:
    """Plans what an ``AutoParallel`` with these settings would run, on shapes."""
    if not isinstance(devices, int) or isinstance(devices, bool) or devices < 1:
        raise ArgumentTypeError(f"plan_for({devices!r}): give the number of devices")
    tell = tell or (lambda text: None)
    tell("capturing the model as a graph")
    target = make_target(
        root, tuple(args), kwargs, settings, devices, torch.device("cpu"), settings.search.machine,
        dump=dump_of(type(root).__name__, None), may_be_a_step=may_be_a_step, tell=tell,
    )  # fmt: skip
    if settings.pipeline is not None:
        return plan_pipeline(target).view
    with torch.enable_grad():
        graph, _ = explored(lambda decisions: capture_target(target, partial(capture_repeated, decisions=decisions)))
    return PlanView(plan_target(target, graph))


class _PlanMade(BaseException):
    """Raised to end a script once its plan is made."""


@contextmanager
def planning(
    devices: int, mode: str | None, meta: bool, options: dict[str, Any], tell: Callable[[str], None] | None = None
) -> Iterator[list[PlanView | PipelinePlan]]:
    """Plans, within the block, what an ``AutoParallel`` would run; the first plan ends the block.

    Args:
        devices: the number of devices to plan for.
        mode: the mode to plan in; default: that of the ``AutoParallel``.
        meta: whether tensors are made on the meta device.
        options: as for :func:`plan_for`; what is missing, or ``None``, is as in the script.
        tell: called with a text that says what is being done.

    Yields:
        A list that holds the plan after the block.
    """
    plans: list[PlanView | PipelinePlan] = []

    def instead(root: nn.Module, args: Any, kwargs: Any, settings: Settings) -> None:
        chosen = _with_options(replace(settings, mode=mode or settings.mode), **options)
        plans.append(_planned(devices, root, args, kwargs, chosen, isinstance(root, FunctionModule), tell))
        raise _PlanMade

    before = os.environ.get("SHARDWRIGHT_DEVICES")
    os.environ["SHARDWRIGHT_DEVICES"] = str(devices)  # scripts ask how many devices there are
    init(devices)
    before_compiling.append(instead)
    try:
        with torch.device("meta") if meta else nullcontext():
            yield plans
    except _PlanMade:
        pass
    finally:
        before_compiling.remove(instead)
        if before is None:
            del os.environ["SHARDWRIGHT_DEVICES"]
        else:
            os.environ["SHARDWRIGHT_DEVICES"] = before
