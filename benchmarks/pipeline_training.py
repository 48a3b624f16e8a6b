"""Part 2 of the pipeline benchmark: what a step takes, and what memory, on gloo ranks of this machine.

Every variant trains its own copy of the same model: ours, ``torch.distributed.pipelining`` with the same stages and the same
schedule, and a plain stage-after-stage run of the whole batch. They take turns step by step; the time of a step is that of
the slowest rank, and only ratios of medians are judged. Losses and weights are those of a single device.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import pipeline_memory  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from pipeline_models import MICRO, ORDERS, VARIANTS, Trainer, single  # noqa: E402
from turns import seconds_in_turn  # noqa: E402

import shardwright as sw  # noqa: E402
from shardwright.pipeline.schedules.clock import StageTimes, run_clock  # noqa: E402
from shardwright.pipeline.schedules.named import make_schedule  # noqa: E402

CASES, CHECKED = ("gpt", "mlp"), 3


def on_cores(ranks: int, cores: int) -> float:
    """Least time of a pipeline over that of its stages one after the other, where so many ranks work at a time at most.

    >>> on_cores(2, 2), on_cores(4, 4), on_cores(4, 2)
    (0.5625, 0.34375, 0.515625)
    """
    stalls = run_clock(make_schedule("1f1b", ranks, MICRO), StageTimes([1.0] * ranks, [1.0] * ranks, [1.0] * ranks))
    work = 3.0 * ranks * MICRO
    alone = sum(3.0 for stage in range(ranks) if stage < cores - 1)  # the first forwards and last backwards fill no core more
    return max(stalls.seconds, (work + alone) / cores) / work


def checked(case: str, trainers: dict[str, Trainer], reference: Any) -> list[str]:
    """Trains some steps; tells where losses or weights are not those of a single device."""
    losses, weights = reference
    wrong = []
    for variant, trainer in trainers.items():
        for expected in losses:
            got = trainer.step()
            if got is not None and abs(got - expected) > 1e-4 * abs(expected):
                wrong.append(f"{case}, {variant}: loss {got}, of a single device {expected}")
        for name, value in trainer.weights().items():
            if not torch.allclose(value, weights[name], rtol=1e-3, atol=1e-5):
                wrong.append(f"{case}, {variant}: {name} is off by {float((value - weights[name]).abs().max()):.2g}")
    return wrong


def timed(trainers: dict[str, Trainer], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step of each variant, of the slowest rank."""
    names, times = list(trainers), seconds_in_turn({name: trainer.step for name, trainer in trainers.items()}, rounds)
    table = torch.tensor([times[name] for name in names], dtype=torch.float64)
    dist.all_reduce(table, dist.ReduceOp.MAX)
    return dict(zip(names, table.tolist(), strict=True))


def crowding(rounds: int) -> float:
    """How much longer a core takes for the same work while every other core works too."""
    x, rank = torch.randn(512, 512), dist.get_rank()

    def work() -> float:
        start = time.perf_counter()
        for _ in range(20):
            torch.tanh(x @ x.T)
        return time.perf_counter() - start

    alone, together = [], []
    for _ in range(rounds):
        dist.barrier()
        if rank == 0:
            alone.append(work())
        dist.barrier()
        if rank < (os.cpu_count() or 1):
            together.append(work())
    dist.barrier()
    return statistics.median(together) / statistics.median(alone) if rank == 0 else 1.0


def timed_cases(rounds: int, only: str) -> dict[str, Any]:
    """One rank: all cases, all variants in turn."""
    torch.set_num_threads(1)
    world = sw.init()
    found: dict[str, Any] = {"crowding": crowding(10), "cases": {}, "wrong": []}
    for case in CASES:
        reference = single(case, CHECKED)
        for name, order in ORDERS.items():
            if only not in f"{case}, {name}":
                continue
            trainers = {variant: prepare(case, order, world.size) for variant, prepare in VARIANTS.items()}
            wrong = checked(case, trainers, reference)
            everyone: list[Any] = [None] * world.size
            dist.all_gather_object(everyone, wrong)
            found["wrong"] += [f"{name}: {line}" for own in everyone for line in own]
            rows = [[str(action) for action in row] for row in trainers["shardwright"].call.plan.schedule.rows]
            assert rows == [[str(action) for action in row] for row in order.schedule(world.size).rows]
            found["cases"][f"{case}, {name}"] = timed(trainers, rounds)
    return found


def launch(ranks: int, *arguments: str) -> Any:
    """Runs this file as a job of so many ranks; returns what its first rank found."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "result.json")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, __file__, out, *arguments], check=True, env=environment, timeout=900)
        return json.loads(Path(out).read_text())


def steps(targets: Any, sizes: list[int], rounds: int, only: str) -> None:
    """Judges the time of a step."""
    cores = os.cpu_count() or 1
    for ranks in sizes:
        found = launch(ranks, "steps", str(rounds), only)
        bound = on_cores(ranks, cores)
        crowd = found["crowding"]
        print(
            f"\nsteps on {ranks} ranks and {cores} cores; {MICRO} micro-batches take {bound:.3f}x of stage after stage or more;"
        )
        print(f"a core takes {crowd:.2f}x as long while the others work, so that {bound * crowd:.3f}x is to be had here")
        print(f"{'':24}" + "".join(f"{v:>14}" for v in VARIANTS) + f"{'over torch':>14}{'over naive':>14}")
        targets.reached(f"{ranks} ranks: losses and weights that differ", len(found["wrong"]), 0)
        for line in found["wrong"][:20]:
            print(f"    {line}")
        for name, times in found["cases"].items():
            middle = {variant: statistics.median(own) for variant, own in times.items()}
            over = {variant: middle["shardwright"] / middle[variant] for variant in ("torch", "naive")}
            row = "".join(f"{seconds * 1e3:>11.1f} ms" for seconds in middle.values())
            print(f"{name:24}{row}{over['torch']:>14.3f}{over['naive']:>14.3f}")
            targets.reached(f"{name} on {ranks} ranks over torch's", over["torch"], 1.0)
            targets.reached(f"{name} on {ranks} ranks over stage after stage", over["naive"], max(0.6, bound * crowd))


def memory(targets: Any, sizes: list[int], only: str) -> None:
    """Judges the memory of the ranks."""
    for ranks in sizes:
        pipeline_memory.judge(targets, ranks, launch(ranks, "memory", "0", only))


def main(out: str, what: str, rounds: str, only: str) -> None:
    """Runs one rank of a job."""
    found = timed_cases(int(rounds), only) if what == "steps" else pipeline_memory.worker(only)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
