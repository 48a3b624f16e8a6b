"""Pipelines: a callable captured, cut into stages, each planned and bound on ranks of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from shardwright.api.bound import BoundCall, device_of
from shardwright.api.pipeline_job import place_parameters, run_in_job
from shardwright.api.settings import Settings
from shardwright.api.stages import Target, capture_target, make_target, plan_target
from shardwright.base.dump import dump_of
from shardwright.capture.capture import capture
from shardwright.cost.machine_files import load_machine
from shardwright.cost.operations import flops
from shardwright.errors import PipelineError, Problems
from shardwright.ir.choice import Choice
from shardwright.ir.graph import Graph
from shardwright.ir.layout import Layout
from shardwright.ir.plan import Plan
from shardwright.ir.program import LocalProgram
from shardwright.partition.local_program import options_of, program_before_overlap
from shardwright.pipeline.cell import PipelineCell, PipelineRequest, stage_marks
from shardwright.pipeline.cut import Stage, cut_graph
from shardwright.pipeline.distributed_run import TiedGradients
from shardwright.pipeline.means import with_counted_means
from shardwright.pipeline.micro import NEVER_MEET, Cut, batch_cuts, cut_plan, micro_mesh
from shardwright.pipeline.parts import MicroBatchesMeet, Parts, parts_of
from shardwright.pipeline.run import PipelineRun, SimulatedPipelineRun, StagePlace
from shardwright.pipeline.schedules.named import make_schedule
from shardwright.pipeline.schedules.schedule import Schedule
from shardwright.pipeline.stage_run import StageRun
from shardwright.pipeline.stages import Placement, assign_stages
from shardwright.report.plan_view import PlanView
from shardwright.world.current import World
from shardwright.world.distributed.world import DistributedWorld
from shardwright.world.simulated.world import SimulatedWorld


@dataclass(frozen=True)
class PlannedStage:
    """A stage, its plan, and its program in parts."""

    stage: Stage
    plan: Plan
    parts: Parts
    first_rank: int
    ranks: int


class PipelinePlan:
    """The plans of all stages, and the schedule that runs them.

    Attributes:
        stages: the plan of each stage, which prints as a table.
        schedule: what each rank does, in order.
    """

    def __init__(self, planned: Sequence[PlannedStage], schedule: Schedule):
        self.planned, self.schedule = planned, schedule
        self.stages = [PlanView(p.plan, p.parts.each[0]) for p in planned]

    def __str__(self) -> str:
        texts = [str(self.schedule)]
        for own, view in zip(self.planned, self.stages, strict=True):
            texts.append(f"stage {own.stage.index} on ranks {own.first_rank} to {own.first_rank + own.ranks - 1}\n{view}")
        return "\n\n".join(texts)


class PipelineBoundCall(BoundCall):
    """A callable whose stages run on ranks of their own, a micro-batch after the other."""

    def __init__(self, root: nn.Module, args: Any, kwargs: Any, world: World, settings: Settings):
        request = settings.pipeline
        assert request is not None
        self.root, self.world = root, world
        self.micro, self.compiler = None, None
        device = device_of(root, world)
        self.device_type = device.type
        named = settings.search.machine or ("cpu-gloo" if device.type != "cuda" else "h100")
        machine = world.on_first_rank(lambda: load_machine(named))
        rows = rank_counts(request.stages, world.size)
        target = make_target(
            root, args, kwargs, settings, world.size, device, machine, world.adds_wide(device), dump=dump_of(type(root).__name__, world.rank if world.processes > 1 else None),
            on_first_rank=world.on_first_rank,
        )  # fmt: skip
        graph = with_counted_means(capture_target(target, capture))
        self.graph = graph
        micro = micro_count(root, graph)
        schedule, placement = schedule_of(request, len(rows), micro)
        self.pipeline = plan_stages(target, graph, rows, placement, micro, stage_marks(root), world.keeps_pieces)
        self.view = PipelinePlan(self.pipeline.planned, schedule)  # type: ignore[assignment]
        planned = self.pipeline.planned
        places = [StagePlace(p.stage, p.parts, p.first_rank) for p in planned]
        cut, loss = self.pipeline.cut, loss_of(graph)
        self.tied: TiedGradients | None = None
        self.pipeline_run: PipelineRun
        if isinstance(world, DistributedWorld):
            stages = [(p.stage, p.parts, p.first_rank, p.ranks) for p in planned]
            self.pipeline_run, self.tied = run_in_job(
                world, graph, stages, cut, schedule, loss, request.output_broadcast, device
            )
        else:
            runs = {n: StageRun(p.stage, p.parts, SimulatedWorld(p.ranks).bind, is_split=True) for n, p in enumerate(planned)}
            self.pipeline_run = SimulatedPipelineRun(graph, places, runs, cut, schedule, loss)
        self.run = self._step
        self._split = []
        self._read = [self._reader(i) for i in graph.inputs]
        self.is_random = any(n.op.draws for n in graph.nodes)
        self._count_inputs()
        names = {i.value: n for n, i in enumerate(graph.inputs)}
        self._places = names
        self._own = {n: [names[i.name] for i in planned[n].parts.once.inputs] for n in self.pipeline_run.runs}

    @property
    def program(self) -> LocalProgram:  # type: ignore[override]
        """The program of the first stage's first micro-batch."""
        return self.pipeline.planned[0].parts.each[0]

    def _step(self, *values: Any) -> tuple[list[Any], list[Tensor]]:
        planned, given = self.pipeline.planned, list(values)
        if self.tied is not None:
            self.tied(given, self._places)
        outputs, updates = self.pipeline_run({n: [given[at] for at in own] for n, own in self._own.items()})
        found = {
            name: new
            for n, own in updates.items()
            for (name, _), new in zip(planned[n].stage.graph.updates, own, strict=True)
        }
        return outputs, [found[name] for name, _ in self.graph.updates]


# -- planning ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedPipeline:
    """All stages, planned, and where micro-batches cut the values between them."""

    planned: list[PlannedStage]
    cut: Cut


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


def micro_count(root: nn.Module, graph: Graph) -> int:
    """Returns the number of micro-batches: that of the cell, or as many as the batch has samples.

    Raises:
        PipelineError: the root is no cell, or nothing carries a batch.
    """
    if not isinstance(root, PipelineCell):
        raise PipelineError(
            "pipeline(stages=...): the target has no number of micro-batches; give sw.AutoParallel(sw.PipelineCell(model, micro_size=4))"
        )
    batch = next((i.meta.shape[0] for i in graph.inputs if i.kind == "input" and i.meta.shape), 0)
    if not batch:
        raise PipelineError("a pipeline needs a tensor input whose dim 0 is the batch; the call has none")
    step = math.ceil(batch / min(root.micro_size, batch))
    return math.ceil(batch / step)  # as torch.chunk: a batch of 5 in 4 gives 2, 2, 1


def schedule_of(request: PipelineRequest, rows: int, micro: int) -> tuple[Schedule, Placement]:
    """Returns the schedule that was asked for, and where its stages are."""
    asked = request.scheduler
    if isinstance(asked, Schedule):
        return asked, Placement(rows, asked.row_of_stage)
    name = {"1f1b": "interleaved_1f1b", "zero_bubble": "zero_bubble_h1"}.get(asked, asked) if request.interleave else asked
    per_row = 2 if request.interleave or name == "zero_bubble_v" else 1
    schedule = make_schedule(name, rows, micro, per_row)
    return schedule, Placement(rows, schedule.row_of_stage)


def loss_of(graph: Graph) -> int | None:
    """Returns the position of the output that gradients come from: the first, if it is a scalar that needs one."""
    first = graph.outputs[0] if graph.outputs else None
    if isinstance(first, str) and not graph.metas[first].shape and first in graph.needs_grad:
        return 0
    return None


def plan_stages(
    target: Target, graph: Graph, rows: Sequence[int], placement: Placement, micro: int, marks: Any, keeps_pieces: bool = False
) -> PlannedPipeline:
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
    costs = {node.name: flops(node.op) + sum(m.bytes for m in (*node.op.inputs, *node.op.outputs)) for node in graph.nodes}
    count = len(placement.row_of_stage)
    stages = cut_graph(graph, assign_stages(graph, marks, placement, costs), count)
    cut = (
        Cut()
        if micro == 1
        else Cut(dict(batch_cuts({i.value: i.meta.shape for i in graph.inputs if i.kind == "input"}, micro)))
    )
    problems = Problems()
    plans, whole = [], []
    for stage in stages:
        ranks = rows[placement.row_of_stage[stage.index]]
        plan = _plan_stage(target, stage, ranks, cut, micro)
        whole.append(plan)
        plans.append(cut_plan(plan, micro, cut, problems) if micro > 1 else plan)
    problems.raise_if_any(_CANNOT.format(micro))
    first = [sum(rows[:row]) for row in placement.row_of_stage]
    if keeps_pieces:
        stored = place_parameters(target.root, list(zip(stages, whole, first, strict=True)), target.device)
        plans = [_with_stored(plan, own, micro) for plan, own in zip(plans, stored, strict=True)]
    planned = []
    for stage, plan, start in zip(stages, plans, first, strict=True):
        program = program_before_overlap(plan)
        try:
            options = options_of(replace(plan, machine=None))
            parts = parts_of(program, micro, options, tuple(stage.received), start if keeps_pieces else 0)
        except MicroBatchesMeet as met:
            node = next(n for n in plan.graph.nodes if n.name == str(met))
            problems.add(f"{node.where} computes with the whole batch, such as its mean and variance; {NEVER_MEET}")
            continue
        planned.append(PlannedStage(stage, plan, parts, start, rows[placement.row_of_stage[stage.index]]))
    problems.raise_if_any(_CANNOT.format(micro))
    return PlannedPipeline(planned, cut)


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
