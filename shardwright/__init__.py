"""shardwright trains a PyTorch model written for one device on many, without rewriting it."""

import shardwright.rules.tables as _tables  # noqa: F401  (registers the rules)
from shardwright import data, errors, ops
from shardwright.api.auto_parallel import AutoParallel
from shardwright.api.marking import recompute, reshard, shard, value_and_grad
from shardwright.api.plan_for import plan_for
from shardwright.checkpoint.folder import latest
from shardwright.checkpoint.load import load
from shardwright.checkpoint.preemption import preempted
from shardwright.checkpoint.save import save
from shardwright.hybrid import collectives
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.parameters.delayed.recorder import no_init_parameters
from shardwright.parameters.norm import clip_grad_norm_, get_total_norm
from shardwright.parameters.whole import full_value
from shardwright.pipeline.cell import PipelineCell
from shardwright.testing.verify import verify
from shardwright.train.accumulation.module import GradAccumulation
from shardwright.train.copies.module import MicroBatchInterleaved
from shardwright.train.fusion.settings import set_comm_fusion
from shardwright.world.current import init
from shardwright.world.execute.log import record_communication

__all__ = [
    "AutoParallel",
    "clip_grad_norm_",
    "collectives",
    "data",
    "errors",
    "full_value",
    "get_total_norm",
    "GradAccumulation",
    "PipelineCell",
    "init",
    "latest",
    "Layout",
    "load",
    "Mesh",
    "MicroBatchInterleaved",
    "no_init_parameters",
    "ops",
    "plan_for",
    "preempted",
    "recompute",
    "record_communication",
    "reshard",
    "save",
    "set_comm_fusion",
    "shard",
    "value_and_grad",
    "verify",
]


def __dir__() -> list[str]:
    return [*__all__]
