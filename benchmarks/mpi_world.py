"""MPI as a world: time of collectives and of steps over MPI and over gloo, interleaved in one job.

    python benchmarks/mpi_world.py [--ranks 4] [--rounds 15] [--check]

mpirun starts the ranks on this machine, one thread each. Both worlds move the same tensors, and train copies of one model, in
the same processes and take turns; medians are quoted. How much a step gains is what it spends in collectives, which depends on
the machine: ranks that share cores compute in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from step_time import CASES, batch, model, ours  # noqa: E402
from turns import seconds_in_turn  # noqa: E402

import shardwright as sw  # noqa: E402
from shardwright.ir.layout import Layout  # noqa: E402
from shardwright.ir.mesh import Mesh  # noqa: E402
from shardwright.world import current  # noqa: E402
from shardwright.world.world import World  # noqa: E402

FASTER = 1.5  # times as fast as over gloo, at least, is every collective, and the geometric mean of the models' steps


def collectives(world: World) -> dict[str, Callable[[], Any]]:
    """Returns redistributions by name, each of one collective."""
    mesh = Mesh(("rank",), (world.size,))
    rows, columns, whole = (Layout.of(mesh, dims) for dims in ((("rank",), ()), ((), ("rank",)), ((), ())))
    pending = Layout.of(mesh, ((), ()), [("rank", "sum")])
    cases = {
        "all-reduce 64 KiB": (pending, whole, 128),
        "all-reduce 1 MiB": (pending, whole, 512),
        "all-to-all 1 MiB": (rows, columns, 512),
        "all-gather 256 KiB": (rows, whole, 256),
    }
    found = {}
    for name, (source, target, n) in cases.items():
        value = torch.ones(source.local_shape((n, n), world.rank))
        found[name] = partial(world.redistribute, value, source, target, (n, n))
    return found


def stepper(case: str, world: World) -> Callable[[], float]:
    current._current[:] = [world]
    inputs = batch(case)
    net, call = ours(model(case), inputs, world.size)
    call(*inputs)  # replaces the parameters
    optimizer = torch.optim.SGD(net.parameters(), 1e-2)

    def step() -> float:
        current._current[:] = [world]
        optimizer.zero_grad()
        loss = call(*inputs)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def worker(rounds: int, out: str) -> None:
    """One rank: all models, both worlds in turn."""
    torch.set_num_threads(1)
    worlds = {name: sw.init(backend=name) for name in ("mpi", "gloo")}
    results: dict[str, Any] = {}
    moves = {name: collectives(world) for name, world in worlds.items()}
    for case in moves["mpi"]:
        pair = {name: found[case] for name, found in moves.items()}
        seconds_in_turn(pair, 5)
        times = seconds_in_turn(pair, 10 * rounds)
        results[case] = {"median": {name: statistics.median(t) for name, t in times.items()}}
    for case in CASES:
        steps = {name: stepper(case, world) for name, world in worlds.items()}
        losses = {name: [step() for _ in range(3)] for name, step in steps.items()}
        times = seconds_in_turn(steps, rounds if case.startswith("gpt") else 6 * rounds)
        results[case] = {"median": {name: statistics.median(t) for name, t in times.items()}, "losses": losses}
    if worlds["mpi"].rank == 0:
        Path(out).write_text(json.dumps(results))


def launch(ranks: int, rounds: int) -> dict[str, Any]:
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if mpirun is None:
        raise SystemExit("mpirun is not installed: pip install 'shardwright[mpi]'")
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "result.json")
        root = ["--allow-run-as-root"] if os.getuid() == 0 else []
        command = [mpirun, *root, "--map-by", ":oversubscribe", "--bind-to", "none", "-n", str(ranks), sys.executable]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, __file__, "--worker", out, "--rounds", str(rounds)], check=True, env=environment)
        found: dict[str, Any] = json.loads(Path(out).read_text())
        return found


def table(results: dict[int, Any]) -> str:
    lines = ["| what | ranks | MPI | gloo | gloo / MPI |", "|---|---|---|---|---|"]
    for ranks, cases in results.items():
        for case, found in cases.items():
            m = found["median"]
            lines.append(
                f"| {case} | {ranks} | {m['mpi'] * 1e3:.2f} ms | {m['gloo'] * 1e3:.2f} ms | {m['gloo'] / m['mpi']:.2f} |"
            )
    return "\n".join(lines)


def problems(results: dict[int, Any]) -> list[str]:
    found = []
    for ranks, cases in results.items():
        ratios = {case: c["median"]["gloo"] / c["median"]["mpi"] for case, c in cases.items()}
        for case, ratio in ratios.items():
            if case not in CASES and ratio < FASTER:
                found.append(f"{case} on {ranks} ranks: MPI is {ratio:.2f}x as fast as gloo, not {FASTER}x")
        mean = statistics.geometric_mean(ratios[case] for case in CASES)
        if mean < FASTER:
            found.append(f"steps on {ranks} ranks: MPI is {mean:.2f}x as fast as gloo, not {FASTER}x")
        for case in CASES:
            if cases[case]["losses"]["mpi"] != cases[case]["losses"]["gloo"]:
                found.append(f"{case} on {ranks}: other losses")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, nargs="*", default=[4])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--check", action="store_true", help="exit 1 where MPI is not as much faster as it should be")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.rounds, options.worker)
        return 0
    results = {ranks: launch(ranks, options.rounds) for ranks in options.ranks}
    print(table(results))
    missed = problems(results)
    print("\n".join(f"missed: {line}" for line in missed) or "all targets reached")
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
