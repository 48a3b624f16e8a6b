"""Whole training steps, measured on real ranks: what a machine's numbers are fitted to.

Operators and collectives take longer within a step than by themselves: ranks wait for each other, share cores and evict
each other's data. So three small models train for a moment under plans of all kinds, good ones and random ones, and the
machine's numbers are moved until the prices of those plans are the times that they took (:mod:`shardwright.cost.fit`).
:func:`measure_steps` starts this module once a rank.
"""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from shardwright.api import AutoParallel
from shardwright.capture.graph import Graph
from shardwright.cost.fit import fit_terms, terms_of
from shardwright.cost.machine import Machine, load_machine
from shardwright.errors import WorldError
from shardwright.layout import Layout
from shardwright.plan.automatic import SearchPlanner
from shardwright.plan.meshes import factorisations
from shardwright.plan.modes import plan_graph
from shardwright.plan.plan import Plan
from shardwright.plan.semi_auto import PlanRequest
from shardwright.search.problem import Edge, Problem, Solution
from shardwright.world.current import init

# How much the prices that a random plan is searched by are blurred: the deviation of their logarithms.
BLURS = (0.5, 1.5, 3.0, 10.0)
_RANDOM = 8  # random plans a model
_LEAST_ROUNDS = 4
_FOREIGN = 0.1  # share of the cores from which others disturb; a clock that ticks a hundred times a second tells no less
_PATIENCE = 600.0


# -- the models -----------------------------------------------------------------------------------------------------------


class Mixer(nn.Module):
    """Layer norms, gelu, products over positions and over channels."""

    def __init__(self, d: int = 160, length: int = 64, layers: int = 2, classes: int = 64):
        super().__init__()
        self.embed = nn.Linear(48, d)
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(2 * layers))
        self.mix = nn.ModuleList(nn.Linear(length, length) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(d, 3 * d) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(3 * d, d) for _ in range(layers))
        self.out = nn.Linear(d, classes)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = self.embed(x)
        for i, (mix, up, down) in enumerate(zip(self.mix, self.up, self.down)):
            x = x + mix(self.norms[2 * i](x).transpose(1, 2)).transpose(1, 2)
            x = x + down(F.gelu(up(self.norms[2 * i + 1](x))))
        return F.cross_entropy(self.out(x.mean(1)), target)


class Pictures(nn.Module):
    """Convolutions, a pool, attention over what is left of the picture."""

    def __init__(self, width: int = 24, heads: int = 2, classes: int = 32):
        super().__init__()
        self.heads = heads
        self.up = nn.ModuleList([nn.Conv2d(3, width, 5, padding=2), nn.Conv2d(width, 2 * width, 3, padding=1)])
        self.down = nn.ModuleList([nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1)])
        self.qkv, self.out = nn.Linear(2 * width, 6 * width), nn.Linear(2 * width, classes)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.up[0](x)), 2)
        x = F.gelu(self.down[0](F.relu(self.up[1](x))))
        x = x.flatten(2).transpose(1, 2)
        b, s, d = x.shape
        q, k, v = (t.view(b, s, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, d)
        return F.cross_entropy(self.out((x + y).mean(1)), target)


class Tagger(nn.Module):
    """A table of embeddings, a gated network for each token, a large head."""

    def __init__(self, vocab: int = 3000, d: int = 96, tags: int = 400):
        super().__init__()
        self.tokens, self.norm = nn.Embedding(vocab, d), nn.RMSNorm(d)
        self.up, self.gate, self.down = nn.Linear(d, 4 * d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.out = nn.Linear(d, tags)

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        x = self.norm(self.tokens(ids))
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return F.cross_entropy(self.out(x).flatten(0, 1), target.flatten())


Inputs = tuple[Tensor, ...]
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Inputs]]] = {
    "mixer": (Mixer, lambda n: (torch.randn(n, 64, 48), torch.randint(0, 64, (n,)))),
    "pictures": (Pictures, lambda n: (torch.randn(n, 3, 24, 24), torch.randint(0, 32, (n,)))),
    "tagger": (Tagger, lambda n: (torch.randint(0, 3000, (n, 32)), torch.randint(0, 400, (n, 32)))),
}


# -- plans of all kinds ---------------------------------------------------------------------------------------------------


def split_storage(graph: Graph, request: PlanRequest) -> Plan:
    """Data parallel, every parameter stored split over all ranks along dim 0 where that is even."""
    plan = plan_graph(graph, replace(request, mode="data_parallel", honour_marks=False))
    layouts = dict(plan.input_layouts)
    for i in graph.inputs:
        shape = i.meta.shape
        if i.kind == "parameter" and shape and shape[0] % request.world_size == 0:
            layouts[i.value] = Layout.of(plan.mesh, [list(plan.mesh.axes), *([] for _ in shape[1:])])
    return replace(plan, input_layouts=layouts)


def blurred(seed: int, blur: float, mesh: tuple[int, ...]) -> Callable[[Graph, PlanRequest], Plan]:
    """A planner: what a search finds when its prices are multiplied by random numbers."""

    class Blurred(SearchPlanner):
        def find(self, problem: Problem, gap: float) -> Solution:
            return super().find(_blurred(problem, np.random.default_rng(seed), blur), gap)

    return lambda graph, request: Blurred(graph, replace(request, mode="dynamic_programming", mesh=mesh)).plan()


def _blurred(problem: Problem, draw: np.random.Generator, blur: float) -> Problem:
    def noisy(cost: Any) -> Any:
        return cost * np.exp(blur * draw.standard_normal(cost.shape))

    def edges(given: Sequence[Edge]) -> tuple[Edge, ...]:
        return tuple(replace(edge, cost=noisy(edge.cost)) for edge in given)

    nodes = tuple(replace(node, cost=noisy(node.cost)) for node in problem.nodes)
    repeats = tuple(replace(repeat, carried=edges(repeat.carried)) for repeat in problem.repeats)
    return Problem(nodes, edges(problem.edges), repeats, problem.limit)


def planned_by(model: nn.Module, planner: Callable[[Graph, PlanRequest], Plan]) -> AutoParallel:
    """The model under the plan that a function makes."""
    net = AutoParallel(model)
    net.settings.planner = planner
    return net


def meshes_of(ranks: int) -> list[tuple[int, ...]]:
    """The ranks in one axis, and in two where their number has factors.

    >>> meshes_of(4), meshes_of(3)
    ([(4,), (2, 2)], [(3,)])
    """
    return [(ranks,), *factorisations(ranks, 2)[:1]]


def makers(ranks: int, count: int = _RANDOM) -> dict[str, Callable[[nn.Module], AutoParallel]]:
    """Plans by name: data parallel, parameters stored split, the best on each mesh, and so many random ones."""
    found: dict[str, Callable[[nn.Module], AutoParallel]] = {
        "data": lambda model: AutoParallel(model, "data_parallel"),
        "zero": lambda model: planned_by(model, split_storage),
    }
    meshes = meshes_of(ranks)
    found.update((f"auto {mesh}", partial(_searched, mesh)) for mesh in meshes)
    for at in range(count):
        blur, mesh = BLURS[at % len(BLURS)], meshes[(at + at // len(BLURS)) % len(meshes)]
        found[f"blur {blur} {at}"] = partial(planned_by, planner=blurred(at, blur, mesh))
    return found


def _searched(mesh: tuple[int, ...], model: nn.Module) -> AutoParallel:
    return AutoParallel(model, "dynamic_programming").search(mesh=mesh)


# -- measuring ------------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A model under a plan, ready to step; ``times`` are those of this rank."""

    model: str
    plan: str
    batch: int
    net: AutoParallel
    inputs: Inputs
    optimizer: torch.optim.Optimizer | None = None
    times: list[float] = field(default_factory=list)
    foreign: list[float] = field(default_factory=list)  # share of the cores that others had in the same turns

    def prepare(self) -> None:
        """Compiles, and makes an optimizer."""
        self.net.compile(*self.inputs)
        # per parameter, as one would without knowing of this library; "foreach" is what CUDA does by default
        self.optimizer = torch.optim.AdamW(self.net.parameters(), 1e-4)

    def step(self) -> None:
        """Forward, backward and AdamW."""
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        self.net(*self.inputs).backward()
        self.optimizer.step()


class Timed(Protocol):
    """What takes turns: a step, the times of it on this rank, and the shares of the cores that others had."""

    times: list[float]
    foreign: list[float]

    def step(self) -> None:
        """One step, the same on every rank."""


def take_turns(
    cases: Sequence[Timed], seconds: float, progress: Callable[[float], None] = lambda done: None, least: int = _LEAST_ROUNDS
) -> int:
    """Rounds of all cases, each in an order of its own, until the time is over; returns how many."""
    draw, start, rounds = random.Random(0), time.perf_counter(), 0
    order = list(cases)
    while True:
        draw.shuffle(order)
        for case in order:
            dist.barrier()
            busy, spent = _busy_seconds(), time.process_time()
            case.step()  # what was evicted comes back
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
    """Seconds that the cores of this machine have worked, for whomever; 0 where nobody says."""
    try:
        line = Path("/proc/stat").read_text("ascii").split("\n", 1)[0]
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, soft, *_ = map(int, line.split()[1:])
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def seconds_of(case: Timed) -> float:
    """Seconds of a step, of the slowest rank, as :func:`undisturbed` has it."""
    times = torch.tensor(case.times, dtype=torch.float64)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return undisturbed(times.tolist(), case.foreign)


def undisturbed(times: Sequence[float], foreign: Sequence[float]) -> float:
    """What steps take where nothing disturbs them, from the times of all: the mean of the faster half.

    A disturbance makes a step slower and never faster. Turns in which others used the machine do not count, as long as half
    of the turns are left.

    Args:
        times: of every step, two a turn.
        foreign: share of the cores that others had, of every turn.

    >>> undisturbed([1.0, 1.2, 1.1, 3.0, 0.1, 0.1], [0.0, 0.02, 0.4])
    1.05
    """
    turns = np.asarray(times, dtype=float).reshape(len(foreign), -1)
    quiet = np.argsort(np.asarray(foreign), kind="stable")
    count = max((len(foreign) + 1) // 2, int((np.asarray(foreign) <= _FOREIGN).sum()))
    kept = np.sort(turns[quiet[:count]], axis=None)
    return float(kept[: (len(kept) + 1) // 2].mean())


def calibration_cases(ranks: int) -> list[Case]:
    """The three models under plans of all kinds."""
    cases = []
    for name, (make, inputs) in MODELS.items():
        torch.manual_seed(0)
        given, model = inputs(4 * ranks), make()
        cases += [
            Case(name, plan, 4 * ranks, maker(copy.deepcopy(model)), given) for plan, maker in makers(ranks).items()
        ]
    return cases


def measured(cases: Sequence[Case], machine: Machine) -> list[MeasuredStep]:
    """What was measured of cases, priced on a machine; by the first rank, the others get none."""
    times = [seconds_of(case) for case in cases]
    if dist.get_rank():
        return []
    steps = []
    for case, seconds in zip(cases, times):
        plan = case.net.plan
        terms = terms_of(partial(_price, plan), machine)
        steps.append(MeasuredStep(case.model, case.plan, seconds, plan.priced_on(machine).seconds, terms))
    return steps


def _price(plan: Plan, machine: Machine) -> float:
    return plan.priced_on(machine).seconds


@dataclass(frozen=True)
class MeasuredStep:
    """A step that was measured: what its price is on the machine it was priced on, of which so much is each term's."""

    model: str
    plan: str
    seconds: float
    price: float
    terms: dict[str, float]


def fit(machine: Machine, steps: Sequence[MeasuredStep]) -> Machine:
    """The machine on which the prices of the steps are nearest their times; what they do not tell is as it was."""
    return fit_terms(machine, [s.price for s in steps], [s.terms for s in steps], [s.seconds for s in steps]).machine


def measure_steps(
    ranks: int, seconds: float, machine: Machine, progress: Callable[[float], None] = lambda done: None
) -> list[MeasuredStep]:
    """Measures steps of the three models in processes of their own, and prices them on a machine.

    Args:
        seconds: of measuring, beside about a second a plan to prepare.

    Raises:
        WorldError: a process failed; with what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        toml, out = Path(folder) / "machine.toml", Path(folder) / "steps.json"
        toml.write_text(machine.to_toml(), "utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", __name__]
        environment = {**os.environ, "SHARDWRIGHT_MACHINE": str(toml)}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
        root = Path(__file__).resolve().parents[1]
        if root.name not in ("site-packages", "dist-packages"):  # a checkout that may not be installed
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), environment.get("PYTHONPATH")]))
        with tempfile.TemporaryFile("w+") as errors:
            job = subprocess.Popen(
                [*command, str(out), str(seconds)], env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
            )
            try:
                for line in job.stdout or ():
                    progress(float(line))
                code = job.wait(_PATIENCE)
            finally:
                job.kill()
                job.communicate()
            if code or not out.is_file():
                errors.seek(0)
                raise WorldError(f"measuring steps with {ranks} ranks failed:\n{errors.read()[-2000:].strip()}")
        return [MeasuredStep(**each) for each in json.loads(out.read_text("utf-8"))]


def _work(out: str, seconds: str) -> None:
    """What each process does; the first one says how far it is, and writes what comes of it."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    world = init()

    def say(done: float) -> None:
        if world.rank == 0:
            print(f"{done:.3f}", flush=True)

    cases = calibration_cases(world.size)
    for at, case in enumerate(cases):
        case.prepare()
        case.step()
        say(0.4 * (at + 1) / len(cases))
    take_turns(cases, float(seconds), lambda done: say(0.4 + 0.5 * done))
    steps = measured(cases, load_machine("cpu-gloo"))
    if world.rank == 0:
        Path(out).write_text(json.dumps([vars(step) for step in steps]), "utf-8")
    dist.barrier()


if __name__ == "__main__":
    _work(*sys.argv[1:])
