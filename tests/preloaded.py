"""What the server that ranks of test jobs are forked from has imported and done once, as the first capture is slow.

It runs no backward: autograd does not pass a fork.
"""

import torch
import torch._dynamo  # one of the imports that a first call does
import torch.distributed.tensor

import shardwright as sw
import shardwright.testing.rules
from shardwright.world import current

torch.set_num_threads(1)
sw.init(devices=2)
sw.AutoParallel(torch.nn.Linear(2, 2))(torch.ones(2, 2))
current._current.clear()
