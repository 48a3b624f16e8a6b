"""The plan of a pipeline as it is shown: its schedule, the seconds of its stages, and the plan of each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from shardwright.base.text import bytes_text
from shardwright.ir.graph import Graph
from shardwright.ir.plan import Plan
from shardwright.pipeline.cut import Stage
from shardwright.pipeline.memory import kept_of_micro, row_memory
from shardwright.pipeline.parts import Parts
from shardwright.pipeline.passes import one_pass
from shardwright.pipeline.schedules.bound import gap, lower_bound
from shardwright.pipeline.schedules.check import peak_in_flight
from shardwright.pipeline.schedules.clock import StageTimes, Timeline, run_clock
from shardwright.pipeline.schedules.draw import draw_timeline, write_trace
from shardwright.pipeline.schedules.schedule import Schedule
from shardwright.plan.memory import MemoryTimeline
from shardwright.report.plan_view import PlanView


@dataclass(frozen=True)
class PlannedStage:
    """A stage, its plan, and its program in parts.

    Args:
        stage: the stage.
        whole: its plan for the whole batch, which is priced.
        plan: its plan with the axis of micro-batches.
        parts: its program.
        first_rank, ranks: those it runs on.
        is_tail: whether it runs once, after all micro-batches.
    """

    stage: Stage
    whole: Plan
    plan: Plan
    parts: Parts
    first_rank: int
    ranks: int
    is_tail: bool = False


class PipelinePlan:
    """The plans of all stages, and the schedule that runs them.

    Attributes:
        stages: the plan of each stage, which prints as a table.
        schedule: what each part of the ranks does, in order.
        sizes: samples of each micro-batch.
        slices: positions of each slice of its sequence; a 1 where it is not cut.
        notes: what differs from what was asked for.
    """

    def __init__(
        self, planned: Sequence[PlannedStage], schedule: Schedule, times: StageTimes, sizes: Sequence[int],
        graph: Graph, notes: Sequence[str] = (), slices: Sequence[int] = (1,),
    ):  # fmt: skip
        self.graph = graph
        self.planned, self.schedule, self.sizes, self.notes = planned, schedule, tuple(sizes), tuple(notes)
        self._seconds, self.slices = times, tuple(slices)
        self.stages = [PlanView(p.whole, p.parts.each[0]) for p in planned]

    @property
    def _in_turn(self) -> list[PlannedStage]:
        """The stages that the schedule runs."""
        return [own for own in self.planned if not own.is_tail]

    @cached_property
    def times(self) -> StageTimes:
        """Predicted seconds of each stage for a micro-batch, and the bytes that its busiest rank holds of one."""
        return replace(self._seconds, memory=[max(kept_of_micro(own, self.graph), 1.0) for own in self._in_turn])

    @cached_property
    def timeline(self) -> Timeline:
        """The predicted times of all actions of a step."""
        return run_clock(self.schedule, self.times)

    @cached_property
    def memory(self) -> tuple[MemoryTimeline, ...]:
        """The predicted memory of a rank of each row over a step, without optimizer states and without a tail."""
        return self.memory_with(0.0)

    def memory_with(self, optimizer: float) -> tuple[MemoryTimeline, ...]:
        """Predicts the memory with so many bytes of optimizer state per byte of parameters."""
        rows = one_pass(self.schedule)
        return tuple(row_memory(self._in_turn, rows, row, self.graph, optimizer) for row in range(len(rows)))

    @property
    def bound(self) -> float:
        """Seconds that no schedule of these stages can beat."""
        return lower_bound(self.times, self.schedule.micro_count, self.schedule.row_of_stage)

    def draw_timeline(self, path: str | os.PathLike[str]) -> None:
        """Draws the predicted timeline of a step as a ``.png`` or ``.svg``."""
        draw_timeline(self.timeline, os.fspath(path))

    def write_trace(self, path: str | os.PathLike[str]) -> None:
        """Writes the predicted timeline of a step for ``chrome://tracing`` or Perfetto."""
        write_trace(self.timeline, os.fspath(path))

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes the schedule as ``torch.distributed.pipelining`` does."""
        self.schedule.to_csv(os.fspath(path))

    def __str__(self) -> str:
        texts = [self.summary()]
        for own, view in zip(self.planned, self.stages, strict=True):
            name = "tail" if own.is_tail else f"stage {own.stage.index}"
            texts.append(f"{name} on {_ranks(own)}\n{view}")
        return "\n\n".join(texts)

    def summary(self) -> str:
        """Shows the schedule and the predicted times of the stages, without their operators."""
        return f"{self.schedule}\n{self._table()}"

    def _table(self) -> str:
        timeline, peaks = self.timeline, peak_in_flight(self.schedule)
        rows: list[tuple[str, ...]] = [("stage", "ranks", "operators", "F", "I", "W", "bytes held of a micro-batch")]
        for own, forward, backward, weight, memory in zip(
            [p for p in self.planned if not p.is_tail],
            self.times.forward,
            self.times.backward,
            self.times.weight,
            self.times.memory,
            strict=True,
        ):
            span = _ranks(own).partition(" ")[2]
            count = str(len(own.stage.graph.nodes))
            rows.append((str(own.stage.index), span, count, *map(_seconds, (forward, backward, weight)), f"{memory:,.0f}"))
        widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        alike = len(set(self.sizes)) == 1
        sizes = f"{self.sizes[0]} samples each" if alike else f"{', '.join(map(str, self.sizes))} samples"
        if len(self.slices) > 1:
            sizes += f", each in {len(self.slices)} slices of {', '.join(map(str, dict.fromkeys(self.slices)))} positions"
        facts = (
            f"micro-batches: {len(self.sizes)}, of {sizes}",
            f"predicted: {_seconds(timeline.seconds)}, ranks idle {timeline.bubble:.0%}; no order is faster than "
            f"{_seconds(self.bound)} (gap {gap(timeline, self.bound):.1%})",
            f"activations in flight, at most: {', '.join(map(str, peaks))}",
            f"memory of a rank without optimizer states: {', '.join(bytes_text(int(own.peak)) for own in self.memory)}",
            *self.notes,
        )
        return "\n".join((*lines, *facts))


def _ranks(own: PlannedStage) -> str:
    last = own.first_rank + own.ranks - 1
    return f"rank {last}" if own.ranks == 1 else f"ranks {own.first_rank} to {last}"


def _seconds(value: float) -> str:
    return f"{value * 1e3:.3g} ms"
