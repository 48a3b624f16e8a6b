"""From a callable to the plan of a pipeline: its graph in stages, each planned, and the schedule of their micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from shardwright.pipeline.cell import PipelineCell, PipelineRequest, stage_marks
from shardwright.pipeline.cut import Stage, cut_graph
from shardwright.pipeline.means import with_counted_means
from shardwright.pipeline.micro import NEVER_MEET, Cut, batch_cuts, cut_plan, micro_mesh
from shardwright.pipeline.parts import MicroBatchesMeet, parts_of
from shardwright.pipeline.pipeline_plan import PipelinePlan, PlannedStage
from shardwright.pipeline.random_turns import check_order_of_draws
from shardwright.pipeline.schedules.check import check_schedule
from shardwright.pipeline.schedules.schedule import Schedule
from shardwright.pipeline.scheduling import forwards_first, micro_batches, placement_of, schedule_of
from shardwright.pipeline.stage_times import cost_of, operator_seconds, times_of
from shardwright.pipeline.stages import KnownCut, Mark, Placement, assign_stages
from shardwright.pipeline.tail import lets_all_pass, meeting, received_whole, tail_of, whole_tail
from shardwright.train.accumulation.module import GradAccumulation

MOST_IN_TAIL = 0.5  # of the seconds of all operators, without marks

# By module and placement. Other signatures are cut alike.
_cuts: WeakKeyDictionary[nn.Module, dict[Placement, KnownCut]] = WeakKeyDictionary()


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
    stages = [p for p in planned if not p.is_tail]
    costs = [cost_of(p.whole) for p in stages]
    tail = planned[-1] if planned[-1].is_tail else None
    if tail is not None:  # its time is shared out among the forwards of the last stage
        costs[-1] = costs[-1].followed_by(cost_of(tail.whole))
    times = times_of(costs, [p.stage for p in stages], graph, target.machine, sizes)
    schedule = target.on_first_rank(lambda: schedule_of(request, placement, len(sizes), times))
    notes: list[str] = []
    if tail is not None:
        schedule, notes = _for_tail(schedule, tail, request, placement)
    check_schedule(schedule)
    view = PipelinePlan(planned, schedule, times, sizes, graph, notes)
    return PlannedPipeline(graph, planned, cut, schedule, loss_of(graph), view)


def _for_tail(
    schedule: Schedule, tail: PlannedStage, request: PipelineRequest, placement: Placement
) -> tuple[Schedule, list[str]]:
    """Returns a schedule whose last stage runs all its forwards first, and what there is to say about it.

    Args:
        schedule: as it was asked for.
        tail: what needs all micro-batches.
        request: what was asked for.
        placement: which row runs which stage.

    Raises:
        PipelineError: the user's own schedule does not wait.
    """
    first = tail.stage.graph.nodes[0]
    notes = [f"for the whole batch, after all micro-batches: {len(tail.stage.graph.nodes)} operators from {first.where} on"]
    if lets_all_pass(schedule):
        return schedule, notes
    if isinstance(request.scheduler, Schedule):
        raise PipelineError(
            f"the schedule {schedule.name!r} begins backwards of the last stage before all its forwards have run, and "
            f'{first.where} needs the whole batch\n  Run all forwards first there, or give scheduler="gpipe"'
        )
    notes.append(f"so all forwards run first, in place of the schedule {schedule.name}")
    return forwards_first(placement, schedule.micro_count), notes


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
    count = len(placement.row_of_stage)
    cut = (
        Cut()
        if micro == 1
        else Cut(dict(batch_cuts({i.value: i.meta.shape for i in graph.inputs if i.kind == "input"}, micro)))
    )
    stage_of, stages = _cut_into_stages(target, graph, placement, micro, marks, cut)
    check_order_of_draws(graph, stage_of)
    ranks = [rows[row] for row in (*placement.row_of_stage, placement.row_of_stage[-1])]  # of the tail too
    first = [sum(rows[:row]) for row in (*placement.row_of_stage, placement.row_of_stage[-1])]
    problems = Problems()
    wholes: list[Plan] = []
    plans: list[Plan] = []
    for index in range(count):
        whole = _plan_stage(_followed(target, stages[index], graph), stages[index], ranks[index], cut, micro)
        if index == count - 1 and len(stages) == count and micro > 1 and not problems.lines:
            stages, whole = _taken_off(target, graph, stage_of, stages, whole, cut, micro)
        wholes.append(whole)
        plans.append(cut_plan(whole, micro, cut, problems) if micro > 1 else whole)
    problems.raise_if_any(_CANNOT.format(micro))
    for stage in stages[count:]:
        whole = _plan_stage(_followed(target, stage, graph), stage, ranks[count], Cut(), micro)
        wholes.append(replace(whole, input_layouts={**whole.input_layouts, **received_whole(whole, stage.received)}))
        plans.append(wholes[-1])
    if keeps_pieces:
        stored = place_parameters(target.root, list(zip(stages, wholes, first)), target.device)
        plans = [
            _with_stored(plan, own, 1 if stage.index == count else micro)
            for stage, plan, own in zip(stages, plans, stored, strict=True)
        ]
    planned = []
    for stage, whole, plan, start in zip(stages, wholes, plans, first):
        program = program_before_overlap(plan)
        is_tail = stage.index == count
        try:
            options = options_of(replace(plan, machine=None))
            parts = parts_of(program, 1 if is_tail else micro, options, tuple(stage.received), start if keeps_pieces else 0)
        except MicroBatchesMeet as met:
            node = next(n for n in plan.graph.nodes if n.name == str(met))
            problems.add(f"{node.where} computes with the whole batch, such as its mean and variance; {NEVER_MEET}")
            continue
        planned.append(PlannedStage(stage, whole, plan, parts, start, ranks[stage.index], is_tail))
    problems.raise_if_any(_CANNOT.format(micro))
    return planned, cut


def _cut_into_stages(
    target: Target, graph: Graph, placement: Placement, micro: int, marks: Mapping[str, Mark], cut: Cut
) -> tuple[dict[str, int], list[Stage]]:
    """Cuts a graph into stages; without marks, with a tail if there has to be one, which no stage is balanced with.

    Args:
        target: the callable.
        graph: its graph.
        placement: which row runs which stage.
        micro: number of micro-batches.
        marks: rows of modules.
        cut: where the inputs are cut.

    Returns:
        The stage of every operator that is not free, and the stages.
    """
    count = len(placement.row_of_stage)
    if marks:
        stage_of = assign_stages(graph, marks, placement, {})
        return stage_of, cut_graph(graph, stage_of, count)
    known = _cuts.setdefault(target.root, {}).setdefault(placement, KnownCut())
    alone = _on_one_rank(target, graph)
    costs = operator_seconds(alone)
    tail = set(whole_tail(alone, micro, cut) if micro > 1 else [])
    read = {str(i.target) for i in graph.inputs for n in graph.nodes if n.name in tail and i.value in n.inputs}
    is_there = all(count - 1 in known.of_parameter.get(name, [count - 1]) for name in read)
    if not is_there or sum(costs.get(name, 0.0) for name in tail) > MOST_IN_TAIL * sum(costs.values()):
        tail = set()  # hardly a pipeline, or its parameters are elsewhere
    body = replace(graph, nodes=tuple(node for node in graph.nodes if node.name not in tail))
    stage_of = {**assign_stages(body, marks, placement, costs, known), **dict.fromkeys(tail, count)}
    stages = cut_graph(graph, stage_of, count + bool(tail))
    if not known.of_operator:
        readers = [(str(i.target), p.index) for p in stages for i in p.graph.inputs if i.kind == "parameter"]
        known.note(graph, stage_of, readers, count)
    return stage_of, stages


def _taken_off(
    target: Target, graph: Graph, stage_of: Mapping[str, int], stages: list[Stage], whole: Plan, cut: Cut, micro: int
) -> tuple[list[Stage], Plan]:
    """Takes what needs the whole batch off the last stage, where the rest of it can do without.

    Args:
        target: the callable.
        graph: its graph.
        stage_of: the stage of each operator.
        stages: the stages.
        whole: the plan of the last one.
        cut: where values are cut.
        micro: number of micro-batches.

    Returns:
        The stages, with a tail if there is one, and the plan of the last one before it.
    """
    last, before = len(stages) - 1, (stages, whole)
    while met := meeting(whole, micro, cut, stages[last].received):
        tail = tail_of(graph, met, stage_of, last)
        if tail is None or len(tail) == sum(stage >= last for stage in stage_of.values()):
            return before
        stage_of = {**stage_of, **dict.fromkeys(tail, last + 1)}
        stages = cut_graph(graph, stage_of, last + 2)
        whole = _plan_stage(_followed(target, stages[last], graph), stages[last], whole.mesh.size, cut, micro)
    return stages, whole


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
