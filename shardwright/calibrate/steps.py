"""Steps: measures whole training steps on real ranks, and fits the machine's numbers to them.

Operators and collectives take longer within a step than separately: ranks wait for each other, share cores and evict
each other's data. So three small models train for a moment under plans of all kinds, good ones and random ones, and the
machine's numbers are changed until the prices of those plans match their measured times (:mod:`shardwright.calibrate.fit`).
:func:`measure_steps` starts this module once per rank.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from shardwright.api.auto_parallel import AutoParallel
from shardwright.calibrate.fit import fit_terms, terms_of
from shardwright.calibrate.models import MODELS, Inputs
from shardwright.calibrate.plans import makers
from shardwright.calibrate.timing import seconds_of, take_turns
from shardwright.cost.machine_files import load_machine
from shardwright.errors import WorldError
from shardwright.ir.machine import Machine
from shardwright.ir.plan import Plan
from shardwright.plan.price.price_of import priced_on
from shardwright.world.current import init

_PATIENCE = 600.0


# -- the models -----------------------------------------------------------------------------------------------------------


# -- plans of all kinds ---------------------------------------------------------------------------------------------------


# -- measuring ------------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A model under a plan, ready to step; ``times`` are those on this rank."""

    model: str
    plan: str
    batch: int
    net: AutoParallel
    inputs: Inputs
    optimizer: torch.optim.Optimizer | None = None
    times: list[float] = field(default_factory=list)
    foreign: list[float] = field(default_factory=list)  # share of the cores that other processes had in the same turns

    def prepare(self) -> None:
        """Plans the model, and makes an optimizer."""
        self.net.compile(*self.inputs)
        # per parameter, as without this library; "foreach" is the default on CUDA
        self.optimizer = torch.optim.AdamW(self.net.parameters(), 1e-4)

    def step(self) -> None:
        """Runs forward, backward and AdamW."""
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        self.net(*self.inputs).backward()
        self.optimizer.step()


def calibration_cases(ranks: int) -> list[Case]:
    """Builds the three models under plans of all kinds."""
    cases = []
    for name, (make, inputs) in MODELS.items():
        torch.manual_seed(0)
        given, model = inputs(4 * ranks), make()
        cases += [Case(name, plan, 4 * ranks, maker(copy.deepcopy(model)), given) for plan, maker in makers(ranks).items()]
    return cases


def measured(cases: Sequence[Case], machine: Machine) -> list[MeasuredStep]:
    """Collects the measured steps, priced on a machine, on the first rank. The others return none."""
    times = [seconds_of(case) for case in cases]
    if dist.get_rank():
        return []
    steps = []
    for case, seconds in zip(cases, times):
        plan = case.net.plan.value
        terms = terms_of(partial(_price, plan), machine)
        steps.append(MeasuredStep(case.model, case.plan, seconds, priced_on(plan, machine).seconds, terms))
    return steps


def _price(plan: Plan, machine: Machine) -> float:
    return priced_on(plan, machine).seconds


@dataclass(frozen=True)
class MeasuredStep:
    """One measured step: seconds measured, seconds predicted, and the prediction's terms."""

    model: str
    plan: str
    seconds: float
    price: float
    terms: dict[str, float]


def fit(machine: Machine, steps: Sequence[MeasuredStep]) -> Machine:
    """Fits the machine so that the prices of the steps are nearest their times. Numbers that they do not determine stay."""
    return fit_terms(machine, [s.price for s in steps], [s.terms for s in steps], [s.seconds for s in steps]).machine


def measure_steps(
    ranks: int, seconds: float, machine: Machine, progress: Callable[[float], None] = lambda done: None
) -> list[MeasuredStep]:
    """Measures steps of the three models in new processes, and prices them on a machine.

    Args:
        ranks: number of processes.
        seconds: seconds of measuring, besides about one second per plan to prepare.
        machine: the machine for the prices.
        progress: is called with the fraction that is done.

    Raises:
        WorldError: a process failed; with its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        toml, out = Path(folder) / "machine.toml", Path(folder) / "steps.json"
        toml.write_text(machine.to_toml(), "utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", __name__]
        environment = {**os.environ, "SHARDWRIGHT_MACHINE": str(toml)}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
        root = Path(__file__).resolve().parents[2]
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
    """Runs in each process. The first rank prints its progress, and writes the result."""
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
