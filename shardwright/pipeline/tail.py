"""Tails: what the last stage computes with the whole batch, such as a contrastive loss, once all micro-batches have passed.

A tail is one more stage, on the ranks of the last one. It runs once a step: it receives each value from all micro-batches,
joined and whole on every rank, and gives each its part of the gradient back. So the last stage runs all its forwards first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from shardwright.base.operators import may_draw
from shardwright.errors import Problems
from shardwright.ir.graph import Graph
from shardwright.ir.layout import Layout
from shardwright.ir.plan import Plan
from shardwright.partition.local_program import options_of, program_before_overlap
from shardwright.pipeline.cut import cut_graph
from shardwright.pipeline.in_place import MicroBatchesMeet
from shardwright.pipeline.micro import cut_plan
from shardwright.pipeline.parts import parts_of
from shardwright.pipeline.schedules.actions import FORWARD
from shardwright.pipeline.schedules.schedule import Schedule
from shardwright.pipeline.stages import free_nodes
from shardwright.pipeline.units import Cut


def meeting(plan: Plan, cut: Cut, received: Collection[str]) -> list[str]:
    """Lists the operators of a stage's plan that need the whole batch.

    Args:
        plan: of the stage.
        cut: where the values that it reads are cut.
        received: those that come from other stages.
    """
    found: list[str] = []
    made = cut_plan(plan, cut.copy(), Problems(), found)
    if not found:
        try:
            parts_of(program_before_overlap(made), cut.units, options_of(replace(made, machine=None)), tuple(received))
        except MicroBatchesMeet as met:
            found.append(str(met))
    return found


def tail_of(graph: Graph, met: Collection[str], stage_of: Mapping[str, int] | None = None, last: int = 0) -> list[str] | None:
    """Lists the operators of a tail: those that need the whole batch, and all that read what they make.

    Args:
        graph: the whole graph.
        met: operators that need the whole batch.
        stage_of: the stage of every operator that is not free, if there are stages yet.
        last: the number of the last stage, of which a tail can take operators.

    Returns:
        Their names, or ``None`` if the tail would draw random numbers: those of all stages are drawn before.
    """
    free = free_nodes(graph)
    values: set[str] = set()
    tail = []
    for node in graph.nodes:
        if node.name in free or (stage_of is not None and stage_of[node.name] < last):
            continue
        if node.name in met or values.intersection(node.inputs):
            if may_draw(node.op.target):
                return None
            values.update(node.outputs)
            tail.append(node.name)
    return tail


def whole_tail(plan: Plan, cut: Cut) -> list[str]:
    """Lists the operators of a tail of the whole graph, none if there can be no tail.

    Args:
        plan: of the whole graph.
        cut: where the inputs are cut.
    """
    graph, body, tail = plan.graph, plan, list[str]()
    while met := meeting(body, cut, ()):
        found = tail_of(graph, [*tail, *met])
        if found is None or len(found) == len(graph.nodes):
            return []
        tail = found
        stage_of = {node.name: int(node.name in tail) for node in graph.nodes}
        body = replace(plan, graph=cut_graph(graph, stage_of, 2)[0].graph)
    return tail


def received_whole(plan: Plan, received: Collection[str]) -> dict[str, Layout]:
    """Returns the layouts in which a tail receives values: whole on every rank."""
    return {i.value: Layout.replicated(plan.mesh, len(i.meta.shape)) for i in plan.graph.inputs if i.value in received}


def lets_all_pass(schedule: Schedule) -> bool:
    """Tells whether the last stage of a schedule runs all its forwards before its first backward."""
    last = len(schedule.row_of_stage) - 1
    kinds = [a.kind for a in schedule.rows[schedule.row_of_stage[last]] if a.stage == last and a.is_compute]
    return kinds == sorted(kinds, key=lambda kind: kind != FORWARD)
