"""Times variants of a step that take turns on the ranks of a job, step by step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist


def seconds_in_turn(steps: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Returns this rank's seconds of each variant's steps; each follows each other as often: what ran before warms caches."""
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for place in range(len(names)):
            variant = names[(place + turn) % len(names)] if turn % 2 else names[(turn - place) % len(names)]
            dist.barrier()
            start = time.perf_counter()
            result = steps[variant]()
            times[variant].append(time.perf_counter() - start)
            del result  # its memory goes back outside of the timed part, for each variant alike
    return times
