"""Stages from a callable to its graph, and from the graph to its plan.

An ``AutoParallel`` runs them when it meets new inputs; ``plan_for`` and the command line run them without devices. The
functions are the same; only the device, the machine and the callback that reports progress differ. From the plan to the
program it is :mod:`shardwright.partition.local_program`; the passes in between are in :mod:`shardwright.train.passes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from shardwright.api.marks import gather_marks, gather_recompute
from shardwright.api.settings import Settings
from shardwright.api.train_step import backward_is_a_step
from shardwright.base.dump import Dump
from shardwright.base.torch_private import pytree
from shardwright.errors import CaptureError, ShardwrightError
from shardwright.ir.graph import Graph
from shardwright.ir.marks import Mark
from shardwright.ir.plan import Plan
from shardwright.plan.file.match import plan_from_file
from shardwright.plan.modes.table import plan_graph
from shardwright.plan.request import PlanRequest
from shardwright.train.accumulation.module import GradAccumulation, given_a_part
from shardwright.train.passes import Asked, change_graph, change_plan, with_program_passes
from shardwright.train.recompute.automatic import plan_with_recompute
from shardwright.train.recompute.request import RecomputeRequest

# Called in turn before anything is captured, with the root, its inputs and the settings; planning without running ends
# the call here.
before_compiling: list[Callable[..., None]] = []

Capture = Callable[[nn.Module, Any, Any, torch.device, dict[nn.Module, Mark]], Graph]


@dataclass(frozen=True)
class Target:
    """A callable on its way to a program.

    Args:
        root: holds the parameters and modules that the callable reads.
        args, kwargs: inputs, of global shape; of a ``GradAccumulation`` those of its first part.
        settings: the user's settings.
        device: where the program runs.
        asked: the arguments of the passes.
        marks: the marks of modules.
        machine: the machine that plans are priced on.
        dump: writes the texts after each pass.
        may_be_a_step: whether the callable may turn out to be a train step.
        on_first_rank: makes a value on one process of a job and returns it on all.
        tell: called with a text that says what is being done.
    """

    root: nn.Module
    args: Any
    kwargs: Any
    settings: Settings
    device: torch.device
    asked: Asked
    marks: dict[nn.Module, Mark]
    machine: Any
    dump: Dump
    may_be_a_step: bool = False
    on_first_rank: Callable[[Callable[[], Any]], Any] = lambda make: make()
    tell: Callable[[str], None] = lambda text: None


def make_target(
    root: nn.Module, args: Any, kwargs: Any, settings: Settings, devices: int, device: torch.device, machine: Any,
    adds_wide: bool = True, **rest: Any,
) -> Target:  # fmt: skip
    """Gathers the arguments of the stages: marks of modules, layouts of parameters, settings of training.

    Args:
        root: holds the parameters and modules that the callable reads.
        args, kwargs: inputs, of global shape.
        settings: the user's settings.
        devices: number of ranks.
        device: where the program runs.
        machine: the machine that plans are priced on.
        adds_wide: whether the world adds half precision in float32.
        rest: as in :class:`Target`.

    Raises:
        StrategyError: strategies that fit no module or parameter.
        ShardwrightError: results that are to stay split, of a ``GradAccumulation``.
    """
    accumulates = isinstance(root, GradAccumulation)
    if accumulates and settings.output == "sharded":
        raise ShardwrightError(
            "output='sharded': GradAccumulation joins the results of its parts to whole ones; drop the argument"
        )
    if isinstance(root, GradAccumulation):
        args, kwargs = first_part(root, args, kwargs)
    marks, parameter_plan = gather_marks(root, settings)
    asked = Asked(
        devices,
        dict(root.named_parameters(remove_duplicate=False)),
        settings.mode != "data_parallel",
        parameter_plan,
        settings.enable_alltoall,
        settings.schedule,
        settings.hsdp,
        settings.precision,
        gather_recompute(root, settings),
        accumulates,
        adds_wide,
        settings.output,
    )
    return Target(root, args, kwargs, settings, device, asked, marks, machine, **rest)


def first_part(module: GradAccumulation, args: Any, kwargs: Any) -> Any:
    """Returns the inputs of the first micro-batch."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    return pytree.tree_unflatten(module.parts(leaves)[0], spec)


def capture_target(target: Target, capture: Capture) -> Graph:
    """Captures the callable as a graph, under the autocast of its settings.

    Args:
        target: the callable.
        capture: ``capture``, or ``capture_repeated``, which captures repeated layers once.

    Raises:
        CaptureError: something that a graph cannot hold.
    """
    micro = target.root if isinstance(target.root, GradAccumulation) else None
    # only within the capture: planning differentiates on its own account
    watch = backward_is_a_step(target.may_be_a_step)
    with watch, given_a_part(micro), target.settings.precision.computing(target.device.type):
        graph = capture(target.root, target.args, target.kwargs, target.device, target.marks)
    check_assignments(graph, micro is not None)
    target.dump.write("graph", "capture", graph.__str__)
    return graph


def check_assignments(graph: Graph, accumulates: bool) -> None:
    """Refuses tensors that each micro-batch would leave in attributes."""
    names = [made.where for made in graph.assignments if made.tensors]
    if names and accumulates:
        raise CaptureError(
            f"a network in GradAccumulation assigns tensors to attributes: {', '.join(names)}\n  Each micro-batch has its "
            "own; return them instead"
        )


def plan_target(target: Target, graph: Graph) -> Plan:
    """Plans a captured graph as the settings ask. The plan has the passes that its program will go through.

    Raises:
        StrategyError: strategies that cannot be followed.
        MemoryLimitError: no plan fits.
    """
    asked, settings, search = target.asked, target.settings, target.settings.search
    graph = change_graph(graph, asked, target.dump)
    target.tell(f"planning {len(graph.nodes):,} operators for {asked.devices:,} devices")
    request = PlanRequest(
        asked.devices, settings.dataset_strategy, dict(asked.parameter_plan), asked.follows_marks, settings.mode,
        target.machine, search.memory, search.mesh, search.axes, search.optimizer_bytes_per_byte, search.seconds,
        on_first_rank=target.on_first_rank, schedule=asked.schedule, tell=target.tell,
    )  # fmt: skip

    def make(request: PlanRequest) -> Plan:
        return change_plan(_plan_of_operators(graph, request, settings), asked, target.dump)

    def with_requests(plan: Plan, requests: Mapping[str, RecomputeRequest]) -> Plan:
        return with_program_passes(plan, replace(asked, recompute=requests))

    automatic = next((r for r in settings.recompute if r.is_automatic), None)
    return plan_with_recompute(make, with_requests, request, asked.recompute, automatic)


def _plan_of_operators(graph: Graph, request: PlanRequest, settings: Settings) -> Plan:
    """Plans by the mode, by the settings' plan file, or by the settings' own planner."""
    if settings.planner is not None:
        return settings.planner(graph, request)
    if settings.file is None:
        return plan_graph(graph, request)
    return plan_from_file(settings.file, graph, request, part=settings.of_step)
