"""Collectives: measures every algorithm of every collective, and then operators, in real gloo processes.

:func:`measure` starts this module once per rank. All algorithms of a case (an operation, a number of ranks, a size) take
turns, so that other load on the machine disturbs all alike, and medians count. The ranks share every measured time,
the slowest rank's, so that all continue with the same case and end at the same time without a message. At last all time
operators simultaneously, by :mod:`shardwright.calibrate.operators`.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from shardwright.calibrate.operators import Sample, time_operators
from shardwright.cost.algorithms import ALGORITHMS, Calibration, Table
from shardwright.errors import WorldError
from shardwright.launch.local import _PATIENCE, run_ranks
from shardwright.redistribute.links import Links
from shardwright.world.distributed.links import Link
from shardwright.world.distributed.operations import Operation

SIZES = (1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 22, 1 << 24)  # bytes
_TURN = 2e-3  # least seconds per turn of an algorithm, unless it reaches _MOST_CALLS calls
_MOST_CALLS = 16
_LEAST_ROUNDS = 3
_HOPELESS = 3.0  # algorithms whose best time is so many times that of the fastest get no further turn
_DO_NOT_SCALE = ("hub", "copies")  # an algorithm that is hopeless once is so at all larger sizes
_OPERATORS = 0.5  # seconds for operators per second for collectives
SECONDS = "SHARDWRIGHT_CALIBRATE_SECONDS"


class Measured(NamedTuple):
    """Medians of one case.

    Args:
        operation: its name.
        ranks: number of ranks.
        nbytes: bytes as :class:`~shardwright.cost.algorithms.Calibration` counts them.
        seconds: seconds per call, by algorithm.
    """

    operation: str
    ranks: int
    nbytes: int
    seconds: dict[str, float]


class Measurements(NamedTuple):
    """Measured times of a machine's collectives and operators."""

    collectives: Calibration
    operators: list[Sample]


def group_sizes(ranks: int) -> list[int]:
    """Lists the numbers of ranks that are measured in a job of ``ranks``.

    >>> group_sizes(12)
    [2, 3, 4, 8, 12]
    """
    powers = [1 << k for k in range(1, 11) if 1 << k <= ranks]
    return sorted({*powers, ranks, *([3] if ranks >= 3 else [])})


def measure(ranks: int = 4, seconds: float = 20.0, progress: Callable[[float], None] | None = None) -> Measurements:
    """Measures this machine with new processes.

    Args:
        ranks: number of processes, at least two.
        seconds: seconds to measure collectives; operators get half as long in addition, and starting processes takes a few
            seconds.
        progress: is called with the fraction that is done, now and then.

    Raises:
        WorldError: fewer than two ranks, or a process failed; with its output.
    """
    if ranks < 2:
        raise WorldError(f"ranks={ranks}: a rank alone has nobody to communicate with; calibrate with 2 or more")
    result = run_ranks(ranks, __name__, {SECONDS: str(seconds)}, progress or (lambda done: None))
    found = [Measured(*case) for case in result["collectives"]]
    collectives = Calibration(tables_of(found), links_of(found), os.cpu_count() or 1, f"measured with {ranks} ranks")
    return Measurements(collectives, [Sample(*each) for each in result["operators"]])


# -- what follows from the times ----------------------------------------------------------------------------------------


def tables_of(found: list[Measured]) -> dict[str, dict[int, Table]]:
    """Sorts the algorithms by speed, for every operation and number of ranks. An order holds to halfway to the next size.

    The slowdown relative to the fastest algorithm changes slowly with the size, and times are noisy: the sizes next
    to one count too, each with half the weight.

    >>> times = [Measured("exchange", 2, 1024, {"direct": 1.0, "backend": 2.0})]
    >>> times += [Measured("exchange", 2, 4096, {"direct": 3.0, "backend": 1.0})]
    >>> tables_of(times)
    {'exchange': {2: ((2048, ('direct', 'backend')), (inf, ('backend', 'direct')))}}
    """
    cases: dict[tuple[str, int], list[Measured]] = {}
    for each in sorted(found, key=lambda m: m.nbytes):
        cases.setdefault((each.operation, each.ranks), []).append(each)
    tables: dict[str, dict[int, Table]] = {}
    for (operation, ranks), sizes in cases.items():
        slower = [_slower(each) for each in sizes]
        rows: list[tuple[float, tuple[str, ...]]] = []
        for i, (each, following) in enumerate(zip(sizes, [*sizes[1:], None])):
            near = slower[max(i - 1, 0) : i] + slower[i + 1 : i + 2]
            smooth = {
                name: 2 * own + sum(other.get(name, math.log(_HOPELESS)) for other in near) for name, own in slower[i].items()
            }
            limit = math.isqrt(each.nbytes * following.nbytes) if following else math.inf
            names = tuple(sorted(smooth, key=smooth.__getitem__))
            if rows and rows[-1][1] == names:
                rows.pop()
            rows.append((limit, names))
        tables.setdefault(operation, {})[ranks] = tuple(rows)
    return tables


def _slower(case: Measured) -> dict[str, float]:
    """Returns the logarithm of how many times slower than the fastest each algorithm is."""
    best = min(case.seconds.values())
    return {name: math.log(seconds / best) for name, seconds in case.seconds.items()}


def links_of(found: list[Measured]) -> Links:
    """Fits the cost of an operation, of a message and of a byte.

    The smallest all-reduces, through a hub that has 2(n-1) messages among n ranks, tell the operation from its messages
    (a straight line, where more than two ranks were measured); the largest exchange among all tells the bytes.
    """
    least: dict[int, float] = {}
    for case in found:
        if case.operation == "all_reduce":
            least[case.ranks] = min(least.get(case.ranks, math.inf), *case.seconds.values())
    messages, times = [2.0 * (n - 1) for n in least], list(least.values())
    slope, start = statistics.linear_regression(messages, times) if len(least) > 1 else (times[0] / messages[0], 0.0)
    latency = max(slope, times[0] / messages[0] / 10)  # noise may make more ranks look cheaper
    largest = max((case for case in found if case.operation == "exchange"), key=lambda case: (case.ranks, case.nbytes))
    taken = min(largest.seconds.values())
    spent = (largest.ranks - 1) * latency
    return Links(max(start, 0.0), latency, largest.nbytes / max(taken - spent, taken / 2))


# -- the processes -----------------------------------------------------------------------------------------------------


def _work() -> None:
    """Runs in each process. The first rank prints the results, as lines of JSON."""
    seconds = float(os.environ[SECONDS])
    share = 1 / (1 + _OPERATORS)  # share of the whole time
    dist.init_process_group("gloo", timeout=timedelta(seconds=_PATIENCE + 2 * seconds))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    groups = {n: dist.group.WORLD if n == ranks else dist.new_group(range(n)) for n in group_sizes(ranks)}
    found: list[Measured] = []
    for at, (n, group) in enumerate(groups.items()):
        if rank < n:
            link = Link(range(n), group, engine="gloo")
            for measured, done in _measure_group(link, seconds / len(groups)):
                found.append(measured)
                say(share * (at + done) / len(groups))
            link.close()
    samples = time_operators(_OPERATORS * seconds, dist.barrier, largest, lambda done: say(share + (1 - share) * done))
    say({"collectives": found, "operators": samples})
    dist.barrier()
    dist.destroy_process_group()


def say(what: Any) -> None:
    """Prints a result of the first rank for the process that started the ranks."""
    if dist.get_rank() == 0:
        print(json.dumps(what), flush=True)


def largest(own: float) -> float:
    """Returns the largest of the ranks' numbers."""
    numbers = torch.tensor(own, dtype=torch.float64)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return float(numbers)


def _measure_group(link: Link, seconds: float) -> Iterator[tuple[Measured, float]]:
    """Yields every case of a group, each with the fraction that is done."""
    cases = [(operation, nbytes) for operation in ALGORITHMS for nbytes in SIZES]
    total = weights = sum(_weight(nbytes) for _, nbytes in cases)
    hopeless: dict[str, set[str]] = {operation: set() for operation in ALGORITHMS}
    for operation, nbytes in cases:
        turns = _turns(link, operation, nbytes, hopeless[operation])
        times, taken = _take_turns(link, turns, seconds * _weight(nbytes) / weights)
        seconds, weights = seconds - taken, weights - _weight(nbytes)
        if nbytes > SIZES[1]:
            best = min(times.values())
            hopeless[operation] |= {name for name in _DO_NOT_SCALE if times.get(name, 0.0) > _HOPELESS * best}
        yield Measured(operation, link.size, nbytes, times), 1 - weights / total


def _weight(nbytes: int) -> float:
    """Returns the weight of a case in the time: a large one takes longer, but is less noisy."""
    return 1 + 2 * math.sqrt(nbytes / (1 << 20))


def _turns(link: Link, operation: str, nbytes: int, without: set[str]) -> dict[str, Callable[[], Tensor]]:
    """Returns every algorithm of an operation as a call without arguments, on any integers."""
    turns: dict[str, Callable[[], Tensor]] = {}
    for name in ALGORITHMS[operation]:
        run, count = _prepare(link, operation, nbytes // 4, name)
        if name not in without and run.is_possible(torch.int32):
            turns[name] = partial(run, torch.zeros(count, dtype=torch.int32))
    return turns


def _prepare(link: Link, operation: str, count: int, algorithm: str) -> tuple[Operation, int]:
    """Returns the operation over ``count`` elements. Also returns the number of elements that a rank passes to it."""
    n = link.size
    piece = max(1, count // n)
    if operation == "all_reduce":
        return link.prepare_all_reduce(count, inplace=True, algorithm=algorithm), count
    if operation == "reduce_scatter":
        return link.prepare_reduce_scatter([piece] * n, algorithm=algorithm), n * piece
    if operation == "all_gather":
        return link.prepare_all_gather([piece] * n, algorithm=algorithm), piece
    piece = max(1, count // (n - 1))
    counts = {(a, b): piece for a in range(n) for b in range(n) if a != b}
    return link.prepare_exchange(counts, algorithm=algorithm), (n - 1) * piece


def _take_turns(link: Link, turns: dict[str, Callable[[], Tensor]], seconds: float) -> tuple[dict[str, float], float]:
    """Measures the median seconds per call of each, and the seconds that all took; the same on every rank."""
    meet = partial(link.prepare_all_reduce(1, algorithm="hub"), torch.zeros(1))
    share = link.prepare_all_reduce(len(turns) + 1, "max", algorithm="hub")
    names = list(turns)
    calls = dict.fromkeys(names, 1)
    times: dict[str, list[float]] = {name: [] for name in names}
    live, rounds = names, 0
    meet()  # some ranks may have waited long for the others
    begin = time.perf_counter()
    for turn in turns.values():
        turn()  # the first call allocates buffers, and connects
    while True:
        taken = dict.fromkeys(names, 0.0)
        start = rounds % len(live)
        for name in live[start:] + live[:start]:
            meet()
            taken[name] = _time(turns[name], calls[name])
        elapsed = time.perf_counter() - begin
        *slowest, elapsed = share(torch.tensor([*taken.values(), elapsed], dtype=torch.float64)).tolist()
        for name, each in zip(names, slowest):
            if name in live:
                times[name].append(each)
        medians = {name: statistics.median(each) for name, each in times.items()}
        rounds += 1
        if rounds == 1:
            calls = {name: max(1, min(_MOST_CALLS, int(_TURN / medians[name]))) for name in names}
        if elapsed >= seconds and (rounds >= _LEAST_ROUNDS or elapsed >= 2 * seconds):
            return medians, elapsed
        if rounds >= _LEAST_ROUNDS:
            live = [name for name in live if min(times[name]) <= _HOPELESS * min(medians.values())]


def _time(turn: Callable[[], Tensor], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        turn()
    return (time.perf_counter() - begin) / calls


if __name__ == "__main__":
    _work()
