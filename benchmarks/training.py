"""Training steps against peers: DDP, FSDP2, DTensor and a hand-written Megatron step, interleaved in one run.

    python benchmarks/training.py [--ranks 2 4] [--cases gpt "wide mlp"] [--seconds 45] [--check] [--json FILE] [--write FILE]

Starts gloo ranks on this machine, one thread each. Every variant trains a copy of the same model from the same weights
with fused AdamW; losses must be those of a single device. Variants take turns, a step to warm up and two that count; a
variant's time is the median of the slowest rank over the half of the turns in which others used the machine least. A
target that was missed gets more turns, which count with the others: the machine has off moments, a slow program stays
slow. Collectives are counted over one step, bytes are those that a rank sends; peak memory is measured in processes of
their own (``training_memory.py``).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]

import training_memory  # noqa: E402
from memory_truth import by_hand, watch_this_thread  # noqa: E402
from training_report import missed_targets, ratios, tables, write_between_marks  # noqa: E402
from training_variants import SINGLE, Trained, variants  # noqa: E402

import shardwright as sw  # noqa: E402
from shardwright.calibrate.timing import take_turns  # noqa: E402

STEPS = 5  # whose losses are compared with the single device's
MORE = 3  # how often turns are added for a missed target

Found = dict[str, Any]


# -- one rank --------------------------------------------------------------------------------------------------------------


def worker(options: argparse.Namespace) -> None:
    """One rank: times or memory of all cases in turn."""
    torch.set_num_threads(1)
    if options.part == "memory":
        watch_this_thread()
    world = sw.init()
    if options.part == "memory":
        by_hand()
    found: Found = {}
    for case in options.cases:
        names = [name for name in variants(case) if not options.only or name in options.only]
        if options.part == "memory":
            found[case] = {name: training_memory.measure(name, case, world) for name in names}
        else:
            found[case] = race(names, case, world.size, options.seconds, getattr(torch, options.dtype))
        gc.collect()
    if world.rank == 0:
        Path(options.worker).write_text(json.dumps(found))
    dist.barrier()


def race(names: Sequence[str], case: str, ranks: int, seconds: float, dtype: torch.dtype) -> Found:
    """Losses and collectives of all variants, and their times where there are seconds for it."""
    runners = {}
    for name in names:
        runners[name] = runner = Trained(name, case, ranks, dtype)
        for _ in range(STEPS - 1):
            runner.step()
        runner.counted_step()
    single = Trained(SINGLE, case, ranks, dtype)
    for _ in range(STEPS):
        single.step()
    found: Found = {n: {**r.collectives, "losses": r.whole_losses()} for n, r in runners.items()}
    found[SINGLE] = {"losses": single.whole_losses()}
    if seconds:
        turns(runners, case, seconds, found)
    return found


def quiet_median(times: torch.Tensor, foreign: Sequence[float]) -> float:
    """The median of steps, over the half of the turns in which others used the machine least; ``times`` has two a turn."""
    quiet = sorted(range(len(foreign)), key=foreign.__getitem__)[: (len(foreign) + 1) // 2]
    return statistics.median(times[quiet].flatten().tolist())


def turns(runners: dict[str, Trained], case: str, seconds: float, found: Found) -> None:
    """Times by variant, and by turn; more turns of those that miss a target, and of what they are compared with."""
    rounds, who = 0, list(runners)
    for attempt in range(1 + MORE):
        share, least = (1.0, 4) if not attempt else (0.5, 2)
        taken = take_turns([runners[name] for name in who], share * seconds, least=least)
        for name in who:
            runner, mine = runners[name], found[name]
            mine["turns"] = mine.get("turns", []) + list(range(rounds, rounds + taken))
            slowest = torch.tensor(runner.times, dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            mine["times"] = slowest.view(-1, 2).mean(1).tolist()
            mine["seconds"] = quiet_median(slowest.view(-1, 2), runner.foreign)
        rounds += taken
        if dist.get_rank() == 0:
            print(f"{case}: {taken} turns of {', '.join(who)}", flush=True)
        again = [sorted({name for ratio in ratios(case, found) if ratio.missed for name in ratio.names})]
        dist.broadcast_object_list(again, 0)
        who = again[0]
        if not who:
            return


# -- all of them -----------------------------------------------------------------------------------------------------------


def launch(
    ranks: int, part: str, cases: Sequence[str], only: Sequence[str] = (), seconds: float = 0.0, dtype: str = "float32"
) -> Found:
    """What rank 0 of a job found."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "result.json")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), __file__]
        command += ["--worker", out, "--part", part, "--seconds", str(seconds), "--dtype", dtype, "--cases", *cases]
        command += ["--only", *only] if only else []
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=1200)
        found: Found = json.loads(Path(out).read_text())
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--cases", nargs="+", default=["gpt", "wide mlp"])
    parser.add_argument("--only", nargs="+", default=[], help="variants; default: all")
    parser.add_argument("--parts", nargs="+", default=["times", "memory"], choices=("times", "memory"))
    parser.add_argument("--seconds", type=float, default=45.0, help="of turns, a case and number of ranks")
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    parser.add_argument("--json", type=Path, help="where to keep all numbers")
    parser.add_argument("--write", type=Path, help="a page whose part between the marks <!-- training --> is replaced")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--part", default="times", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return 0
    results: dict[int, Found] = {}
    for ranks in options.ranks:
        found = [launch(ranks, part, options.cases, options.only, options.seconds) for part in options.parts]
        results[ranks] = {case: merged([f[case] for f in found]) for case in options.cases}
    if options.json:
        options.json.write_text(json.dumps(results))
    text = tables(results)
    print(text)
    if options.write:
        write_between_marks(options.write, text)
    missed = missed_targets(results)
    print("\n" + ("\n".join(f"missed: {line}" for line in missed) or "all targets reached"))
    return 1 if options.check and missed else 0


def merged(parts: Sequence[Found]) -> Found:
    """One entry a variant, of what several jobs found of it.

    >>> merged([{"DDP": {"bytes": 1}}, {"DDP": {"peak": 2}}])
    {'DDP': {'bytes': 1, 'peak': 2}}
    """
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: {k: v for part in parts for k, v in part.get(name, {}).items()} for name in names}


if __name__ == "__main__":
    raise SystemExit(main())
