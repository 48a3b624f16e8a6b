"""Pipelines on the processes of a job: parameters where their stages are, and the programs of this rank's stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from shardwright.ir.graph import Graph
from shardwright.ir.layout import Layout
from shardwright.ir.plan import Plan
from shardwright.parameters.stages import distribute_over_stages
from shardwright.pipeline.crossing import shifted
from shardwright.pipeline.cut import Stage
from shardwright.pipeline.distributed_run import DistributedPipelineRun
from shardwright.pipeline.run import StagePlace
from shardwright.pipeline.schedules.schedule import Schedule
from shardwright.pipeline.stage_run import StageRun
from shardwright.pipeline.tied_gradients import Tied, TiedGradients
from shardwright.pipeline.units import Cut


def place_parameters(
    root: nn.Module, stages: Sequence[tuple[Stage, Plan, int]], device: torch.device
) -> list[dict[str, Layout]]:
    """Distributes the parameters over the ranks of their stages.

    Args:
        root: the module.
        stages: each stage with its plan over its own ranks, and the number of its first rank.
        device: where parameters go.

    Returns:
        For each stage, by value, the layouts in which its parameters are stored, over its own ranks.
    """
    wanted: dict[str, list[Layout]] = {}
    for stage, plan, start in stages:
        for i in stage.graph.inputs:
            if i.kind == "parameter":
                layout = shifted(plan.input_layouts[i.value], start)
                known = wanted.setdefault(str(i.target), [])
                if layout.mesh.ranks not in [other.mesh.ranks for other in known]:
                    known.append(layout)
    stored = distribute_over_stages(root, wanted, device)
    found = []
    for stage, plan, start in stages:
        own: dict[str, Layout] = {}
        for i in stage.graph.inputs:
            if i.kind == "parameter":
                ranks = tuple(rank + start for rank in plan.mesh.ranks)
                layout = next(la for la in stored[str(i.target)] if sorted(la.mesh.ranks) == sorted(ranks))
                own[i.value] = shifted(layout, -start)
        found.append(own)
    return found


def run_in_job(
    link: Any, graph: Graph, places: Sequence[StagePlace], runs: Mapping[int, StageRun], cut: Cut,
    schedule: Schedule, loss: int | None, broadcasts: bool, device: torch.device,
) -> tuple[DistributedPipelineRun, TiedGradients]:  # fmt: skip
    """Puts the stages of this process together. All processes of the job call it.

    Args:
        link: over all ranks of the job.
        graph: the whole graph.
        places: all stages.
        runs: by number, those of this process.
        cut: where micro-batches cut values.
        schedule: the order of actions.
        loss: the position of the loss.
        broadcasts: whether every rank gets all results.
        device: where tensors are.
    """
    rank = link.position
    made = DistributedPipelineRun(graph, places, runs, cut, schedule, loss, rank, link, broadcasts, device)
    return made, TiedGradients(_tied(places), rank, link, lambda: made.reached_now)


def _tied(places: Sequence[StagePlace]) -> list[Tied]:
    """Lists the parameters that several rows hold."""
    found: dict[str, list[Layout]] = {}
    metas: dict[str, Any] = {}
    for place in places:
        trained = {i.value for i in place.stage.graph.inputs if i.kind == "parameter" and i.requires_grad}
        for given in place.parts.once.inputs:
            if given.name in trained:
                known = found.setdefault(given.name, [])
                if given.layout.mesh.ranks not in [layout.mesh.ranks for layout in known]:
                    known.append(given.layout)
                metas[given.name] = place.stage.graph.metas[given.name]
    return [Tied(name, metas[name], tuple(each)) for name, each in found.items() if len(each) > 1]
