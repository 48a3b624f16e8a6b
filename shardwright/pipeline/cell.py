"""The network of a pipeline, with the number of micro-batches and the stages of its modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from shardwright.base.user_code import user_source
from shardwright.errors import ArgumentTypeError, PipelineError, StrategyError
from shardwright.pipeline.schedules.named import check_slices, schedule_names, sliced_names
from shardwright.pipeline.schedules.schedule import Schedule
from shardwright.pipeline.stages import Mark

STAGE = "pipeline_stage"
SEARCHED = "searched"


class PipelineCell(nn.Module):
    """A network whose batch passes in micro-batches through stages.

    Within ``AutoParallel(cell).pipeline(stages=...)`` each stage runs on ranks of its own. Elsewhere it is the network as it
    is. In both the result is that of the whole batch: a mean is the mean over all samples.

    Args:
        module: the network.
        micro_size: number of micro-batches. They are cut along the batch as ``torch.chunk`` cuts, so the last may be smaller.
        stage_config: stage by module path, in place of ``module.pipeline_stage = n`` on the modules. Without either, stages are
            balanced by the cost model.
        batch_dim: the dim of the first tensor input that is the batch. In other inputs it is found.

    Raises:
        TypeError: a network that is no module, a number that is no int, a configuration that is no mapping.
        PipelineError: a number below 1, a stage or dim below 0, a ``PipelineCell`` within.
        StrategyError: a path that the network does not have.

    >>> cell = PipelineCell(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), 2, stage_config={"0": 0, "1": 1})
    >>> cell.micro_size
    2
    """

    wraps_network = True  # checkpoints have the network's own names

    def __init__(self, module: nn.Module, micro_size: int, stage_config: Mapping[str, int] | None = None, batch_dim: int = 0):
        super().__init__()
        if not isinstance(module, nn.Module):
            raise ArgumentTypeError(f"PipelineCell({module!r}): give an nn.Module")
        refuse_nested(module)
        if not isinstance(micro_size, int) or isinstance(micro_size, bool):
            raise ArgumentTypeError(f"PipelineCell(micro_size={micro_size!r}): give the number of micro-batches, an int")
        if micro_size < 1:
            raise PipelineError(f"PipelineCell(micro_size={micro_size}): give the number of micro-batches, 1 or more")
        if not isinstance(batch_dim, int) or isinstance(batch_dim, bool):
            raise ArgumentTypeError(f"PipelineCell(batch_dim={batch_dim!r}): give the number of a dim, an int")
        if batch_dim < 0:
            raise PipelineError(f"PipelineCell(batch_dim={batch_dim}): give the number of a dim, 0 or more")
        self.network, self.micro_size, self.batch_dim = module, micro_size, batch_dim
        self.stage_config = _checked(module, {} if stage_config is None else stage_config)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs)


def refuse_nested(module: nn.Module) -> None:
    """Refuses a network that has a ``PipelineCell`` in it.

    Raises:
        PipelineError: it has one.
    """
    path = next((path for path, inner in module.named_modules() if isinstance(inner, PipelineCell)), None)
    if path is not None:
        raise PipelineError(
            f"PipelineCell: its network has a PipelineCell in it ({path or 'itself'}), and the batch passes in micro-batches "
            "once; put one around the whole network, and none within"
        )


def _checked(module: nn.Module, config: Mapping[str, int]) -> dict[str, Mark]:
    if not isinstance(config, Mapping):
        raise ArgumentTypeError(
            f'PipelineCell(stage_config={config!r}): give a dict with the stage of each module, by its path: {{"layers.0": 0}}'
        )
    paths = [path for path, _ in module.named_modules()]
    unknown = [path for path in config if path not in paths]
    if unknown:
        names = ", ".join(path for path in paths[1:13])
        raise StrategyError(
            f"PipelineCell(stage_config=...): {', '.join(map(repr, unknown))} is no module of {type(module).__name__}; "
            f"its modules are {names}"
        )
    where = user_source()
    return {f"network.{path}".rstrip("."): mark_for(stage, path, f"stage_config at {where}") for path, stage in config.items()}


def mark_for(stage: Any, path: str, source: str) -> Mark:
    """Checks a stage that a user gave.

    Args:
        stage: the stage.
        path: of the module that it was given to.
        source: where it was given, for messages.

    Raises:
        TypeError: it is no int.
        PipelineError: it is negative.
    """
    if not isinstance(stage, int) or isinstance(stage, bool):
        raise ArgumentTypeError(f"{source}: the stage of {path or 'the model'} is {stage!r}; give an int, 0 or more")
    if stage < 0:
        raise PipelineError(f"{source}: the stage of {path or 'the model'} is {stage}; give 0 or more")
    return Mark(stage, source)


def stage_marks(root: nn.Module) -> dict[str, Mark]:
    """Gathers the stages that the user gave, by module path of the root.

    Raises:
        StrategyError: a module has two.
    """
    found: dict[str, Mark] = {}
    for path, module in root.named_modules():
        if STAGE in module.__dict__:
            found[path] = mark_for(module.__dict__[STAGE], path, f"{path or type(module).__name__}.{STAGE}")
    if isinstance(root, PipelineCell):
        for path, mark in root.stage_config.items():
            if path in found and found[path].row != mark.row:
                raise StrategyError(
                    f"{path} is on stage {found[path].row} by its pipeline_stage and on {mark.row} by {mark.source}: "
                    "give one of them"
                )
            found[path] = mark
    return found


def read_pipeline(stages: Any, output_broadcast: Any, interleave: Any, scheduler: Any, slices: Any = 1) -> PipelineRequest:
    """Checks the arguments of :meth:`shardwright.AutoParallel.pipeline`.

    Args:
        stages, output_broadcast, interleave, scheduler, slices: as there.

    Raises:
        TypeError: something of the wrong type.
        PipelineError: a value out of range.
    """
    counts = stages if isinstance(stages, tuple) else (stages,)
    if not counts or any(not isinstance(n, int) or isinstance(n, bool) for n in counts):
        raise ArgumentTypeError(f"pipeline(stages={stages!r}): give an int, or a tuple with the ranks of each stage")
    if min(counts) < 1:
        raise PipelineError(f"pipeline(stages={stages!r}): give 1 or more")
    for name, value in (("output_broadcast", output_broadcast), ("interleave", interleave)):
        if not isinstance(value, bool):
            raise ArgumentTypeError(f"pipeline({name}={value!r}): give True or False")
    names = (*schedule_names(), SEARCHED)
    if not isinstance(scheduler, Schedule) and scheduler not in names:
        raise PipelineError(f"pipeline(scheduler={scheduler!r}): use one of {', '.join(names)}, or a Schedule")
    if not isinstance(slices, int) or isinstance(slices, bool):
        raise ArgumentTypeError(
            f"pipeline(slices={slices!r}): give the number of slices of each micro-batch's sequence, an int"
        )
    if slices < 1:
        raise PipelineError(f"pipeline(slices={slices}): give 1 or more")
    if isinstance(scheduler, Schedule):
        if scheduler.slices != slices:
            raise PipelineError(
                f"pipeline(slices={slices}): the schedule {scheduler.name!r} is of slices={scheduler.slices}; give as many"
            )
    else:
        check_slices(scheduler, scheduler in sliced_names(), slices)
    return PipelineRequest(stages, output_broadcast, interleave, scheduler, slices)


@dataclass(frozen=True)
class PipelineRequest:
    """A request for a pipeline; see :meth:`shardwright.AutoParallel.pipeline`."""

    stages: int | tuple[int, ...] = 1
    output_broadcast: bool = False
    interleave: bool = False
    scheduler: Any = "1f1b"
    slices: int = 1
