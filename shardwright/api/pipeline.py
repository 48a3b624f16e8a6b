"""Pipelines: a callable captured, cut into stages, each planned and bound on ranks of its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.api.bound import BoundCall, device_of
from shardwright.api.pipeline_job import run_in_job
from shardwright.api.pipeline_planning import plan_pipeline
from shardwright.api.settings import Settings
from shardwright.api.stages import before_compiling, make_target
from shardwright.base.dump import dump_of
from shardwright.cost.machine_files import load_machine
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.ir.program import LocalProgram
from shardwright.pipeline.run import PipelineRun, SimulatedPipelineRun, StagePlace
from shardwright.pipeline.schedules.actions import WEIGHT
from shardwright.pipeline.stage_run import StageRun
from shardwright.pipeline.tied_gradients import TiedGradients
from shardwright.world.current import World


class PipelineBoundCall(BoundCall):
    """A callable whose stages run on ranks of their own, a micro-batch after the other."""

    def __init__(self, root: nn.Module, args: Any, kwargs: Any, world: World, settings: Settings):
        for notice in before_compiling:
            notice(root, args, kwargs, settings)
        request = settings.pipeline
        assert request is not None
        self.root, self.world = root, world
        self.micro, self.compiler = None, None
        device = device_of(root, world)
        self.device_type = device.type
        if settings.compiler is not None:
            settings.compiler.check(device)
        named = settings.search.machine or ("cpu-gloo" if device.type != "cuda" else "h100")
        machine = world.on_first_rank(lambda: load_machine(named))
        target = make_target(
            root, args, kwargs, settings, world.size, device, machine, world.adds_wide(device),
            dump=dump_of(type(root).__name__, world.rank if world.processes > 1 else None), on_first_rank=world.on_first_rank,
        )  # fmt: skip
        layouts = {name: Layout.replicated(Mesh(("rank",), (world.size,)), p.ndim) for name, p in root.named_parameters()}
        self.pipeline = pipeline = plan_pipeline(target, world.keeps_pieces)
        self.graph, self.view = pipeline.graph, pipeline.view  # type: ignore[assignment]
        planned, cut, schedule, loss = pipeline.planned, pipeline.cut, pipeline.schedule, pipeline.loss
        puts_off = any(action.kind == WEIGHT for row in schedule.rows for action in row)
        places = [StagePlace(p.stage, p.parts, p.first_rank, p.is_tail) for p in planned]
        link = world.direct_link()
        runs: dict[int, StageRun] = {}
        for number, place in enumerate(places):
            bind, compiled = partial(_bound_on, world, place.ranks), None
            if settings.compiler is not None:
                graph = planned[number].plan.graph
                compiled = partial(settings.compiler.compiled, graph=graph, runs_rank_groups=world.runs_rank_groups)
            # on all processes, as all make process groups
            run = StageRun(place.stage, place.parts, bind, link is None, puts_off, compiled)
            if run.is_here:
                runs[number] = run
        self.tied: TiedGradients | None = None
        self.pipeline_run: PipelineRun
        if link is not None:
            self.pipeline_run, self.tied = run_in_job(
                link, self.graph, places, runs, cut, schedule, loss, request.output_broadcast, device
            )
        else:
            world.place_parameters(root, layouts, device)
            self.pipeline_run = SimulatedPipelineRun(self.graph, places, runs, cut, schedule, loss)
        self.run = self._step
        self._split = []
        self._find_inputs()
        self.is_random = any(n.op.draws for n in self.graph.nodes)
        self._count_inputs()
        names = {i.value: n for n, i in enumerate(self.graph.inputs)}
        self._places = names
        read = {i.name for number in runs for i in planned[number].parts.once.inputs}
        self._elsewhere = [n for n, i in enumerate(self.graph.inputs) if i.kind == "parameter" and i.value not in read]
        self._own = {n: [names[i.name] for i in planned[n].parts.once.inputs] for n in self.pipeline_run.runs}

    @property
    def program(self) -> LocalProgram:  # type: ignore[override]
        """The program of the first stage's first micro-batch."""
        return self.pipeline.planned[0].parts.each[0]

    def _step(self, *values: Any) -> tuple[list[Any], list[Tensor]]:
        given = list(values)
        anchor = None if self.tied is None else self.tied(given, self._places)
        moved = {self.graph.inputs[n].value: given[n] for n in self.moved_inputs if self.graph.inputs[n].kind == "buffer"}
        elsewhere = {self.graph.inputs[n].value: given[n] for n in self._elsewhere}
        if elsewhere and torch.is_grad_enabled():
            elsewhere = {name: value for name, value in elsewhere.items() if value.requires_grad}
        own = {n: [given[at] for at in places] for n, places in self._own.items()}
        outputs, updates = self.pipeline_run(own, moved, elsewhere, anchor)
        return outputs, [updates[name] for name, _ in self.graph.updates]


def _bound_on(world: World, ranks: Sequence[int], program: LocalProgram, keep: Any = None) -> Any:
    return world.bind_on_ranks(program, ranks, keep)
