"""Passes: the changes of a graph, its plan and its program, in order, on the way from a model to what a rank runs.

Running, ``plan_for``, predictions of memory and prices, the search for what to recompute and the command line all go through
these tables and no other. ``SHARDWRIGHT_DUMP=folder`` writes the text after each pass. To add a feature: a folder in
``train/`` with a function from graph to graph, plan to plan or program to program, and a row here.

Steps between the tables are no passes: the planner of the mode makes the plan of the last graph (``plan/modes/table.py``),
the partitioner makes the program of the last plan (``partition/partitioner.py``), and moves are fused and started early
(``partition/overlap.py``), before or after which the rows of PROGRAM run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, TypeVar

from torch import nn

from shardwright.base.dump import NO_DUMP, Dump
from shardwright.errors import Problems
from shardwright.ir.buckets import MoveBuckets
from shardwright.ir.graph import Graph
from shardwright.ir.plan import Plan, ProgramPass
from shardwright.ir.program import LocalProgram
from shardwright.plan.asked.attributes import with_attributes
from shardwright.plan.asked.manual_split import check_in_place
from shardwright.report.table import plan_table
from shardwright.train.copies.shared_nodes import share_between_copies
from shardwright.train.copies.turns import interleave
from shardwright.train.copies.virtual_axis import in_copies, is_interleaved
from shardwright.train.fusion.settings import buckets_of
from shardwright.train.optimizer_parallel.stored import OptimizerParallel, split_parameters
from shardwright.train.outputs.read_later import with_outputs_read_later
from shardwright.train.precision.wires import Precision, may_have_wires, with_wires
from shardwright.train.recompute.marked import recompute_marked, recompute_parameter_gathers
from shardwright.train.recompute.request import RecomputeRequest

T = TypeVar("T")


@dataclass(frozen=True)
class Asked:
    """Arguments of passes: what a user asked of training, besides the layouts of operators.

    Args:
        devices: number of ranks.
        parameters: of the model, by every name that they have.
        follows_marks: whether strategies are followed, as in all modes but ``data_parallel``.
        parameter_plan: layouts given to parameters, each with the words that a message calls it by.
        enable_alltoall: whether moves may be all-to-alls.
        schedule: which moves share collectives.
        hsdp: how parameters are split over the ranks that would hold the same; ``None``: not.
        precision: in which dtypes the program computes and communicates.
        recompute: by module path, what is computed again in the backward pass.
        accumulates: whether gradients add up over micro-batches before they move.
        adds_wide: whether the world adds half precision in float32, as all but NCCL do.
        output: which outputs are made whole; see :func:`~shardwright.train.outputs.read_later.with_outputs_read_later`.
    """

    devices: int
    parameters: Mapping[str, nn.Parameter] = field(default_factory=dict)
    follows_marks: bool = True
    parameter_plan: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    enable_alltoall: bool = True
    schedule: MoveBuckets = field(default_factory=MoveBuckets)
    hsdp: OptimizerParallel | None = None
    precision: Precision = field(default_factory=Precision)
    recompute: Mapping[str, RecomputeRequest] = field(default_factory=dict)
    accumulates: bool = False
    adds_wide: bool = True
    output: str | None = None


@dataclass(frozen=True)
class Pass(Generic[T]):
    """One row: ``change`` runs where ``when`` is true of what was asked."""

    name: str
    when: Callable[[Asked, Graph], bool]
    change: Callable[[T, Asked], T]


@dataclass(frozen=True)
class ProgramRow:
    """One row of the program's passes; see :class:`~shardwright.ir.plan.ProgramPass`."""

    name: str
    when: Callable[[Asked, Graph], bool]
    change: Callable[[LocalProgram, Plan, Asked], LocalProgram]
    after_overlap: bool = False


def _follows_marks(asked: Asked, graph: Graph) -> bool:
    return asked.follows_marks


def _always(asked: Asked, graph: Graph) -> bool:
    return True


def _buckets(plan: Plan, asked: Asked) -> Plan:
    return replace(plan, schedule=replace(asked.schedule, ids=buckets_of(plan.graph.inputs, asked.parameters)))


def _alltoall(plan: Plan, asked: Asked) -> Plan:
    return replace(plan, enable_alltoall=asked.enable_alltoall and not is_interleaved(plan.graph))


def _checked_in_place(plan: Plan, asked: Asked) -> Plan:
    check_in_place(plan)
    return plan


def _split_parameters(plan: Plan, asked: Asked) -> Plan:
    assert asked.hsdp is not None
    return split_parameters(plan, asked.hsdp, asked.parameters)


def _wires(program: LocalProgram, plan: Plan, asked: Asked) -> LocalProgram:
    return with_wires(program, plan.graph, asked.precision, asked.accumulates, asked.adds_wide)


def _checked_marks(graph: Graph, asked: Asked) -> Graph:
    problems = Problems()
    problems.lines += graph.impossible_marks
    problems.raise_if_any("the strategies cannot be followed")
    return graph


GRAPH: tuple[Pass[Graph], ...] = (
    Pass("forms of strategies", _follows_marks, _checked_marks),
    Pass("attributes", _follows_marks, lambda graph, asked: with_attributes(graph, asked.devices, dict(asked.parameter_plan))),
    Pass("copies", _follows_marks, lambda graph, asked: in_copies(graph, asked.parameter_plan)),
    Pass("shared by copies", _always, lambda graph, asked: share_between_copies(graph)),
    Pass(
        "outputs read later",
        lambda asked, graph: not asked.accumulates,
        lambda graph, asked: with_outputs_read_later(graph, asked.output),
    ),
)

PLAN: tuple[Pass[Plan], ...] = (
    Pass("buckets", _always, _buckets),
    Pass("all-to-all", _always, _alltoall),
    Pass("in place", _always, _checked_in_place),
    Pass("optimizer parallel", lambda asked, graph: asked.hsdp is not None, _split_parameters),
)

PROGRAM: tuple[ProgramRow, ...] = (
    ProgramRow("wires", lambda asked, graph: may_have_wires(graph, asked.precision), _wires),
    ProgramRow(
        "parameter gathers again",
        lambda asked, graph: asked.hsdp is not None and asked.hsdp.gathers_again,
        lambda program, plan, asked: recompute_parameter_gathers(program),
    ),
    ProgramRow(
        "recompute",
        lambda asked, graph: bool(asked.recompute) or any(node.recompute for node in graph.nodes),
        lambda program, plan, asked: recompute_marked(program, plan.graph, asked.recompute),
    ),
    ProgramRow(
        "turns of copies",
        lambda asked, graph: any(node.copy is not None for node in graph.nodes),
        lambda program, plan, asked: interleave(program, plan.graph),
        after_overlap=True,
    ),
)


def change_graph(graph: Graph, asked: Asked, dump: Dump = NO_DUMP) -> Graph:
    """Runs the passes on a graph."""
    for each in GRAPH:
        if each.when(asked, graph):
            graph = each.change(graph, asked)
            dump.write("graph", each.name, graph.__str__)
    return graph


def change_plan(plan: Plan, asked: Asked, dump: Dump = NO_DUMP) -> Plan:
    """Runs the passes on a plan, and adds those that its program will go through."""
    for each in PLAN:
        if each.when(asked, plan.graph):
            plan = each.change(plan, asked)
            dump.write("plan", each.name, partial(plan_table, plan))
    return with_program_passes(plan, asked)


def with_program_passes(plan: Plan, asked: Asked) -> Plan:
    """Adds to a plan the passes that its program goes through, given what was asked."""

    def of_row(row: ProgramRow) -> ProgramPass:
        return ProgramPass(row.name, lambda program, plan: row.change(program, plan, asked), row.after_overlap)

    return replace(plan, passes=tuple(of_row(row) for row in PROGRAM if row.when(asked, plan.graph)))
