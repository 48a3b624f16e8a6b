"""The truth about plans: predicted step times and memory against those measured, and the plan found against well-known ones.

    python benchmarks/plan_truth.py [--quick] [--check] [--pairs 100] [--calibrate] [--machine FILE] [--json FILE]

Starts four gloo ranks on this machine, one thread each. *Pairs*: every model under data parallelism, parameters stored
split (ZeRO), Megatron's plans, the plan of ``auto`` on each mesh, and plans that a search finds when its prices are blurred
at random, a little or beyond recognition. *Best*: on every batch size, ``auto`` against the well-known plans. A step is
forward, backward and AdamW; models take turns, two steps each after one to warm up, and medians of the slowest rank count.
Memory is what a rank has allocated beyond what was there before the model.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from truth_models import FITTED, SUBJECTS, Inputs, Subject

import shardwright as sw
import shardwright.plan.automatic as automatic
from shardwright.capture.graph import Graph
from shardwright.cost.fit import terms_of
from shardwright.cost.machine import load_machine
from shardwright.layout import Layout
from shardwright.plan.modes import plan_graph
from shardwright.plan.plan import Plan
from shardwright.plan.semi_auto import PlanRequest
from shardwright.search.problem import Problem
from shardwright.search.solve import Solution

RANKS = 4
MESHES = ((4,), (2, 2))
CORRELATION, ERROR, CLOSE, BEST = 0.95, 0.15, 0.15, 1.05
# How much the prices that a random plan is searched by are blurred: the deviation of their logarithms.
BLURS = (0.3, 0.7, 1.5, 3.0)


# -- plans ----------------------------------------------------------------------------------------------------------------


def split_storage(graph: Graph, request: PlanRequest) -> Plan:
    """Data parallel, every parameter stored split over all ranks along dim 0 where that is even."""
    plan = plan_graph(graph, replace(request, mode="data_parallel", honour_marks=False))
    layouts = dict(plan.input_layouts)
    for i in graph.inputs:
        shape = i.meta.shape
        if i.kind == "parameter" and shape and shape[0] % request.world_size == 0:
            dims = [list(plan.mesh.axes), *([] for _ in shape[1:])]
            layouts[i.value] = Layout.of(plan.mesh, dims)
    return replace(plan, input_layouts=layouts)


def blurred(seed: int, blur: float) -> Callable[..., Plan]:
    """A planner: what a search finds when its prices are multiplied by random numbers."""

    def planner(graph: Graph, request: PlanRequest) -> Plan:
        mesh = MESHES[seed % 2]
        exact = automatic.solve

        def solve(problem: Problem, **options: Any) -> Solution:
            found: list[Any] = [None]
            if not dist.is_initialized() or dist.get_rank() == 0:
                found = [exact(_blur(problem, np.random.default_rng(seed), blur), gap=0.05, seconds=5.0)]
            if dist.is_initialized():  # a search may end by the clock: one is enough
                dist.broadcast_object_list(found)
            solution: Solution = found[0]
            return solution

        automatic.solve = solve  # type: ignore[assignment]
        try:
            return plan_graph(graph, replace(request, mode="dynamic_programming", mesh=mesh))
        finally:
            automatic.solve = exact

    return planner


def _blur(problem: Problem, draw: np.random.Generator, blur: float) -> Problem:
    def noisy(cost: Any) -> Any:
        return cost * np.exp(blur * draw.standard_normal(cost.shape))

    nodes = tuple(replace(node, cost=noisy(node.cost)) for node in problem.nodes)
    edges = tuple(replace(edge, cost=noisy(edge.cost)) for edge in problem.edges)
    return Problem(nodes, edges, problem.repeats, problem.limit)


def known_plans(subject: Subject) -> dict[str, Callable[[torch.nn.Module], sw.AutoParallel]]:
    """The plans that an expert would try, by name."""

    def tensor(sizes: tuple[int, ...], axes: tuple[str, ...]) -> Callable[[torch.nn.Module], sw.AutoParallel]:
        def make(model: torch.nn.Module) -> sw.AutoParallel:
            layout = sw.Layout(sizes, axes)
            batch = "dp" if "dp" in axes else "None"
            return sw.AutoParallel(model).shard(subject.tensor_parallel(layout, batch))

        return make

    found = {
        "data": lambda model: sw.AutoParallel(model, "data_parallel"),
        "zero": lambda model: planned_by(sw.AutoParallel(model), split_storage),
        "tensor": tensor((4,), ("tp",)),
        "2-d": tensor((2, 2), ("dp", "tp")),
    }
    if subject.sequence_parallel is not None:
        sequence = subject.sequence_parallel
        found["sequence"] = lambda model: sw.AutoParallel(model).shard(sequence(sw.Layout((4,), ("tp",))))
    return found


def planned_by(net: sw.AutoParallel, planner: Any) -> sw.AutoParallel:
    net.settings.planner = planner
    return net


# -- one rank -------------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A model under a plan, ready to step."""

    model: str
    plan: str
    batch: int
    net: sw.AutoParallel
    inputs: Inputs
    optimizer: torch.optim.Optimizer | None = None
    times: list[float] = field(default_factory=list)
    spent: list[float] = field(default_factory=list)  # this process, in the same steps
    busy: list[float] = field(default_factory=list)  # all processes of the machine
    predicted: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)

    def prepare(self) -> None:
        self.net.compile(*self.inputs)
        # per parameter, as one would without knowing of this library; "foreach" is what CUDA does by default
        self.optimizer = torch.optim.AdamW(self.net.parameters(), 1e-4)
        plan = self.net.plan
        self.predicted, self.parts = plan.price.seconds, plan.price.parts

    def step(self) -> None:
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        loss = self.net(*self.inputs)
        loss.backward()
        self.optimizer.step()


def pair_cases(names: Sequence[str], pairs: int, subjects: dict[str, Subject]) -> list[Case]:
    """About so many pairs of a model and a plan."""
    cases = []
    for name in names:
        subject = subjects[name]
        torch.manual_seed(len(name))
        batch = subject.batches[len(subject.batches) // 2]
        inputs, model = subject.inputs(batch), subject.make()
        makers: dict[str, Callable[[Any], sw.AutoParallel]] = dict(known_plans(subject))
        for mesh in MESHES:
            makers[f"auto {mesh}"] = lambda m, mesh=mesh: sw.AutoParallel(m, "dynamic_programming").search(mesh=mesh)
        for at in range(max(0, pairs // len(names) - len(makers))):
            blur = BLURS[at % len(BLURS)]
            makers[f"blur {blur} {at}"] = lambda m, at=at, blur=blur: planned_by(sw.AutoParallel(m), blurred(at, blur))
        cases += [Case(name, plan, batch, make(copy.deepcopy(model)), inputs) for plan, make in makers.items()]
    return cases


def best_cases(names: Sequence[str]) -> list[Case]:
    cases = []
    for name in names:
        subject = SUBJECTS[name]
        for batch in subject.batches:
            torch.manual_seed(batch)
            inputs, model = subject.inputs(batch), subject.make()
            makers = {"auto": lambda m: sw.AutoParallel(m, "auto"), **known_plans(subject)}
            cases += [Case(name, plan, batch, make(copy.deepcopy(model)), inputs) for plan, make in makers.items()]
    return cases


def take_turns(cases: Sequence[Case], seconds: float, least: int = 5) -> int:
    """Rounds of all cases, each in an order of its own, until the time is over; returns how many."""
    draw, start, rounds = random.Random(0), time.perf_counter(), 0
    order = list(cases)
    while True:
        draw.shuffle(order)
        for case in order:
            dist.barrier()
            busy, spent = busy_seconds(), time.process_time()
            case.step()  # what was evicted comes back
            for _ in range(2):
                dist.barrier()
                begin = time.perf_counter()
                case.step()
                case.times.append(time.perf_counter() - begin)
            dist.barrier()
            case.spent.append(time.process_time() - spent)
            case.busy.append(busy_seconds() - busy)
        rounds += 1
        over = torch.tensor(float(rounds >= least and time.perf_counter() - start > seconds))
        dist.broadcast(over, 0)
        if over:
            return rounds


def busy_seconds() -> float:
    """Seconds that the cores of this machine have worked, for whomever."""
    user, nice, system, _, _, irq, soft, *_ = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def quiet_median(times: Sequence[float], foreign: Sequence[float]) -> float:
    """The median of the steps, two a turn, of the half of the turns in which others used the machine least."""
    order = np.argsort(np.asarray(foreign), kind="stable")[: (len(foreign) + 1) // 2]
    return statistics.median([times[2 * turn + i] for turn in order for i in range(2)])


def rows_of(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """What was measured, of the slowest rank; memory of the rank that needs most."""
    found = []
    for case in cases:
        times, spent = torch.tensor(case.times, dtype=torch.float64), torch.tensor(case.spent, dtype=torch.float64)
        dist.all_reduce(times, dist.ReduceOp.MAX)
        dist.all_reduce(spent)
        foreign = [max(0.0, busy - own) for busy, own in zip(case.busy, spent.tolist())]
        found.append(
            {
                "model": case.model, "plan": case.plan, "batch": case.batch, "predicted": case.predicted,
                "seconds": quiet_median(times.tolist(), foreign), "median": times.median().item(),
                "low": times.quantile(0.25).item(), "foreign": sum(foreign) / sum(case.busy), "parts": case.parts,
                "mesh": list(case.net.plan.mesh.sizes),
            }
        )  # fmt: skip
    return found


def worker(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    world = sw.init()
    began = time.perf_counter()
    result: dict[str, Any] = {}
    subjects = {**SUBJECTS, **FITTED}
    names = options.models or (list(FITTED) if options.fitted else list(SUBJECTS))
    todo = {"pairs": lambda: pair_cases(names, options.pairs, subjects), "best": lambda: best_cases(names)}
    if options.only:
        todo = {options.only: todo[options.only]}
    for kind, make in todo.items():
        cases = make()
        for case in cases:
            case.prepare()
            case.step()
        if world.rank == 0:
            print(f"{kind}: {len(cases)} plans ready after {time.perf_counter() - began:.0f} s", flush=True)
        rounds = take_turns(cases, options.seconds)
        result[kind] = rows_of(cases)
        if options.terms and world.rank == 0:
            for row, case in zip(result[kind], cases):
                plan = case.net.plan
                row["collectives"] = collectives_of(case.net.program)
                row["terms"] = terms_of(lambda machine, plan=plan: plan.priced_on(machine).seconds, load_machine("cpu-gloo"))
        if world.rank == 0:
            print(f"{kind}: {rounds} rounds after {time.perf_counter() - began:.0f} s", flush=True)
        del cases
        gc.collect()
    if world.rank == 0:
        Path(options.worker).write_text(json.dumps(result))


# -- what it says ---------------------------------------------------------------------------------------------------------


def collectives_of(program: Any) -> list[tuple[str, int, int]]:
    """Kind, ranks and bytes of every collective of a step; those that small tensors share once."""
    found = []
    for instruction in program.instructions:
        moves = getattr(instruction, "moves", ()) or ((instruction,) if hasattr(instruction, "redistribution") else ())
        for phase in ("forward", "backward") if moves and moves[0].needs_grad else ("forward",) if moves else ():
            for steps in zip(*(getattr(m.redistribution, phase) for m in moves)):
                if steps[0].kind != "slice":
                    ranks = steps[0].source.mesh.count(steps[0].axes) or steps[0].source.mesh.size
                    shapes = [(at, m.redistribution.shape) for at, m in zip(steps, moves)]
                    sizes = [[math.prod(lay.local_shape(s, 0)) for lay in (at.source, at.target)] for at, s in shapes]
                    found.append((steps[0].kind, ranks, 4 * max(map(sum, zip(*sizes)))))
    return found


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's."""
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


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
    missed = [f"auto within 5 % of the best in {good} of {len(cases)} cases"] if share < 0.95 else []
    return "\n".join(lines) + f"\n\nauto within 5 % of the best in {good} of {len(cases)} cases", missed


def launch(options: argparse.Namespace, machine: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "result.json")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), __file__]
        command += ["--worker", out, "--pairs", str(options.pairs), "--seconds", str(options.seconds)]
        command += ["--models", *options.models] if options.models else []
        command += ["--fitted"] if options.fitted else []
        command += ["--terms"] if options.terms else []
        command += ["--only", options.only] if options.only else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if machine is not None:
            environment["SHARDWRIGHT_MACHINE"] = str(machine)
        subprocess.run(command, check=True, env=environment)
        found: dict[str, Any] = json.loads(Path(out).read_text())
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer pairs and rounds")
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=100.0, help="of rounds, of each kind")
    parser.add_argument("--machine", type=Path, help="a machine file; default: what planning uses")
    parser.add_argument("--models", nargs="*")
    parser.add_argument("--fitted", action="store_true", help="the models that calibration may see, instead")
    parser.add_argument("--only", choices=("pairs", "best"))
    parser.add_argument("--json", type=Path, help="where to keep all numbers")
    parser.add_argument("--terms", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return 0
    if options.quick:
        options.pairs, options.seconds = 40, 10.0
    found = launch(options, options.machine)
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
