"""Step time: ours, hand-written and DTensor, for the same strategy, interleaved in one run.

    python benchmarks/step_time.py [--ranks 2 4] [--rounds 15] [--check] [--write docs/performance.md]

Starts gloo ranks on this machine, one thread each. Every variant trains its own copy of the same model; the variants
take turns step by step, the median of each is quoted and only ratios of medians are judged.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from models import GPT, MLP, Feedforward, tensor_parallel_gpt_plan  # noqa: E402
from peers import Parallel, dtensor, hand_written  # noqa: E402
from turns import seconds_in_turn  # noqa: E402

import shardwright as sw  # noqa: E402

CASES = ("mlp batch 32", "mlp batch 1024", "feedforward d=256", "gpt 4 layers d=256")
LIMITS = {"hand-written": 1.05, "feedforward d=256": 1.9}


def batch(case: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    if case.startswith("mlp"):
        n = int(case.split()[-1])
        return torch.randn(n, 784, generator=generator), torch.randint(0, 10, (n,), generator=generator)
    if case.startswith("feedforward"):
        return (torch.randn(32, 256, generator=generator),)
    ids = torch.randint(0, 256, (8, 129), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def model(case: str) -> nn.Module:
    torch.manual_seed(1)
    return MLP() if case.startswith("mlp") else Feedforward(256) if case.startswith("feed") else GPT()


def ours(net: nn.Module, inputs: tuple[torch.Tensor, ...], ranks: int) -> Parallel:
    layout = sw.Layout((ranks,), ("tp",))
    whole = tuple(layout(*["None"] * t.ndim) for t in inputs)
    if isinstance(net, GPT):
        plan = {name: layout(*axes) for name, axes in tensor_parallel_gpt_plan().items()}
        for block in net.blocks:
            sw.shard(block, (layout("None", "None", "None"),), parameter_plan=plan)
    else:
        names = ("layers.0", "layers.1") if isinstance(net, MLP) else ("up", "down")
        plan = {f"{names[0]}.weight": layout("tp", "None"), f"{names[1]}.weight": layout("None", "tp")}
        sw.shard(net, whole, parameter_plan=plan)
    return net, sw.AutoParallel(net).dataset_strategy(whole)


VARIANTS: dict[str, Callable[..., Parallel]] = {
    "shardwright": ours,
    "hand-written": lambda net, inputs, ranks: hand_written(net),
    "DTensor": lambda net, inputs, ranks: dtensor(net),
}


def stepper(case: str, variant: str, ranks: int) -> Callable[[], float]:
    inputs = batch(case)
    net, call = VARIANTS[variant](model(case), inputs, ranks)
    optimizer: list[torch.optim.Optimizer] = []

    def step() -> float:
        loss = call(*inputs)
        if not optimizer:  # the first call may have replaced the parameters
            optimizer.append(torch.optim.SGD(net.parameters(), 1e-2))
        optimizer[0].zero_grad()
        loss.backward()
        optimizer[0].step()
        return float(loss.detach())

    return step


def worker(rounds: int, out: str) -> None:
    """One rank: all cases, all variants in turn."""
    torch.set_num_threads(1)
    world = sw.init()
    results: dict[str, Any] = {}
    for case in CASES:
        steps = {variant: stepper(case, variant, world.size) for variant in VARIANTS}
        losses = {variant: [step() for _ in range(3)] for variant, step in steps.items()}
        times = seconds_in_turn(steps, rounds if case.startswith("gpt") else 6 * rounds)
        results[case] = {
            "median": {v: statistics.median(t) for v, t in times.items()},
            "losses": losses,
        }
    if world.rank == 0:
        Path(out).write_text(json.dumps(results))


def simulated(rounds: int) -> dict[str, float]:
    """Eight simulated ranks against the plain single device, in this process."""
    torch.set_num_threads(1)
    sw.init(devices=8)
    ratios = {}
    for case in CASES:
        if case.startswith("feed"):
            continue
        inputs, single = batch(case), model(case)
        net, call = ours(model(case), inputs, 8)
        pairs = {"parallel": (net, call), "single": (single, single)}
        times: dict[str, list[float]] = {name: [] for name in pairs}
        optimizers = {name: torch.optim.SGD(m.parameters(), 1e-2) for name, (m, _) in pairs.items()}
        for turn in range(rounds + 2):
            for name, (_, run) in pairs.items():
                start = time.perf_counter()
                optimizers[name].zero_grad()
                run(*inputs).backward()
                optimizers[name].step()
                if turn >= 2:
                    times[name].append(time.perf_counter() - start)
        ratios[case] = statistics.median(times["parallel"]) / statistics.median(times["single"])
    return ratios


def launch(ranks: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "result.json")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, __file__, "--worker", out, "--rounds", str(rounds)], check=True, env=environment)
        found: dict[str, Any] = json.loads(Path(out).read_text())
        return found


def table(results: dict[int, Any], simulation: dict[str, float]) -> str:
    lines = ["| model | ranks | ours | hand-written | DTensor | ours / hand-written | DTensor / ours |"]
    lines.append("|---|---|---|---|---|---|---|")
    for ranks, cases in results.items():
        for case, found in cases.items():
            m = found["median"]
            cells = " | ".join(f"{m[v] * 1e3:.2f} ms" for v in VARIANTS)
            lines.append(
                f"| {case} | {ranks} | {cells} | {m['shardwright'] / m['hand-written']:.2f} | "
                f"{m['DTensor'] / m['shardwright']:.2f} |"
            )
    lines += ["", "| model | 8 simulated ranks / single device |", "|---|---|"]
    return "\n".join([*lines, *(f"| {case} | {ratio:.2f} |" for case, ratio in simulation.items())])


def problems(results: dict[int, Any], simulation: dict[str, float]) -> list[str]:
    found = []
    for ranks, cases in results.items():
        for case, result in cases.items():
            m, losses = result["median"], result["losses"]
            if m["shardwright"] > LIMITS["hand-written"] * m["hand-written"]:
                found.append(f"{case} on {ranks}: {m['shardwright'] / m['hand-written']:.2f}x hand-written")
            needed = LIMITS.get(case, 1.0) if ranks == 2 else 1.0
            if m["DTensor"] < needed * m["shardwright"]:
                found.append(f"{case} on {ranks}: DTensor / ours is {m['DTensor'] / m['shardwright']:.2f}, not {needed}")
            for variant in VARIANTS:
                if any(abs(a - b) > 1e-4 * abs(b) for a, b in zip(losses[variant], losses["hand-written"], strict=True)):
                    found.append(f"{case} on {ranks}: {variant} has other losses than hand-written")
    return found + [f"{case}: simulation {ratio:.2f}x" for case, ratio in simulation.items() if ratio > 2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.rounds, options.worker)
        return 0
    results = {ranks: launch(ranks, options.rounds) for ranks in options.ranks}
    simulation = simulated(options.rounds)
    print(table(results, simulation))
    missed = problems(results, simulation)
    print("\n".join(f"missed: {line}" for line in missed) or "all targets reached")
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
