"""Table of modes: which planner makes the plan of a graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from shardwright.errors import ShardwrightError
from shardwright.ir.graph import Graph
from shardwright.ir.plan import Plan
from shardwright.plan.modes.propagation import plan_propagation
from shardwright.plan.modes.semi_auto import plan_semi_auto
from shardwright.plan.request import PlanRequest

Planning = Callable[[Graph, PlanRequest], Plan]


def _search(graph: Graph, request: PlanRequest) -> Plan:
    from shardwright.plan.modes.search import SearchPlanner  # here: the other modes need neither search nor cost

    return SearchPlanner(graph, request).plan()


# The request says itself that marks are not followed in data_parallel mode.
PLANNERS: dict[str, Planning] = {
    "semi_auto": plan_semi_auto,
    "data_parallel": plan_semi_auto,
    "sharding_propagation": plan_propagation,
    "dynamic_programming": _search,
    "recursive_programming": _search,
    "auto": _search,
}


def plan_graph(graph: Graph, request: PlanRequest) -> Plan:
    """Plans a graph, by the planner of the request's mode.

    Raises:
        ShardwrightError: a mode without a planner.
        StrategyError: strategies that cannot be followed.
    """
    if request.mode not in PLANNERS:
        raise ShardwrightError(f"mode={request.mode!r} does not plan; use one of {', '.join(PLANNERS)}")
    plan = PLANNERS[request.mode](graph, request)
    if plan.machine is not None:
        return plan
    from shardwright.cost.machine_files import load_machine

    full_batch = request.dataset_strategy == "full_batch"
    return replace(
        plan,
        machine=load_machine(request.machine),
        optimizer_bytes_per_byte=request.optimizer_bytes_per_byte,
        full_batch=full_batch,
    )
