"""Cuts a graph into the stages of a pipeline, plans each on its ranks, and takes their programs apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from shardwright.api.pipeline_job import place_parameters
from shardwright.api.stages import Target, plan_target
from shardwright.errors import PipelineError, Problems
from shardwright.ir.choice import Choice
from shardwright.ir.graph import Graph
from shardwright.ir.layout import Layout
from shardwright.ir.plan import Plan
from shardwright.partition.local_program import options_of, program_before_overlap
from shardwright.pipeline.batch import Batch
from shardwright.pipeline.cut import Stage, cut_graph
from shardwright.pipeline.in_place import MicroBatchesMeet
from shardwright.pipeline.micro import cut_plan
from shardwright.pipeline.parts import parts_of
from shardwright.pipeline.pipeline_plan import PlannedStage
from shardwright.pipeline.random_turns import check_order_of_draws
from shardwright.pipeline.refusals import TOGETHER, cannot, refusal
from shardwright.pipeline.slices import NotInSlices, sequence_of
from shardwright.pipeline.stage_times import operator_bytes, operator_seconds
from shardwright.pipeline.stages import KnownCut, Mark, Placement, assign_stages
from shardwright.pipeline.tail import meeting, received_whole, tail_of, whole_tail
from shardwright.pipeline.units import MICRO, NEVER_MEET_SLICES, Cut, start_slices, unit_mesh

MOST_IN_TAIL = 0.5  # of the seconds of all operators, without marks

# By module and placement. Other signatures are cut alike.
_cuts: WeakKeyDictionary[nn.Module, dict[Placement, KnownCut]] = WeakKeyDictionary()


def known_cut(root: nn.Module, placement: Placement) -> KnownCut:
    """Returns the cut of a module's earlier signatures."""
    return _cuts.setdefault(root, {}).setdefault(placement, KnownCut())


def forget_cut(root: nn.Module, placement: Placement) -> None:
    """Forgets a module's cut, so that the next one may be another."""
    _cuts.setdefault(root, {}).pop(placement, None)


def plan_stages(
    target: Target,
    batch: Batch,
    rows: Sequence[int],
    placement: Placement,
    micro: int,
    marks: Any,
    keeps_pieces: bool = False,
    weight: float = 0.0,
    slices: int = 1,
) -> tuple[list[PlannedStage], Cut]:
    """Cuts a graph into stages, plans each, and takes their programs apart.

    Args:
        target: the callable, with its settings.
        batch: its graph, and where the batch is in it.
        rows: how many ranks each row has.
        placement: which row runs which stage.
        micro: number of micro-batches.
        marks: rows of modules.
        keeps_pieces: whether this process keeps its rank's pieces of parameters, which are distributed then.
        weight: of bytes beside seconds, where stages are balanced.
        slices: number of slices of each micro-batch.

    Raises:
        StrategyError: strategies or stages that cannot be followed, operators that need the whole batch, or sequence.
    """
    graph, count = batch.graph, len(placement.row_of_stage)
    cut = cut_of_inputs(batch, micro, slices)
    stage_of, stages = _cut_into_stages(target, graph, placement, marks, cut, weight)
    check_order_of_draws(graph, stage_of)
    ranks = [rows[row] for row in (*placement.row_of_stage, placement.row_of_stage[-1])]  # of the tail too
    first = [sum(rows[:row]) for row in (*placement.row_of_stage, placement.row_of_stage[-1])]
    problems = Problems()
    wholes: list[Plan] = []
    plans: list[Plan] = []
    for index in range(count):
        whole = _plan_stage(_followed(target, stages[index], graph), stages[index], ranks[index], cut)
        if index == count - 1 and len(stages) == count and _may_have_tail(cut) and not problems.lines:
            stages, whole = _taken_off(target, graph, stage_of, stages, whole, cut)
        wholes.append(whole)
        plans.append(cut_plan(whole, cut, problems) if cut.units > 1 else whole)
        if slices > 1:  # of later stages nothing can be said then
            problems.raise_if_any(cannot(cut))
    problems.raise_if_any(cannot(cut))
    for stage in stages[count:]:
        whole = _plan_stage(_followed(target, stage, graph), stage, ranks[count], Cut(micro=micro))
        wholes.append(replace(whole, input_layouts={**whole.input_layouts, **received_whole(whole, stage.received)}))
        plans.append(wholes[-1])
    if keeps_pieces:
        stored = place_parameters(target.root, list(zip(stages, wholes, first)), target.device)
        plans = [
            _with_stored(plan, own, Cut() if stage.index == count else cut)
            for stage, plan, own in zip(stages, plans, stored, strict=True)
        ]
    planned = []
    for stage, whole, plan, start in zip(stages, wholes, plans, first):
        is_tail = stage.index == count
        try:
            program = program_before_overlap(plan)
            options, units = options_of(replace(plan, machine=None)), 1 if is_tail else cut.units
            parts = parts_of(program, units, options, tuple(stage.received), start if keeps_pieces else 0, slices)
        except MicroBatchesMeet as met:
            node = next(n for n in plan.graph.nodes if n.name == str(met))
            problems.add(
                refusal(plan.graph, node, TOGETHER) if slices == 1 else f"{node.where} {TOGETHER}; {NEVER_MEET_SLICES}"
            )
            continue
        except NotInSlices as error:
            problems.add(f"{error}; {NEVER_MEET_SLICES}")
            continue
        planned.append(PlannedStage(stage, whole, plan, parts, start, ranks[stage.index], is_tail))
    problems.raise_if_any(cannot(cut))
    return planned, cut


def cut_of_inputs(batch: Batch, micro: int, slices: int) -> Cut:
    """Returns where units cut the inputs of a graph: along the batch, and along the sequence of its causal attention.

    Args:
        batch: the batch, in its graph.
        micro: number of micro-batches.
        slices: of each of them.

    Raises:
        PipelineError: there is no sequence that can be cut into so many slices.
    """
    shapes = {i.value: i.meta.shape for i in batch.graph.inputs if i.kind == "input"}
    cut = Cut(batch.layouts(MICRO, micro) if micro > 1 else {}, micro, slices)
    if slices > 1:
        starts, cut.ends = sequence_of(batch.graph, slices)
        cut.starts.update(starts)
        for value in shapes.keys() & cut.starts.keys():
            if cut.dim(value) == cut.starts[value]:
                raise PipelineError(
                    f"pipeline(slices={slices}): dim 0 of the inputs is the sequence of causal attention, and the batch has to "
                    "be: give the batch first"
                )
            start_slices(cut, value, shapes[value])
    return cut


def _may_have_tail(cut: Cut) -> bool:
    """Tells whether what needs the whole batch can run after all units: not after slices, whose backwards go another way."""
    return cut.micro > 1 and cut.slices == 1


def _cut_into_stages(
    target: Target, graph: Graph, placement: Placement, marks: Mapping[str, Mark], cut: Cut, weight: float
) -> tuple[dict[str, int], list[Stage]]:
    """Cuts a graph into stages; without marks, with a tail if there has to be one, which no stage is balanced with.

    Args:
        target: the callable.
        graph: its graph.
        placement: which row runs which stage.
        marks: rows of modules.
        cut: where the inputs are cut.
        weight: of bytes beside seconds in the balance.

    Returns:
        The stage of every operator that is not free, and the stages.
    """
    count = len(placement.row_of_stage)
    if marks:
        stage_of = assign_stages(graph, marks, placement, {})
        return stage_of, cut_graph(graph, stage_of, count)
    known = known_cut(target.root, placement)
    alone = _on_one_rank(target, graph)
    seconds = operator_seconds(alone)
    costs = blended(seconds, operator_bytes(alone), weight) if weight else seconds
    tail = set(whole_tail(alone, cut) if _may_have_tail(cut) else [])
    read = {str(i.target) for i in graph.inputs for n in graph.nodes if n.name in tail and i.value in n.inputs}
    is_there = all(count - 1 in known.of_parameter.get(name, [count - 1]) for name in read)
    if not is_there or sum(seconds.get(name, 0.0) for name in tail) > MOST_IN_TAIL * sum(seconds.values()):
        tail = set()  # hardly a pipeline, or its parameters are elsewhere
    body = replace(graph, nodes=tuple(node for node in graph.nodes if node.name not in tail))
    stage_of = {**assign_stages(body, marks, placement, costs, known), **dict.fromkeys(tail, count)}
    stages = cut_graph(graph, stage_of, count + bool(tail))
    if not known.of_operator:
        readers = [(str(i.target), p.index) for p in stages for i in p.graph.inputs if i.kind == "parameter"]
        known.note(graph, stage_of, readers, count)
    return stage_of, stages


def blended(seconds: Mapping[str, float], sizes: Mapping[str, float], weight: float) -> dict[str, float]:
    """Returns the costs by which stages are balanced: shares of seconds, and of bytes with a weight."""
    all_seconds, all_bytes = sum(seconds.values()) or 1.0, sum(sizes.values()) or 1.0
    return {name: own / all_seconds + weight * sizes.get(name, 0.0) / all_bytes for name, own in seconds.items()}


def _taken_off(
    target: Target, graph: Graph, stage_of: Mapping[str, int], stages: list[Stage], whole: Plan, cut: Cut
) -> tuple[list[Stage], Plan]:
    """Takes what needs the whole batch off the last stage, where the rest of it can do without.

    Args:
        target: the callable.
        graph: its graph.
        stage_of: the stage of each operator.
        stages: the stages.
        whole: the plan of the last one.
        cut: where values are cut.

    Returns:
        The stages, with a tail if there is one, and the plan of the last one before it.
    """
    last, before = len(stages) - 1, (stages, whole)
    while met := meeting(whole, cut, stages[last].received):
        tail = tail_of(graph, met, stage_of, last)
        if tail is None or len(tail) == sum(stage >= last for stage in stage_of.values()):
            return before
        stage_of = {**stage_of, **dict.fromkeys(tail, last + 1)}
        stages = cut_graph(graph, stage_of, last + 2)
        whole = _plan_stage(_followed(target, stages[last], graph), stages[last], whole.mesh.size, cut)
    return stages, whole


def _with_stored(plan: Plan, stored: dict[str, Layout], cut: Cut) -> Plan:
    """Returns a plan whose parameters are stored in these layouts over the stage's ranks."""
    if cut.units > 1:
        stored = {
            value: Layout.of(unit_mesh(layout.mesh, cut.micro, cut.slices), layout.bound, (), layout.sizes)
            for value, layout in stored.items()
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


def _plan_stage(target: Target, stage: Stage, ranks: int, cut: Cut) -> Plan:
    """Plans a stage on its ranks; received values get the layout in which they are read first."""
    names = {str(i.target) for i in stage.graph.inputs if i.kind in ("parameter", "buffer")}
    given = {n: entry for n, entry in target.asked.parameter_plan.items() if n in names}
    asked = replace(target.asked, devices=ranks, parameter_plan=given, output="whole")
    strategy = target.settings.dataset_strategy
    if stage.received:
        strategy = tuple(_entry(i.value, i.meta.shape, stage, ranks, cut) for i in stage.graph.inputs if i.kind == "input")
    search = target.settings.search
    if not any(request.is_automatic for request in target.settings.recompute):  # whose stages hold a part of the batch only
        search = replace(search, memory=None)
    settings = replace(target.settings, dataset_strategy=strategy, search=search)
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


def _entry(value: str, shape: tuple[int, ...], stage: Stage, ranks: int, cut: Cut) -> tuple[int, ...]:
    """Returns the strategy of an input: received values are split along the batch, as far as a micro-batch has samples."""
    dim = cut.dim(value) if value in stage.received else None
    ways = 1
    if dim is not None:
        size = cut.samples.get(value, shape[dim])
        ways = max(d for d in range(1, ranks + 1) if ranks % d == 0 and d <= max(1, size // cut.micro))
    return tuple(ways if d == dim else 1 for d in range(len(shape)))
