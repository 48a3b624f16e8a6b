"""Quality of plans: how far searches are from the best, whether they find what experts know, whether prices are true.

    python benchmarks/plan_quality.py [--check] [--only gaps brute referee rediscovery truth memory]

- *gaps*: ``auto`` on models and meshes of a zoo: the certified gap; ``recursive_programming`` against its bound.
- *brute*: small random models, planned and then priced with every assignment there is, some under a limit on memory.
- *referee*: the same problems as integer programs for HiGHS.
- *rediscovery*: without any annotation, a plan must not be dearer than the one an expert would write.
- *truth*, *memory*: ``plan_truth.py`` and ``memory_truth.py``, on four gloo ranks of this machine.
"""

from __future__ import annotations

import argparse
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from plan_zoo import MESHES, MORE, REFERENCES, ZOO, Made, Reference, make
from rich.progress import track

import shardwright as sw
from shardwright.capture.repeated import capture_repeated
from shardwright.ir.graph import Graph
from shardwright.ir.layout import Layout
from shardwright.ir.plan import Plan
from shardwright.plan.asked.sizes import memory_bytes
from shardwright.plan.modes.search import SearchPlanner
from shardwright.plan.price.price_of import price_of
from shardwright.plan.request import PlanRequest
from shardwright.report.plan_view import PlanView
from shardwright.search.integer_program import solve_integer_program
from shardwright.search.problem import Infeasible, Problem
from shardwright.search.solve import solve

HERE = Path(__file__).resolve().parent
GAP, SHARE, RECURSIVE, BRUTE = 0.005, 0.95, 1.05, 1000
EQUAL = 1e-6  # HiGHS works in floating point, with tolerances of its own

Missed = list[str]


def captured(made: Made) -> Graph:
    model, inputs = made
    return capture_repeated(model, inputs, {}, torch.device("cpu"), {})


def request(mesh: tuple[int, ...], mode: str = "auto", machine: str = "h100", **more: Any) -> PlanRequest:
    return PlanRequest(math.prod(mesh), mode=mode, mesh=mesh, machine=machine, **more)


# -- gaps -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """``auto`` and ``recursive_programming`` on a model and a mesh."""

    name: str
    mesh: tuple[int, ...]
    plan: Plan
    recursive: Plan

    @property
    def gap(self) -> float:
        assert self.plan.search is not None
        return self.plan.search.gap

    @property
    def ratio(self) -> float:
        """Of the recursive plan to what is proved that no plan is below."""
        mine, theirs = self.plan.search, self.recursive.search
        assert mine is not None
        assert theirs is not None
        return theirs.seconds / mine.bound


def gap_cases(names: Sequence[str]) -> Iterator[Case]:
    for name in names:
        graph = captured(make(name))
        for mesh in (*MESHES, *MORE.get(name, ())):
            plans = [SearchPlanner(graph, request(mesh, mode)).plan() for mode in ("auto", "recursive_programming")]
            yield Case(name, mesh, *plans)


def gaps(names: Sequence[str] | None = None) -> Missed:
    cases = list(gap_cases(list(ZOO) if names is None else names))
    print(f"{'model':18}{'mesh':>8}{'step':>12}{'gap':>9}{'searched':>10}  {'method':12}{'recursive':>10}{'took':>9}")
    for case in cases:
        mine, other = case.plan.search, case.recursive.search
        assert mine is not None
        assert other is not None
        print(
            f"{case.name:18}{'·'.join(map(str, case.mesh)):>8}{mine.seconds * 1e3:>9.3f} ms{case.gap:>9.3%}"
            f"{mine.planning:>8.2f} s  {mine.method:12}{case.ratio:>9.3f}×{other.planning:>7.2f} s"
        )
    close = sum(case.gap <= GAP for case in cases) / len(cases)
    near = sum(case.ratio <= RECURSIVE for case in cases) / len(cases)
    print(f"gap of at most {GAP:.1%} in {close:.0%} of {len(cases)} cases; recursion within {RECURSIVE - 1:.0%} in {near:.0%}")
    missed = [] if close >= SHARE else [f"gap at most {GAP:.1%} in {close:.0%} of cases, not {SHARE:.0%}"]
    return missed + ([] if near >= SHARE else [f"recursion within {RECURSIVE}× in {near:.0%} of cases, not {SHARE:.0%}"])


# -- brute force ----------------------------------------------------------------------------------------------------------


class Random(nn.Module):
    """A few operators in a row, now and then with a residual, on a matrix."""

    def __init__(self, draw: random.Random, depth: int):
        super().__init__()
        self.weights, self.steps = nn.ParameterList(), []
        rows, width = (draw.choice([6, 64, 500, 4096, 30_000]) for _ in range(2))
        self.enters = shape = (rows, width)
        for _ in range(depth):
            kind = draw.choice(["linear", "matmul", "relu", "softmax", "norm", "transpose", "add", "scale", "sum", "flatten"])
            shape = self._grow(draw, kind, shape)

    def _weight(self, *shape: int) -> int:
        self.weights.append(nn.Parameter(torch.empty(shape, device="meta")))
        return len(self.weights) - 1

    def _grow(self, draw: random.Random, kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        w, width = self.weights, draw.choice([6, 64, 500, 4096])
        step: Callable[[Tensor], Tensor]
        if kind == "linear":
            i, j = self._weight(width, shape[1]), self._weight(width)
            step, shape = lambda x: F.linear(x, w[i], w[j]), (shape[0], width)
        elif kind == "matmul":
            i = self._weight(shape[1], width)
            step, shape = lambda x: x @ w[i], (shape[0], width)
        elif kind == "norm":
            i = self._weight(shape[1])
            step = lambda x: F.rms_norm(x, x.shape[1:], w[i])  # noqa: E731
        elif kind == "scale":
            i = self._weight(shape[1])
            step = lambda x: x * w[i]  # noqa: E731
        elif kind == "transpose":
            step, shape = lambda x: x.t(), shape[::-1]
        else:
            plain: dict[str, Callable[[Tensor], Tensor]] = {
                "relu": F.relu,
                "softmax": lambda x: x.softmax(-1),
                "add": lambda x: x + x.relu(),
                "sum": lambda x: x - x.sum(0),
                "flatten": lambda x: x.flatten().sigmoid().view(x.shape),
            }
            step = plain[kind]
        self.steps.append(step)
        return shape

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x.square().mean()


MOST = 400_000  # assignments to try


def all_prices(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Cost and memory of every assignment of a problem without repeats."""
    sizes = [len(node.cost) for node in problem.nodes]
    cost, memory = np.zeros(sizes), np.zeros(sizes)

    def spread(table: np.ndarray, *at: int) -> np.ndarray:
        if list(at) != sorted(at):
            table, at = table.T, at[::-1]
        return table.reshape([sizes[i] if i in at else 1 for i in range(len(sizes))])

    for place, node in enumerate(problem.nodes):
        cost += spread(node.cost, place)
        memory += 0 if node.memory is None else spread(node.memory, place)
    for edge in problem.edges:
        cost += spread(edge.cost, edge.a, edge.b)
        memory += 0 if edge.memory is None else spread(edge.memory, edge.a, edge.b)
    return cost.ravel(), memory.ravel()


def small_problems(count: int, seed: int = 0) -> Iterator[tuple[SearchPlanner, Plan, Problem]]:
    """Random models as problems small enough to try everything, with the plan that was found."""
    draw = random.Random(seed)
    found = 0
    while found < count:
        mesh = draw.choice([(2,), (2,), (3,), (8,), (2, 2)])
        model = Random(draw, draw.randint(1, 4 if len(mesh) == 1 else 2))
        x = torch.empty(model.enters, device="meta", requires_grad=bool(draw.randrange(2)))
        graph = captured((model, (x,)))
        planner = SearchPlanner(graph, request(mesh, machine=draw.choice(["h100", "cpu-gloo", "ascend-910b"])))
        plan = planner.plan()
        problem, _ = planner.latest.problem.unfolded()
        if len(problem.nodes) > 1 and math.prod(len(node.cost) for node in problem.nodes) <= MOST and len(problem.nodes) < 30:
            found += 1
            yield planner, plan, problem


def brute(count: int = BRUTE) -> Missed:
    worst, limited, priced = 0.0, 0, 0
    draw = random.Random(1)
    for planner, plan, problem in track(small_problems(count), "every assignment", count, transient=True):
        cost, memory = all_prices(problem)
        best = float(cost.min())
        assert plan.search is not None
        found = plan.search.seconds - planner.machine.step_launch
        worst = max(worst, abs(found / best - 1))
        priced += math.isclose(price_of(plan).seconds - price_of(plan).unshared, plan.search.seconds, rel_tol=1e-6)
        # the same under a limit between the least memory and that of the best
        least, free = float(memory[np.isfinite(cost)].min()), float(memory[int(cost.argmin())])
        if free > least:
            limited += 1
            under = replace(problem, limit=least + draw.random() * (free - least))
            allowed = float(cost[memory <= under.limit * (1 + 1e-12)].min())
            worst = max(worst, abs(solve(under, gap=0.0).cost / allowed - 1))
    print(
        f"{count} random models, {limited} of them under a limit too: at most {worst:.1e} off the best of all assignments; "
        f"the plan's own price is the search's in {priced}"
    )
    missed = [] if worst <= 1e-9 else [f"{worst:.1e} off brute force"]
    return missed + ([] if priced == count else [f"a plan's price is not the search's in {count - priced} of {count}"])


# -- HiGHS ----------------------------------------------------------------------------------------------------------------


SMALL = ("mlp", "autoencoder", "two towers", "recommender", "cnn", "unet")


def referee(count: int = 60, seconds: float = 20.0, zoo: Sequence[str] = SMALL) -> Missed:
    """Random models, and those of the zoo that are small enough, with and without a limit."""
    problems = [problem for _, _, problem in small_problems(count, seed=2)]
    for name in zoo:
        planner = SearchPlanner(captured(make(name)), request((8,)))
        planner.plan()
        problems.append(planner.latest.problem)
    equal = late = 0
    off: list[str] = []
    for problem in track(problems, "HiGHS", transient=True):
        free = solve(problem)
        for limit in (None, 0.7 * free.memory):
            limited = replace(problem, limit=limit)
            try:
                theirs = solve_integer_program(limited, seconds)
            except Infeasible:
                theirs = None
            except TimeoutError:
                late += 1
                continue
            try:
                mine = solve(limited, gap=0.0)
            except Infeasible:
                mine = None
            if theirs is None or mine is None:
                same = theirs is mine
            elif theirs.gap > EQUAL:
                late += 1
                continue
            else:
                same = math.isclose(mine.cost, theirs.cost, rel_tol=EQUAL)
            equal += same
            if not same:
                costs = f"{mine and mine.cost} here, {theirs and theirs.cost} there"
                off.append(f"{problem.nodes[0].name}…, limit {limit}: {costs}")
    print(f"HiGHS: equal in {equal}, not finished in {late}, different in {len(off)}")
    return [f"differs from HiGHS: {line}" for line in off]


# -- rediscovery ----------------------------------------------------------------------------------------------------------


def expert_plan(reference: Reference) -> Plan:
    """The reference, priced on the same machine."""
    with torch.device("meta"):
        model, inputs = reference.model()
    net = sw.AutoParallel(model, parallel_mode=reference.mode)
    if reference.strategies:
        net.shard(reference.strategies)
    plan = sw.plan_for(
        math.prod(reference.mesh), model, *inputs, machine=reference.machine, mode=reference.mode, settings=net.settings
    )
    if reference.stored_split:
        layouts = dict(plan.input_layouts)
        for i in plan.graph.inputs:
            if i.kind == "parameter" and i.meta.shape and i.meta.shape[0] % plan.mesh.size == 0:
                layouts[i.value] = Layout.of(plan.mesh, [list(plan.mesh.axes), *([] for _ in i.meta.shape[1:])])
        plan = PlanView(replace(plan.value, input_layouts=layouts))
    return plan


def rediscovery(names: Sequence[str] | None = None) -> Missed:
    missed = []
    print(f"{'':38}{'expert':>12}{'auto':>12}{'ratio':>8}{'memory':>10}{'auto':>9}")
    for name, reference in REFERENCES.items():
        if names is not None and name not in names:
            continue
        theirs = expert_plan(reference)
        with torch.device("meta"):
            graph = captured(reference.model())
        limit = None if reference.memory is None else memory_bytes(reference.memory)
        found = PlanView(SearchPlanner(graph, request(reference.mesh, machine=reference.machine, memory_limit=limit)).plan())
        expert, mine = theirs.price.seconds, found.price.seconds
        print(
            f"{name:38}{expert * 1e3:>9.2f} ms{mine * 1e3:>9.2f} ms{mine / expert:>8.3f}"
            f"{theirs.memory.peak / 1e9:>7.1f} GB{found.memory.peak / 1e9:>6.1f} GB"
        )
        if mine > expert * (1 + 1e-9):
            missed.append(f"{name}: auto costs {mine / expert:.3f} times as much as the expert's plan")
    return missed


# -- on real ranks --------------------------------------------------------------------------------------------------------


def script(name: str, *arguments: str) -> Missed:
    """Another benchmark with ``--check``."""
    command = [sys.executable, str(HERE / name), "--check", *arguments]
    return [f"{name}: see above"] if subprocess.run(command, check=False).returncode else []


PARTS: dict[str, Callable[[], Missed]] = {
    "gaps": gaps,
    "brute": brute,
    "referee": referee,
    "rediscovery": rediscovery,
    "memory": lambda: script("memory_truth.py"),
    "truth": lambda: script("plan_truth.py"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="some of the parts")
    options = parser.parse_args()
    missed: Missed = []
    for part in options.only:
        started = time.perf_counter()
        print(f"\n{part}", flush=True)
        missed += PARTS[part]()
        print(f"({time.perf_counter() - started:.0f} s)", flush=True)
    print("\n" + ("\n".join(f"missed: {line}" for line in missed) or "all targets reached"))
    return 1 if missed and options.check else 0


if __name__ == "__main__":
    raise SystemExit(main())
