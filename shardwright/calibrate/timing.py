"""Timing: times steps that take turns, on a machine that others use too."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

_LEAST_ROUNDS = 4
_FOREIGN = 0.1  # share of the cores above which others disturb; a clock of a hundred ticks per second resolves no less


class Timed(Protocol):
    """One step that takes turns with others: its times on this rank, and the shares of the cores that others had."""

    times: list[float]
    foreign: list[float]

    def step(self) -> None:
        """Runs one step, the same on every rank."""


def take_turns(
    cases: Sequence[Timed], seconds: float, progress: Callable[[float], None] = lambda done: None, least: int = _LEAST_ROUNDS
) -> int:
    """Runs rounds of all cases, each in a different order, until the time is over. Returns their number.

    Args:
        cases: the steps.
        seconds: seconds in all.
        progress: is called with the fraction that is done.
        least: least number of rounds.
    """
    draw, start, rounds = random.Random(0), time.perf_counter(), 0
    order = list(cases)
    while True:
        draw.shuffle(order)
        for case in order:
            dist.barrier()
            busy, spent = _busy_seconds(), time.process_time()
            case.step()  # an extra step brings evicted data back
            for _ in range(2):
                dist.barrier()
                begin = time.perf_counter()
                case.step()
                case.times.append(time.perf_counter() - begin)
            dist.barrier()
            own = torch.tensor(time.process_time() - spent, dtype=torch.float64)
            dist.all_reduce(own)
            busy = _busy_seconds() - busy
            case.foreign.append(max(0.0, 1 - own.item() / busy) if busy > 0 else 0.0)
        rounds += 1
        taken = time.perf_counter() - start
        over = torch.tensor(float(rounds >= least and taken > seconds))
        dist.broadcast(over, 0)
        progress(1.0 if over else min(1.0, taken / seconds))
        if over:
            return rounds


def _busy_seconds() -> float:
    """Returns the seconds that the cores of this machine have worked for all processes; 0 if unknown."""
    try:
        line = Path("/proc/stat").read_text("ascii").split("\n", 1)[0]
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, soft, *_ = map(int, line.split()[1:])
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def seconds_of(case: Timed) -> float:
    """Returns the seconds per step, of the slowest rank, as :func:`undisturbed` computes them."""
    times = torch.tensor(case.times, dtype=torch.float64)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return undisturbed(times.tolist(), case.foreign)


def undisturbed(times: Sequence[float], foreign: Sequence[float]) -> float:
    """Estimates the seconds per step without disturbance, from all times: the mean of the faster half.

    A disturbance makes a step slower and never faster. Turns in which others used the machine do not count, as long as half
    of the turns are left.

    Args:
        times: seconds of every step, two per turn.
        foreign: share of the cores that others had, for every turn.

    >>> undisturbed([1.0, 1.2, 1.1, 3.0, 0.1, 0.1], [0.0, 0.02, 0.4])
    1.05
    """
    turns = np.asarray(times, dtype=float).reshape(len(foreign), -1)
    quiet = np.argsort(np.asarray(foreign), kind="stable")
    count = max((len(foreign) + 1) // 2, int((np.asarray(foreign) <= _FOREIGN).sum()))
    kept = np.sort(turns[quiet[:count]], axis=None)
    return float(kept[: (len(kept) + 1) // 2].mean())
