"""shardwright trains a PyTorch model written for one device on many, without rewriting it."""

import shardwright.rules.tables as _tables  # noqa: F401  (registers the rules)
from shardwright import data as data
from shardwright import errors as errors
from shardwright import ops as ops
from shardwright.api import AutoParallel as AutoParallel
from shardwright.api import recompute as recompute
from shardwright.api import reshard as reshard
from shardwright.api import shard as shard
from shardwright.api import value_and_grad as value_and_grad
from shardwright.layout import Layout as Layout
from shardwright.mesh import Mesh as Mesh
from shardwright.planning import plan_for as plan_for
from shardwright.train import collectives as collectives
from shardwright.train.communication_fusion import set_comm_fusion as set_comm_fusion
from shardwright.train.gradient_accumulation import GradAccumulation as GradAccumulation
from shardwright.train.gradient_norm import clip_grad_norm_ as clip_grad_norm_
from shardwright.train.gradient_norm import get_total_norm as get_total_norm
from shardwright.train.multi_copy import MicroBatchInterleaved as MicroBatchInterleaved
from shardwright.verify import verify as verify
from shardwright.world.current import init as init
from shardwright.world.delayed_init import no_init_parameters as no_init_parameters
from shardwright.world.parameters import full_value as full_value
from shardwright.world.record import record_communication as record_communication
