"""From a callable to the plan of a pipeline: its graph in stages, each planned, and the schedule of their micro-batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from shardwright.api.decided import captured_way
from shardwright.api.pipeline_stages import forget_cut, known_cut, plan_stages
from shardwright.api.settings import refuse_with_pipeline
from shardwright.api.stages import Target
from shardwright.base.text import bytes_text, enough
from shardwright.errors import MemoryLimitError, PipelineError
from shardwright.ir.graph import Graph
from shardwright.pipeline.batch import Batch
from shardwright.pipeline.causal_masks import with_causal_attention
from shardwright.pipeline.cell import PipelineCell, PipelineRequest, refuse_nested, stage_marks
from shardwright.pipeline.cut import loss_of
from shardwright.pipeline.means import with_counted_means
from shardwright.pipeline.parts import moves_once
from shardwright.pipeline.pipeline_plan import PipelinePlan, PlannedStage
from shardwright.pipeline.rows import with_sorted_rows
from shardwright.pipeline.schedules.check import check_schedule
from shardwright.pipeline.schedules.parameters import with_parameters_in_time
from shardwright.pipeline.schedules.schedule import Schedule
from shardwright.pipeline.scheduling import forwards_first, micro_batches, placement_of, schedule_of
from shardwright.pipeline.slices import sizes_of_slices
from shardwright.pipeline.stage_times import cost_of, times_of
from shardwright.pipeline.stages import Mark, Placement
from shardwright.pipeline.tail import lets_all_pass
from shardwright.pipeline.units import Cut
from shardwright.train.accumulation.module import GradAccumulation

BALANCES = (0.0, 1.0, 4.0, 1e6)  # weights of bytes beside seconds, for automatic cuts under a memory limit


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
        MemoryLimitError: no cut fits into the memory of a rank.
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
    refuse_nested(root.network)
    placement = placement_of(request, len(rows), root.micro_size)
    marks = stage_marks(root)
    batch = Batch(with_counted_means(captured_once(target)), root.batch_dim)
    if request.slices > 1:
        batch = batch.with_graph(with_causal_attention(batch.graph))
    sizes = micro_batches(batch, root.micro_size)
    if len(sizes) > 1:
        batch = batch.with_graph(with_sorted_rows(batch))
    parts = _Pipeline(target, batch, rows, placement, sizes, marks)
    limit, state = target.settings.search.memory, target.settings.search.optimizer_bytes_per_byte
    if limit is None:
        return parts.planned(keeps_pieces, 0.0)
    is_free = not marks and not known_cut(root, placement).of_operator
    peaks: list[tuple[float, int]] = []
    for weight in BALANCES if is_free else BALANCES[:1]:
        found = parts.planned(False, weight)
        peaks.append(max((memory.peak, row) for row, memory in enumerate(found.view.memory_with(state))))
        if peaks[-1][0] <= limit:
            return parts.planned(True, weight) if keeps_pieces else found
        if is_free:
            forget_cut(root, placement)
    need, row = min(peaks)
    raise MemoryLimitError(
        f"pipeline(stages={request.stages}): {'no cut' if is_free else 'the cut'} fits into {bytes_text(int(limit))} a rank; "
        f"row {row} needs {bytes_text(int(need))}{', in the smallest' if is_free else ''}\n  allow memory='{enough(need)}', "
        "have layers computed again in the backward: .recompute(...), give more stages, more ranks, or "
        'a schedule that holds fewer micro-batches: scheduler="1f1b"',
        need,
    )


@dataclass(frozen=True)
class _Pipeline:
    """All that the plan of a pipeline depends on."""

    target: Target
    batch: Batch
    rows: tuple[int, ...]
    placement: Placement
    sizes: tuple[int, ...]
    marks: Mapping[str, Mark]

    def planned(self, keeps_pieces: bool, weight: float) -> PlannedPipeline:
        """Plans it.

        Args:
            keeps_pieces: whether this process keeps its rank's pieces of parameters, which are distributed then.
            weight: of bytes beside seconds, where stages are balanced.
        """
        target, graph, sizes, request = self.target, self.batch.graph, self.sizes, self.target.settings.pipeline
        assert request is not None
        planned, cut = plan_stages(
            target, self.batch, self.rows, self.placement, len(sizes), self.marks, keeps_pieces, weight, request.slices
        )  # fmt: skip
        stages = [p for p in planned if not p.is_tail]
        costs = [cost_of(p.whole) for p in stages]
        tail = planned[-1] if planned[-1].is_tail else None
        if tail is not None:  # its time is shared out among the forwards of the last stage
            costs[-1] = costs[-1].followed_by(cost_of(tail.whole))
        parts = [size * own for size in sizes for own in sizes_of_slices(graph, request.slices)]
        times = times_of(costs, [p.stage for p in stages], graph, target.machine, parts)
        schedule = target.on_first_rank(lambda: schedule_of(request, self.placement, len(sizes), times))
        notes: list[str] = []
        if tail is not None:
            schedule, notes = _for_tail(schedule, tail, request, self.placement)
        check_schedule(schedule)
        gathered, reduced = ([p.stage.index for p in stages if moves_once(p.parts, phase)] for phase in ("forward", "backward"))
        schedule = with_parameters_in_time(schedule, gathered, reduced, times)
        view = PipelinePlan(planned, schedule, times, sizes, graph, notes, sizes_of_slices(graph, request.slices))
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
    if stages > size:
        raise PipelineError(f"pipeline(stages={stages}): {size} ranks cannot be {stages} stages; give at most stages={size}")
    if size % stages:
        raise PipelineError(
            f"pipeline(stages={stages}): {size} ranks do not divide into {stages} stages; give the ranks of each, "
            f"stages={(*[size // stages] * (stages - 1), size - size // stages * (stages - 1))}"
        )
    return (size // stages,) * stages
