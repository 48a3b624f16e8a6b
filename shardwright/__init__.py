"""shardwright trains a PyTorch model written for one device on many, without rewriting it."""

import shardwright.rules.tables as _tables  # noqa: F401  (registers the rules)
from shardwright import data as data
from shardwright import errors as errors
from shardwright import ops as ops
from shardwright.api.auto_parallel import AutoParallel as AutoParallel
from shardwright.api.marking import recompute as recompute
from shardwright.api.marking import reshard as reshard
from shardwright.api.marking import shard as shard
from shardwright.api.marking import value_and_grad as value_and_grad
from shardwright.api.plan_for import plan_for as plan_for
from shardwright.hybrid import collectives as collectives
from shardwright.ir.layout import Layout as Layout
from shardwright.ir.mesh import Mesh as Mesh
from shardwright.parameters.delayed.recorder import no_init_parameters as no_init_parameters
from shardwright.parameters.norm import clip_grad_norm_ as clip_grad_norm_
from shardwright.parameters.norm import get_total_norm as get_total_norm
from shardwright.parameters.whole import full_value as full_value
from shardwright.testing.verify import verify as verify
from shardwright.train.accumulation.module import GradAccumulation as GradAccumulation
from shardwright.train.copies.module import MicroBatchInterleaved as MicroBatchInterleaved
from shardwright.train.fusion.settings import set_comm_fusion as set_comm_fusion
from shardwright.world.current import init as init
from shardwright.world.execute.log import record_communication as record_communication
