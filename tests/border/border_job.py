"""The cases of the border on the ranks of a job: ``border_job.py FIRST STOP``."""

import sys

import border
import torch.distributed as dist

import shardwright as sw

world = sw.init()
for number in range(int(sys.argv[1]), int(sys.argv[2])):
    case = border.case(number)
    found = border.outcome(case)
    dist.barrier()
    if found.partition(":")[0] not in case.must_be:
        raise SystemExit(f"rank {world.rank}: {case}\n{found}")
    if world.rank == 0:
        print(number, "as it must", flush=True)
