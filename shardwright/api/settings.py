"""Settings of an ``AutoParallel``, apart from marks on operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from shardwright.errors import PipelineError
from shardwright.ir.buckets import MoveBuckets
from shardwright.ir.graph import Graph
from shardwright.ir.plan import Plan
from shardwright.pipeline.cell import PipelineRequest
from shardwright.plan.request import PlanRequest
from shardwright.train.compile.compiler import SegmentCompiler
from shardwright.train.optimizer_parallel.stored import OptimizerParallel
from shardwright.train.precision.wires import Precision
from shardwright.train.recompute.request import RecomputeRequest

SEARCHES = ("auto", "dynamic_programming", "recursive_programming")
MODES = ("semi_auto", "sharding_propagation", *SEARCHES, "data_parallel", "hybrid_parallel", "stand_alone")


@dataclass
class Settings:
    """Settings of an ``AutoParallel``, apart from marks on operators."""

    mode: str = "semi_auto"
    dataset_strategy: Any = "full_batch"
    strategies: dict[str, Any] | None = None
    source: str = ""
    enable_alltoall: bool = True
    of_step: bool = False  # one part of a train step: a pattern may be another part's
    search: SearchSettings = field(default_factory=lambda: SearchSettings())
    file: Any = None  # a plan file whose layouts are pinned
    recompute: tuple[RecomputeRequest, ...] = ()
    planner: Callable[[Graph, PlanRequest], Plan] | None = None  # makes the plan instead of the mode's
    hsdp: OptimizerParallel | None = None
    schedule: MoveBuckets = field(default_factory=MoveBuckets)
    collective_mesh: Any = None  # of hybrid_parallel: the mesh of the user's collectives
    gradients_mean: bool = True  # of hybrid_parallel: whether losses are averaged over the data axes
    compiler: SegmentCompiler | None = None  # compiles what runs between moves
    precision: Precision = field(default_factory=Precision)
    pipeline: PipelineRequest | None = None
    output: str | None = None  # "whole" or "sharded"


def refuse_with_pipeline(settings: Settings) -> None:
    """Refuses settings that a pipeline does not follow.

    Raises:
        PipelineError: there is one.
    """
    if settings.mode == "hybrid_parallel":
        raise PipelineError(
            'pipeline(...) of a net in mode "hybrid_parallel", whose target is the program of one rank; use another mode, or '
            "send between ranks yourself with sw.collectives"
        )
    if settings.dataset_strategy != "full_batch":
        raise PipelineError(
            f"pipeline(...) with dataset_strategy {settings.dataset_strategy!r}: every rank gives the whole batch, of which "
            'micro-batches are cut; use dataset_strategy("full_batch")'
        )


@dataclass(frozen=True)
class SearchSettings:
    """Settings of a search: machine, limits and time; see :meth:`shardwright.AutoParallel.search`."""

    machine: Any = None
    memory: float | None = None
    mesh: tuple[int, ...] | None = None
    axes: tuple[str, ...] = ()
    optimizer_bytes_per_byte: float = 2.0
    seconds: float = 30.0
