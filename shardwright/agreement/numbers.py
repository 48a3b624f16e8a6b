"""Gathers a few numbers of every rank on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from shardwright.base.process_groups import backend_of
from shardwright.base.torch_private import job_timeout
from shardwright.errors import WorldError

_ROOM = 127  # numbers that one message holds


class Agreement:
    """Gathers numbers of every rank. All ranks of the job make it and call it in the same order.

    It is one small all-gather on the CPU, so that no rank waits for its device.
    """

    def __init__(self, size: int):
        on_cpu = "gloo" in backend_of(dist.group.WORLD, "cpu")
        self.group: Any = dist.group.WORLD if on_cpu else dist.new_group(backend="gloo", timeout=job_timeout())
        self.size = size

    def __call__(self, numbers: Sequence[int]) -> list[list[int]]:
        """Returns every rank's numbers, by rank; their count may differ between ranks."""
        message = [len(numbers), *numbers] if len(numbers) <= _ROOM else [-1]
        mine = torch.zeros(_ROOM + 1, dtype=torch.int64)
        mine[: len(message)] = torch.tensor(message, dtype=torch.int64)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine, group=self.group)
        messages = [list(map(int, message.tolist())) for message in found]
        if any(message[0] < 0 for message in messages):
            long: list[Any] = [None] * self.size
            dist.all_gather_object(long, list(numbers), group=self.group)
            return long
        return [message[1 : 1 + message[0]] for message in messages]


def check_same_shapes(tensors: Sequence[torch.Tensor], size: int) -> None:
    """Refuses, on all ranks, slices of the batch whose shapes or dtypes differ between ranks.

    All ranks make this call.

    Args:
        tensors: the inputs of this rank.
        size: number of ranks.
    """
    found: list[Any] = [None] * size
    dist.all_gather_object(found, [f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in tensors])
    if any(other != found[0] for other in found):
        listed = "; ".join(f"rank {rank}: {', '.join(given)}" for rank, given in enumerate(found[:8]))
        raise WorldError(
            f"the ranks hand in slices of several shapes or dtypes: {listed}; hand in as many rows on each, or the whole batch "
            "on all with dataset_strategy('full_batch')"
        )
