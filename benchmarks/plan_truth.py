"""The truth about plans: predicted step times against measured ones, and the plan found against well-known ones.

    python benchmarks/plan_truth.py [--check] [--pairs 120] [--seconds 400] [--machine FILE] [--only pairs best] [--json FILE]

Starts four gloo ranks on this machine, one thread each. *Pairs*: every model of this benchmark under data
parallelism, parameters stored split (ZeRO), Megatron's plans, the best plan on each mesh, and plans that a search finds when
its prices are blurred at random, a little or beyond recognition. Unless ``--machine`` names one, the machine is calibrated
as ``shardwright calibrate`` does it: operators are timed first, and its three models take their turns too, to whose times
the machine is fitted. *Best*: on every batch
size, ``auto`` against the well-known plans. A step is forward, backward and AdamW; plans of a model take turns, two steps
each after one to warm up, and medians of the slowest rank count, over the turns in which others used the machine least.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from scipy.stats import spearmanr  # type: ignore[import-untyped]

sys.path.insert(0, str(Path(__file__).parent))

from truth_models import SUBJECTS, Subject

import shardwright as sw
from shardwright.calibrate.models import MODELS
from shardwright.calibrate.operators import fit_machine, time_operators
from shardwright.calibrate.plans import makers, planned_by, split_storage
from shardwright.calibrate.steps import Case, calibration_cases, fit, measured
from shardwright.calibrate.timing import seconds_of, take_turns
from shardwright.cost.machine_files import load_machine
from shardwright.ir.machine import Machine

RANKS = 4
OPERATORS = 15.0  # seconds of timing them
CYCLES = 4  # of all models; the machine is not as fast at all times
CORRELATION, ERROR, CLOSE, BEST, SHARE = 0.95, 0.15, 0.15, 1.05, 0.95

Maker = Callable[[torch.nn.Module], sw.AutoParallel]


def known_plans(subject: Subject) -> dict[str, Maker]:
    """The plans that an expert would try, by name."""

    def tensor(sizes: tuple[int, ...], axes: tuple[str, ...]) -> Maker:
        def make(model: torch.nn.Module) -> sw.AutoParallel:
            layout = sw.Layout(sizes, axes)
            batch = "dp" if "dp" in axes else "None"
            return sw.AutoParallel(model).shard(subject.tensor_parallel(layout, batch))

        return make

    found: dict[str, Maker] = {
        "data": lambda model: sw.AutoParallel(model, "data_parallel"),
        "zero": lambda model: planned_by(model, split_storage),
        "tensor": tensor((RANKS,), ("tp",)),
        "2-d": tensor((RANKS // 2, 2), ("dp", "tp")),
    }
    if subject.sequence_parallel is not None:
        sequence = subject.sequence_parallel
        found["sequence"] = lambda model: sw.AutoParallel(model).shard(sequence(sw.Layout((RANKS,), ("tp",))))
    return found


def cases_of(subjects: Sequence[str], batches: Callable[[Subject], Sequence[int]], plans: Any) -> list[Case]:
    """Each model on each of its batches under each of its plans."""
    cases = []
    for name in subjects:
        subject = SUBJECTS[name]
        for batch in batches(subject):
            torch.manual_seed(batch)
            inputs, model = subject.inputs(batch), subject.make()
            cases += [Case(name, plan, batch, make(copy.deepcopy(model)), inputs) for plan, make in plans(subject).items()]
    return cases


def pair_cases(names: Sequence[str], pairs: int) -> list[Case]:
    """About so many pairs of a model and a plan."""

    def plans(subject: Subject) -> dict[str, Maker]:
        known = known_plans(subject)
        return {**makers(RANKS, max(0, pairs // len(names) - len(known) - 2)), **known}

    return cases_of(names, lambda subject: subject.batches[len(subject.batches) // 2 :][:1], plans)


def best_cases(names: Sequence[str]) -> list[Case]:
    def plans(subject: Subject) -> dict[str, Maker]:
        return {"auto": lambda model: sw.AutoParallel(model, "auto"), **known_plans(subject)}

    return cases_of(names, lambda subject: subject.batches, plans)


def alike(cases: Sequence[Case]) -> dict[int, tuple[Case, Case]]:
    """Cases that are the same program as an earlier one of their model, by their ids, with that one."""
    first: dict[Any, Case] = {}
    found = {}
    for case in cases:
        if case.model in SUBJECTS:
            price = case.net.plan.price
            key = (case.model, case.batch, round(price.seconds, 12), round(price.bytes, 3))
            if first.setdefault(key, case) is not case:
                found[id(case)] = (case, first[key])
    return found


def turns_by_model(cases: Sequence[Case], seconds: float) -> int:
    """Rounds of each model's plans in turn, several times over: what is used again soon stays in memory.

    Returns:
        How many rounds the model with the fewest had.
    """
    models = list(dict.fromkeys(case.model for case in cases))
    rounds = dict.fromkeys(models, 0)
    for _ in range(CYCLES):
        for model in models:
            mine = [case for case in cases if case.model == model]
            rounds[model] += take_turns(mine, seconds / CYCLES / len(models), least=2)
    return min(rounds.values())


def timed_operators() -> Machine:
    """This machine with the operators' times that all ranks find at once."""

    def slowest(own: float) -> float:
        seconds = torch.tensor(own, dtype=torch.float64)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return float(seconds)

    return fit_machine(load_machine("cpu-gloo"), time_operators(OPERATORS, dist.barrier, slowest))


def worker(options: argparse.Namespace) -> None:
    """One rank."""
    torch.set_num_threads(1)
    world = sw.init()
    began = time.perf_counter()
    result: dict[str, Any] = {}
    names = options.models or list(SUBJECTS)
    others: list[Case] = []
    machine = load_machine("cpu-gloo")
    if "pairs" in options.only and not options.calibrated:
        others, machine = calibration_cases(RANKS), timed_operators()
    todo = {"pairs": lambda: pair_cases(names, options.pairs) + others, "best": lambda: best_cases(names)}
    for kind in options.only:
        cases = todo[kind]()
        for case in cases:
            case.prepare()
            case.step()
        if world.rank == 0:
            print(f"{kind}: {len(cases)} plans ready after {time.perf_counter() - began:.0f} s", flush=True)
        same = alike(cases)
        cases = [case for case in cases if id(case) not in same]
        rounds = turns_by_model(cases, options.seconds)
        mine = [case for case in cases if case.model in SUBJECTS]
        steps = measured([case for case in cases if case.model in MODELS], machine)
        if steps:
            machine = fit(machine, steps)
            result["machine"] = machine.to_toml()
        times = [seconds_of(case) for case in mine]
        result[kind] = [
            {"model": case.model, "plan": case.plan, "batch": case.batch, "seconds": seconds,
             "predicted": case.net.plan.priced_on(machine).seconds}
            for case, seconds in zip(mine, times)
        ]  # fmt: skip
        if kind == "best":  # plans that are one program take one time
            result[kind] += [
                {**row, "plan": other.plan}
                for other, first in same.values()
                for row, case in zip(list(result[kind]), mine)
                if case is first
            ]
        if world.rank == 0:
            print(f"{kind}: {rounds} rounds after {time.perf_counter() - began:.0f} s", flush=True)
        del cases
        gc.collect()
    if world.rank == 0:
        Path(options.worker).write_text(json.dumps(result))


# -- what it says ---------------------------------------------------------------------------------------------------------


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's."""
    return float(spearmanr(a, b).statistic)


def pairs_table(rows: list[dict[str, Any]]) -> tuple[str, list[str]]:
    lines = ["| model | pairs | rank correlation | median error | bias | within 15 % |"]
    lines.append("|---|---|---|---|---|---|")
    missed, every = [], 0.0
    models = list(dict.fromkeys(row["model"] for row in rows))
    for model in [*models, "all"]:
        mine = [row for row in rows if model in (row["model"], "all")]
        ratios = np.array([row["predicted"] / row["seconds"] for row in mine])
        errors = np.abs(ratios - 1)
        correlation = rank_correlation([r["predicted"] for r in mine], [r["seconds"] for r in mine])
        close = float((errors <= CLOSE).mean())
        shown = "" if model == "all" else f"{correlation:.3f}"
        lines.append(
            f"| {model} | {len(mine)} | {shown} | {np.median(errors):.1%} | {np.median(ratios) - 1:+.1%} | {close:.0%} |"
        )
        if model != "all" and correlation < CORRELATION:
            missed.append(f"{model}: rank correlation {correlation:.3f}, not {CORRELATION}")
        every = float(np.median(errors))
    if every > ERROR:
        missed.append(f"median error {every:.1%}, not {ERROR:.0%}")
    return "\n".join(lines), missed


def best_table(rows: list[dict[str, Any]]) -> tuple[str, list[str]]:
    plans = list(dict.fromkeys(row["plan"] for row in rows))
    lines = [f"| model | batch | {' | '.join(plans)} | auto / best |", "|---" * (len(plans) + 3) + "|"]
    good, cases = 0, list(dict.fromkeys((row["model"], row["batch"]) for row in rows))
    for model, batch in cases:
        times = {r["plan"]: r["seconds"] for r in rows if (r["model"], r["batch"]) == (model, batch)}
        guesses = {r["plan"]: r["predicted"] for r in rows if (r["model"], r["batch"]) == (model, batch)}
        ratio = times["auto"] / min(seconds for plan, seconds in times.items() if plan != "auto")
        good += ratio <= BEST
        cells = [f"{times[p] * 1e3:.1f} ({guesses[p] * 1e3:.1f})" if p in times else "" for p in plans]
        lines.append(f"| {model} | {batch} | {' | '.join(cells)} | {ratio:.2f} |")
    share = good / len(cases)
    missed = [f"auto within 5 % of the best in {good} of {len(cases)} cases"] if share < SHARE else []
    return "\n".join(lines) + f"\n\nauto within 5 % of the best in {good} of {len(cases)} cases", missed


def launch(options: argparse.Namespace, kind: str, machine: Path | None) -> dict[str, Any]:
    """Runs the ranks with what they are to price on."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "result.json")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), __file__]
        command += ["--worker", out, "--pairs", str(options.pairs), "--seconds", str(options.seconds), "--only", kind]
        command += ["--models", *options.models] if options.models else []
        command += ["--calibrated"] if machine else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"SHARDWRIGHT_MACHINE": str(machine)} if machine else {})}
        subprocess.run(command, check=True, env=environment)
        found: dict[str, Any] = json.loads(Path(out).read_text())
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    parser.add_argument("--pairs", type=int, default=120)
    parser.add_argument("--seconds", type=float, default=400.0, help="of rounds, of each kind")
    parser.add_argument("--machine", type=Path, help="a machine file; default: this machine, calibrated first")
    parser.add_argument("--models", nargs="*")
    parser.add_argument("--only", nargs="+", choices=("pairs", "best"), default=["pairs", "best"])
    parser.add_argument("--json", type=Path, help="where to keep all numbers")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--calibrated", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return 0
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        machine = options.machine
        for kind in options.only:
            found |= launch(options, kind, machine)
            if machine is None and "machine" in found:
                machine = Path(folder) / "fitted.toml"
                machine.write_text(found["machine"], "utf-8")
    if options.json:
        options.json.write_text(json.dumps(found))
    missed = []
    for kind, table in (("pairs", pairs_table), ("best", best_table)):
        if kind in found:
            text, less = table(found[kind])
            print(f"\n{text}")
            missed += less
    print("\n" + ("\n".join(f"missed: {line}" for line in missed) or "all targets reached"))
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
