"""From a callable to the plan of a pipeline: its graph in stages, each planned, and the schedule of their micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from shardwright.api.decided import captured_way
from shardwright.api.pipeline_job import place_parameters
from shardwright.api.settings import refuse_with_pipeline
from shardwright.api.stages import Target, plan_target
from shardwright.errors import PipelineError, Problems
from shardwright.ir.choice import Choice
from shardwright.ir.graph import Graph
from shardwright.ir.layout import Layout
from shardwright.ir.plan import Plan
from shardwright.partition.local_program import options_of, program_before_overlap
from shardwright.pipeline.cell import PipelineCell, stage_marks
from shardwright.pipeline.cut import Stage, cut_graph
from shardwright.pipeline.means import with_counted_means
from shardwright.pipeline.micro import NEVER_MEET, Cut, batch_cuts, cut_plan, micro_mesh
from shardwright.pipeline.parts import MicroBatchesMeet, parts_of
from shardwright.pipeline.pipeline_plan import PipelinePlan, PlannedStage
from shardwright.pipeline.schedules.check import check_schedule
from shardwright.pipeline.schedules.schedule import Schedule
from shardwright.pipeline.scheduling import micro_batches, placement_of, schedule_of
from shardwright.pipeline.stage_times import cost_of, operator_seconds, times_of
from shardwright.pipeline.stages import Placement, assign_stages
from shardwright.train.accumulation.module import GradAccumulation

# By module and placement, the stages that read each parameter. Other signatures are cut alike: parameters stay where they are.
_cuts: WeakKeyDictionary[nn.Module, dict[Placement, dict[str, list[int]]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class PlannedPipeline:
    """A pipeline with all that it runs.

    Args:
        graph: of the whole callable.
        planned: its stages.
        cut: where micro-batches cut the values between them.
        schedule: in which order the stages run them.
        loss: position of the output that gradients come from.
        view: the plan as it is shown.
    """

    graph: Graph
    planned: list[PlannedStage]
    cut: Cut
    schedule: Schedule
    loss: int | None
    view: PipelinePlan


def plan_pipeline(target: Target, keeps_pieces: bool = False) -> PlannedPipeline:
    """Plans a ``PipelineCell`` whose settings have a pipeline.

    Args:
        target: the cell.
        keeps_pieces: whether this process keeps its rank's pieces of parameters, which are distributed then.

    Raises:
        PipelineError: stages that cannot be, settings that a pipeline does not have.
        StrategyError: strategies that cannot be followed, operators that need the whole batch.
    """
    root, request = target.root, target.settings.pipeline
    assert request is not None
    rows = rank_counts(request.stages, target.asked.devices)
    refuse_with_pipeline(target.settings)
    refuse_accumulation(root)
    if not isinstance(root, PipelineCell):
        raise PipelineError(
            "pipeline(stages=...): the target has no number of micro-batches; give "
            "sw.AutoParallel(sw.PipelineCell(model, micro_size=4))"
        )
    placement = placement_of(request, len(rows), root.micro_size)
    marks = stage_marks(root)
    graph = with_counted_means(captured_once(target))
    sizes = micro_batches(graph, root.micro_size)
    planned, cut = plan_stages(target, graph, rows, placement, len(sizes), marks, keeps_pieces)
    times = times_of([cost_of(p.whole) for p in planned], [p.stage for p in planned], graph, target.machine, sizes)
    schedule = target.on_first_rank(lambda: schedule_of(request, placement, len(sizes), times))
    check_schedule(schedule)
    return PlannedPipeline(graph, planned, cut, schedule, loss_of(graph), PipelinePlan(planned, schedule, times, sizes, graph))


def captured_once(target: Target) -> Graph:
    """Captures a target that decides nothing by values of tensors.

    Raises:
        PipelineError: it does: a step that decides otherwise would have to be undone on every stage.
    """
    graph, _, decisions = captured_way(target, (), ())
    if decisions is not None:
        raise PipelineError(
            f"the target decides by values of tensors, at {decisions.sources[0]}: in a pipeline no stage knows what another "
            "one computes\n  Select with torch.where, or decide outside of the net"
        )
    return graph


def refuse_accumulation(root: nn.Module) -> None:
    """Refuses gradient accumulation around or within a pipeline.

    Raises:
        PipelineError: there is some.
    """
    found = next((path for path, module in root.named_modules() if isinstance(module, GradAccumulation)), None)
    if found is not None:
        raise PipelineError(
            f"sw.GradAccumulation ({found or 'the target'}) in a pipeline, whose micro-batches accumulate gradients already; "
            "leave it out, and multiply the micro_size of the PipelineCell by its number of parts"
        )


def rank_counts(stages: int | tuple[int, ...], size: int) -> tuple[int, ...]:
    """Returns how many ranks each row of a pipeline has.

    Args:
        stages: the number of rows, or the ranks of each.
        size: of the world.

    Raises:
        PipelineError: the ranks cannot be divided so.
    """
    counts = stages if isinstance(stages, tuple) else None
    if counts is not None:
        if sum(counts) != size or min(counts) < 1:
            raise PipelineError(
                f"pipeline(stages={counts}): {sum(counts)} ranks in all, the world has {size}; give counts that add up"
            )
        return counts
    assert isinstance(stages, int)
    if size % stages:
        raise PipelineError(
            f"pipeline(stages={stages}): {size} ranks do not divide into {stages} stages; give the ranks of each, "
            f"stages={(*[size // stages] * (stages - 1), size - size // stages * (stages - 1))}"
        )
    return (size // stages,) * stages


def loss_of(graph: Graph) -> int | None:
    """Returns the position of the output that gradients come from: the first, if it is a scalar that needs one."""
    first = graph.outputs[0] if graph.outputs else None
    if isinstance(first, str) and not graph.metas[first].shape and first in graph.needs_grad:
        return 0
    return None


def plan_stages(
    target: Target, graph: Graph, rows: Sequence[int], placement: Placement, micro: int, marks: Any, keeps_pieces: bool = False
) -> tuple[list[PlannedStage], Cut]:
    """Cuts a graph into stages, plans each, and takes their programs apart.

    Args:
        target: the callable, with its settings.
        graph: its graph.
        rows: how many ranks each row has.
        placement: which row runs which stage.
        micro: number of micro-batches.
        marks: rows of modules.
        keeps_pieces: whether this process keeps its rank's pieces of parameters, which are distributed then.

    Raises:
        StrategyError: strategies or stages that cannot be followed, operators that need the whole batch.
    """
    known = _cuts.setdefault(target.root, {}).setdefault(placement, {})
    costs = {} if marks or known else operator_seconds(_on_one_rank(target, graph))
    count = len(placement.row_of_stage)
    stages = cut_graph(graph, assign_stages(graph, marks, placement, costs, known), count)
    if not marks and not known:
        for stage in stages:
            for i in stage.graph.inputs:
                if i.kind == "parameter":
                    known.setdefault(str(i.target), []).append(stage.index)
    cut = (
        Cut()
        if micro == 1
        else Cut(dict(batch_cuts({i.value: i.meta.shape for i in graph.inputs if i.kind == "input"}, micro)))
    )
    problems = Problems()
    wholes: list[Plan] = []
    plans: list[Plan] = []
    for stage in stages:
        ranks = rows[placement.row_of_stage[stage.index]]
        wholes.append(_plan_stage(_followed(target, stage, graph), stage, ranks, cut, micro))
        plans.append(cut_plan(wholes[-1], micro, cut, problems) if micro > 1 else wholes[-1])
    problems.raise_if_any(_CANNOT.format(micro))
    first = [sum(rows[:row]) for row in placement.row_of_stage]
    if keeps_pieces:
        stored = place_parameters(target.root, list(zip(stages, wholes, first, strict=True)), target.device)
        plans = [_with_stored(plan, own, micro) for plan, own in zip(plans, stored, strict=True)]
    planned = []
    for stage, whole, plan, start in zip(stages, wholes, plans, first, strict=True):
        program = program_before_overlap(plan)
        try:
            options = options_of(replace(plan, machine=None))
            parts = parts_of(program, micro, options, tuple(stage.received), start if keeps_pieces else 0)
        except MicroBatchesMeet as met:
            node = next(n for n in plan.graph.nodes if n.name == str(met))
            problems.add(f"{node.where} computes with the whole batch, such as its mean and variance; {NEVER_MEET}")
            continue
        planned.append(PlannedStage(stage, whole, plan, parts, start, rows[placement.row_of_stage[stage.index]]))
    problems.raise_if_any(_CANNOT.format(micro))
    return planned, cut


_CANNOT = (
    "the batch cannot pass in {} micro-batches (exact are: micro_size=1; eval() of a batch norm; an operator over samples or "
    "channels in its place, such as a group norm)"
)


def _with_stored(plan: Plan, stored: dict[str, Layout], micro: int) -> Plan:
    """Returns a plan whose parameters are stored in these layouts over the stage's ranks."""
    if micro > 1:
        stored = {
            value: Layout.of(micro_mesh(layout.mesh, micro), layout.bound, (), layout.sizes) for value, layout in stored.items()
        }
    return replace(plan, input_layouts={**plan.input_layouts, **stored})


def _followed(target: Target, stage: Stage, graph: Graph) -> Target:
    """Returns the target with a mode that can plan a stage: propagation needs an operator to start from."""
    starts = [any(node.mark is not None for node in nodes) for nodes in (graph.nodes, stage.graph.nodes)]
    if target.settings.mode == "sharding_propagation" and starts == [True, False]:
        return replace(target, settings=replace(target.settings, mode="semi_auto"))
    return target


def _on_one_rank(target: Target, graph: Graph) -> Plan:
    """Plans the whole graph for one rank, whose prices balance the stages."""
    asked = replace(target.asked, devices=1, parameter_plan={}, follows_marks=False, hsdp=None, output="whole")
    settings = replace(target.settings, mode="data_parallel", dataset_strategy="full_batch", file=None, planner=None)
    return plan_target(replace(target, asked=asked, settings=settings), graph)


def _plan_stage(target: Target, stage: Stage, ranks: int, cut: Cut, micro: int) -> Plan:
    """Plans a stage on its ranks; received values get the layout in which they are read first."""
    names = {str(i.target) for i in stage.graph.inputs if i.kind in ("parameter", "buffer")}
    given = {n: entry for n, entry in target.asked.parameter_plan.items() if n in names}
    asked = replace(target.asked, devices=ranks, parameter_plan=given, output="whole")
    strategy = target.settings.dataset_strategy
    if stage.received:
        strategy = tuple(
            _entry(i.value, i.meta.shape, stage, ranks, cut, micro) for i in stage.graph.inputs if i.kind == "input"
        )
    settings = replace(target.settings, dataset_strategy=strategy)
    plan = plan_target(replace(target, asked=asked, settings=settings), stage.graph)
    wanted: dict[str, Layout] = {}
    for node in plan.graph.nodes:
        for value, layout in zip(node.inputs, plan.choices[node.name].inputs, strict=True):
            if value in stage.received:
                wanted.setdefault(value, layout.without_partial())
    return replace(plan, choices=_settled(plan, stage.sent), input_layouts={**plan.input_layouts, **wanted})


def _settled(plan: Plan, sent: Sequence[str]) -> dict[str, Choice]:
    """Returns the choices of a plan with the pending sums of what is sent done: other stages would have to add them."""
    choices = dict(plan.choices)
    for node in plan.graph.nodes:
        choice = choices[node.name]
        outputs = [la.without_partial() if v in sent else la for v, la in zip(node.outputs, choice.outputs, strict=True)]
        choices[node.name] = replace(choice, outputs=tuple(outputs))
    return choices


def _entry(value: str, shape: tuple[int, ...], stage: Stage, ranks: int, cut: Cut, micro: int) -> tuple[int, ...]:
    """Returns the strategy of an input: received values are split along the batch, as far as a micro-batch has samples."""
    dim = cut.dim(value) if value in stage.received else None
    ways = 1
    if dim is not None:
        ways = max(d for d in range(1, ranks + 1) if ranks % d == 0 and d <= max(1, shape[dim] // micro))
    return tuple(ways if d == dim else 1 for d in range(len(shape)))
