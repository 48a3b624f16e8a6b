"""Agreement: what every rank says in a few numbers, told to all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from shardwright.world.collectives import backend_of

_ROOM = 127  # numbers that one message holds


class Agreement:
    """Gathers numbers of every rank. All ranks of the job make it and call it in the same order.

    One small all-gather on the CPU, so that no rank waits for its device.
    """

    def __init__(self, size: int):
        on_cpu = "gloo" in backend_of(dist.group.WORLD, "cpu")
        self.group: Any = dist.group.WORLD if on_cpu else dist.new_group(backend="gloo")
        self.size = size

    def __call__(self, numbers: Sequence[int]) -> list[list[int]]:
        """Every rank's numbers, by rank; ranks may have different many."""
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
