"""Plans to measure: many different plans of the same model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from shardwright.api.auto_parallel import AutoParallel
from shardwright.ir.graph import Graph
from shardwright.ir.layout import Layout
from shardwright.ir.plan import Plan
from shardwright.plan.choose.meshes import factorisations
from shardwright.plan.modes.search import SearchPlanner
from shardwright.plan.modes.table import plan_graph
from shardwright.plan.request import PlanRequest
from shardwright.search.problem import Edge, Problem, Solution

# Standard deviation of the noise on the logarithms of prices by which a random plan is searched.
BLURS = (0.5, 1.5, 3.0, 10.0)
_RANDOM = 8  # random plans per model


def split_storage(graph: Graph, request: PlanRequest) -> Plan:
    """Plans data parallelism with parameters stored split over all ranks. They are split along dim 0 if that is even."""
    plan = plan_graph(graph, replace(request, mode="data_parallel", honour_marks=False))
    layouts = dict(plan.input_layouts)
    for i in graph.inputs:
        shape = i.meta.shape
        if i.kind == "parameter" and shape and shape[0] % request.world_size == 0:
            layouts[i.value] = Layout.of(plan.mesh, [list(plan.mesh.axes), *([] for _ in shape[1:])])
    return replace(plan, input_layouts=layouts)


def blurred(seed: int, blur: float, mesh: tuple[int, ...]) -> Callable[[Graph, PlanRequest], Plan]:
    """Builds a planner that searches with prices multiplied by random numbers."""

    class Blurred(SearchPlanner):
        def find(self, problem: Problem, gap: float) -> Solution:
            return super().find(_blurred(problem, np.random.default_rng(seed), blur), gap)

    return lambda graph, request: Blurred(graph, replace(request, mode="dynamic_programming", mesh=mesh)).plan()


def _blurred(problem: Problem, draw: np.random.Generator, blur: float) -> Problem:
    def noisy(cost: Any) -> Any:
        return cost * np.exp(blur * draw.standard_normal(cost.shape))

    def edges(given: Sequence[Edge]) -> tuple[Edge, ...]:
        return tuple(replace(edge, cost=noisy(edge.cost)) for edge in given)

    nodes = tuple(replace(node, cost=noisy(node.cost)) for node in problem.nodes)
    repeats = tuple(replace(repeat, carried=edges(repeat.carried)) for repeat in problem.repeats)
    return Problem(nodes, edges(problem.edges), repeats, problem.limit)


def planned_by(model: nn.Module, planner: Callable[[Graph, PlanRequest], Plan]) -> AutoParallel:
    """Returns the model under the plan that a function makes."""
    net = AutoParallel(model)
    net.settings.planner = planner
    return net


def meshes_of(ranks: int) -> list[tuple[int, ...]]:
    """Lists meshes of the ranks: one axis, and two if their number has factors.

    >>> meshes_of(4), meshes_of(3)
    ([(4,), (2, 2)], [(3,)])
    """
    return [(ranks,), *factorisations(ranks, 2)[:1]]


def makers(ranks: int, count: int = _RANDOM) -> dict[str, Callable[[nn.Module], AutoParallel]]:
    """Builds plans by name: data parallel, parameters stored split, the best on each mesh, and so many random ones."""
    found: dict[str, Callable[[nn.Module], AutoParallel]] = {
        "data": lambda model: AutoParallel(model, "data_parallel"),
        "zero": lambda model: planned_by(model, split_storage),
    }
    meshes = meshes_of(ranks)
    found.update((f"auto {mesh}", partial(_searched, mesh)) for mesh in meshes)
    for at in range(count):
        blur, mesh = BLURS[at % len(BLURS)], meshes[(at + at // len(BLURS)) % len(meshes)]
        found[f"blur {blur} {at}"] = partial(planned_by, planner=blurred(at, blur, mesh))
    return found


def _searched(mesh: tuple[int, ...], model: nn.Module) -> AutoParallel:
    return AutoParallel(model, "dynamic_programming").search(mesh=mesh)
