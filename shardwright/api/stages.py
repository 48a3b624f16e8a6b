"""Stages: from settings to a request, from a request to a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from shardwright.api.settings import Settings
from shardwright.ir.graph import Graph
from shardwright.ir.machine import Machine
from shardwright.ir.plan import Plan
from shardwright.plan.asked.attributes import with_attributes
from shardwright.plan.asked.own_layouts import check_in_place
from shardwright.plan.modes.table import plan_graph
from shardwright.plan.request import PlanRequest
from shardwright.train.fusion.settings import buckets_of
from shardwright.train.optimizer_parallel.stored import split_parameters
from shardwright.train.recompute.automatic import plan_with_recompute
from shardwright.train.recompute.marked import recompute_parameter_gathers
from shardwright.train.recompute.request import RecomputeRequest

# Called in turn before anything is captured, with the root, its inputs and the settings; planning without running ends
# the call here.
before_compiling: list[Callable[..., None]] = []


def plan_request(
    devices: int, settings: Settings, parameter_plan: dict[str, tuple[Any, str]], machine: Machine | str
) -> PlanRequest:
    """What the settings ask of a plan for a number of devices; ``machine`` where they name none."""
    search = settings.search
    return PlanRequest(
        devices, settings.dataset_strategy, parameter_plan, settings.mode != "data_parallel", settings.mode,
        search.machine or machine, search.memory, search.mesh, search.axes, search.states, search.seconds,
        schedule=settings.schedule,
    )  # fmt: skip


def follow_attributes(graph: Graph, devices: int, settings: Settings, parameter_plan: dict[str, tuple[Any, str]]) -> Graph:
    """The graph with the attributes of its operators carried out; not where strategies are ignored."""
    return graph if settings.mode == "data_parallel" else with_attributes(graph, devices, parameter_plan)


def plan_as_asked(
    root: nn.Module, graph: Graph, request: PlanRequest, settings: Settings, again: Mapping[str, RecomputeRequest] | None = None
) -> Plan:
    """The plan of the mode, or what stands in for it, with its parameters stored as the settings ask.

    Args:
        again: by module path, what is computed again in the backward pass.
    """

    parameters = dict(root.named_parameters(remove_duplicate=False))
    schedule = replace(settings.schedule, ids=buckets_of(graph.inputs, parameters))

    def make(request: PlanRequest) -> Plan:
        plan = replace(_plan_of_operators(graph, request, settings), schedule=schedule)
        check_in_place(plan)
        if settings.hsdp is None:
            return plan
        plan = split_parameters(plan, settings.hsdp, parameters)
        return replace(plan, passes=(*plan.passes, recompute_parameter_gathers)) if settings.hsdp.gathers_again else plan

    automatic = next((r for r in settings.recompute if r.is_automatic), None)
    return plan_with_recompute(make, request, again or {}, automatic)


def _plan_of_operators(graph: Graph, request: PlanRequest, settings: Settings) -> Plan:
    """The plan of the mode, of the plan file that the settings name, or of the planner that stands in for both."""
    if settings.planner is not None:
        return settings.planner(graph, request)
    if settings.file is None:
        return plan_graph(graph, request)
    from shardwright.plan.file.match import plan_from_file

    return plan_from_file(settings.file, graph, request, part=settings.of_step)
