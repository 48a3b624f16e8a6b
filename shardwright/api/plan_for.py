"""Planning for devices one does not have: shapes only, nothing is computed and no memory taken."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from shardwright.api.marks import gather_again, gather_marks
from shardwright.api.settings import SearchSettings, Settings
from shardwright.api.stages import before_compiling, follow_attributes, plan_as_asked, plan_request
from shardwright.api.train_step import backward_is_a_step
from shardwright.capture.closure import FunctionModule
from shardwright.capture.repeated import capture_repeated
from shardwright.cost.machine_files import load_machine
from shardwright.errors import ArgumentTypeError, ShardwrightError
from shardwright.ir.machine import Machine
from shardwright.ir.plan import Plan
from shardwright.plan.asked.sizes import memory_bytes, optimizer_states
from shardwright.plan.file.read import load_plan_file
from shardwright.report.plan_view import PlanView
from shardwright.train.copies.virtual_axis import prepare_copies
from shardwright.world.current import init


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
    """Plans a module or forward function for a number of devices, without having them.

    Args:
        devices: how many.
        inputs: its inputs, of global shape; tensors on the meta device will do.
        machine: what the devices are: a preset's name, a TOML file or a :class:`~shardwright.ir.machine.Machine`.
        mode: any parallel mode that plans.
        mesh, axes: the device matrix, and its aliases; default: the best of several.
        memory: bytes a device may use, ``"80GB"`` or a number; default: what the machine's devices have.
        optimizer: name of the optimizer whose states count, or bytes of state a byte of parameter.
        seconds: how long a search may take.
        settings: what else an ``AutoParallel`` was told.
        file: a plan file to start from.
        tell: is told what is under way, now and then.

    Raises:
        ShardwrightError: axes without sizes, or not one for each.
        StrategyError: strategies that cannot be followed.
        MemoryLimitError: no plan fits.

    >>> model = torch.nn.Linear(1024, 1024, device="meta")
    >>> plan = plan_for(8, model, torch.empty(64, 1024, device="meta"), machine="a100")
    >>> plan.mesh.size
    8
    """
    root = target if isinstance(target, nn.Module) else FunctionModule(target)
    return _planned(
        devices, root, inputs, {}, machine=machine, mode=mode, mesh=mesh, axes=axes, memory=memory, optimizer=optimizer,
        seconds=seconds, settings=settings, file=file, tell=tell,
    )  # fmt: skip


def _planned(
    devices: int,
    root: nn.Module,
    args: Any,
    kwargs: dict[str, Any],
    *,
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
    may_be_a_step: bool = False,
) -> PlanView:
    """As :func:`plan_for`, for keyword arguments too, and for what may turn out to be a train step."""
    if not isinstance(devices, int) or isinstance(devices, bool) or devices < 1:
        raise ArgumentTypeError(f"plan_for({devices!r}): give the number of devices")
    if axes and len(axes) != len(mesh or ()):
        sizes = "no mesh" if mesh is None else f"the mesh {','.join(map(str, mesh))}"
        raise ShardwrightError(
            f"axes {','.join(axes)}: {len(axes)} aliases for {sizes}; give one a size, as in mesh=(4, 2), axes=('dp', 'tp')"
        )
    chosen = load_machine(machine)
    limit = memory_bytes(memory) if memory is not None else (chosen.memory or None)
    search = SearchSettings(chosen, limit, mesh, tuple(axes), optimizer_states(optimizer), seconds)
    settings = replace(settings or Settings(), mode=mode, search=search)
    if file is not None:
        settings.file = load_plan_file(file)
    return PlanView(_plan(devices, root, tuple(args), kwargs, settings, tell or (lambda text: None), may_be_a_step))


def _plan(
    devices: int, root: nn.Module, args: Any, kwargs: Any, settings: Settings, tell: Callable[[str], None],
    may_be_a_step: bool,
) -> Plan:  # fmt: skip
    tell("capturing the model as a graph")
    marks, parameter_plan = gather_marks(root, settings)
    with backward_is_a_step(may_be_a_step), torch.enable_grad():
        graph = capture_repeated(root, args, kwargs, torch.device("meta"), marks)
    graph = follow_attributes(graph, devices, settings, parameter_plan)
    graph = prepare_copies(graph, parameter_plan if settings.mode != "data_parallel" else None)
    request = replace(plan_request(devices, settings, parameter_plan, settings.search.machine), tell=tell)
    tell(f"planning {len(graph.nodes):,} operators for {devices:,} devices")
    return plan_as_asked(root, graph, request, settings, gather_again(root, settings))


class _PlanMade(BaseException):
    """Ends a script whose plan is made."""


@contextmanager
def planning(devices: int, mode: str | None, meta: bool, options: dict[str, Any]) -> Iterator[list[PlanView]]:
    """Within the block, what an ``AutoParallel`` would compile is planned for ``devices`` instead, and the block ends there.

    Args:
        mode: the mode to plan in; default: the one the ``AutoParallel`` was given.
        meta: whether tensors are made on the meta device.
        options: as for :func:`plan_for`.

    Yields:
        A list that then holds the plan.
    """
    plans: list[PlanView] = []

    def instead(root: nn.Module, args: Any, kwargs: Any, settings: Settings) -> None:
        chosen: dict[str, Any] = {"settings": settings, "mode": mode or settings.mode}
        chosen["may_be_a_step"] = isinstance(root, FunctionModule)
        plans.append(_planned(devices, root, args, kwargs, **chosen, **options))
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
