"""What compile=True gains: the local program as it is, compiled, and DDP with torch.compile, interleaved in one run.

    python benchmarks/compile_gain.py [--ranks 2] [--rounds 15] [--check]

Starts gloo ranks on this machine, one thread each. Every variant trains its own copy of the same model; the variants take
turns step by step, and only ratios of medians are quoted. The first steps, in which functions are compiled, do not count;
how long compiling takes is told apart, for models of 2 and of 12 equal layers, with nothing in the disk cache.
"""

from __future__ import annotations

import argparse
import json
import logging
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
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from models import GPT, tensor_parallel_gpt_plan  # noqa: E402
from turns import seconds_in_turn  # noqa: E402

import shardwright as sw  # noqa: E402


class Elementwise(nn.Module):
    """Gated residual blocks, nearly all of whose work is elementwise; returns the loss."""

    def __init__(self, d: int = 512, layers: int = 4):
        super().__init__()
        self.scales = nn.ParameterList(nn.Parameter(torch.rand(5, d) / 5) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(layers))
        self.head = nn.Linear(d, 16)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        for scale, norm in zip(self.scales, self.norms, strict=True):
            a, b, c, e, f = scale.unbind(0)
            gate = torch.sigmoid(x * a + b)
            x = norm(x + gate * F.gelu(x * c + e) - torch.tanh(x * f) * (1 - gate))
        return F.cross_entropy(self.head(x), target)


CASES = ("gpt, data parallel", "gpt, tensor parallel", "elementwise, data parallel")
VARIANTS = ("eager", "compiled", "DDP + torch.compile")
# What is reached at least: eager / compiled, and DDP + torch.compile / compiled. Products of matrices, which nothing fuses,
# are most of what a GPT computes on a CPU.
LIMITS = {
    "gpt, data parallel": (0.95, 0.85),
    "gpt, tensor parallel": (0.9, None),
    "elementwise, data parallel": (1.4, 0.8),
}
COMPILE_LIMIT = 1.5  # seconds to compile 12 layers against 2


def model(case: str) -> nn.Module:
    torch.manual_seed(1)
    return GPT() if case.startswith("gpt") else Elementwise()


def batch(case: str) -> tuple[Tensor, ...]:
    """The whole batch."""
    generator = torch.Generator().manual_seed(0)
    if case.startswith("elementwise"):
        return torch.randn(2048, 512, generator=generator), torch.randint(0, 16, (2048,), generator=generator)
    ids = torch.randint(0, 256, (8, 129), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def prepared(case: str, variant: str) -> tuple[nn.Module, Callable[..., Any], tuple[Tensor, ...]]:
    """The module, what to call, and what this rank hands in."""
    net, inputs = model(case), batch(case)
    if case.endswith("tensor parallel"):
        layout = sw.Layout((dist.get_world_size(),), ("tp",))
        plan = {name: layout(*axes) for name, axes in tensor_parallel_gpt_plan().items()}
        for block in net.blocks:
            sw.shard(block, (layout("None", "None", "None"),), parameter_plan=plan)
        whole = tuple(layout(*["None"] * t.ndim) for t in inputs)
        return net, sw.AutoParallel(net, compile=variant == "compiled").dataset_strategy(whole), inputs
    own = tuple(t.chunk(dist.get_world_size())[dist.get_rank()] for t in inputs)
    if variant.startswith("DDP"):
        return net, torch.compile(nn.parallel.DistributedDataParallel(net)), own
    call = sw.AutoParallel(net, "data_parallel", compile=variant == "compiled").dataset_strategy("data_parallel")
    return net, call, own


def stepper(case: str, variant: str) -> tuple[nn.Module, Callable[[], None]]:
    net, call, inputs = prepared(case, variant)
    optimizer: list[torch.optim.Optimizer] = []

    def step() -> None:
        loss = call(*inputs)
        if not optimizer:  # the first call may have replaced the parameters
            optimizer.append(torch.optim.SGD(net.parameters(), 1e-2))
        optimizer[0].zero_grad()
        loss.backward()
        optimizer[0].step()

    return net, step


def variants_of(case: str) -> tuple[str, ...]:
    return VARIANTS[:2] if case.endswith("tensor parallel") else VARIANTS


def worker(rounds: int, out: str) -> None:
    """One rank: all cases, all variants in turn."""
    torch.set_num_threads(1)
    world = sw.init()
    results: dict[str, Any] = {}
    for case in CASES:
        names = list(variants_of(case))
        steps = {variant: stepper(case, variant) for variant in names}
        for _, step in steps.values():
            for _ in range(3):
                step()
        times = seconds_in_turn({variant: step for variant, (_, step) in steps.items()}, rounds)
        weights = {v: [sw.full_value(p).detach().clone() for p in net.parameters()] for v, (net, _) in steps.items()}
        differs = max(float((a - b).abs().max()) for v in names[1:] for a, b in zip(weights[names[0]], weights[v], strict=True))
        results[case] = {"median": {v: statistics.median(t) for v, t in times.items()}, "differs": differs}
    if world.rank == 0:
        Path(out).write_text(json.dumps(results))


def compile_worker(layers: int, out: str) -> None:
    """Seconds until the first step of a GPT is done, less those of the second, on two simulated ranks."""
    torch.set_num_threads(1)
    sw.init(devices=2)
    net = sw.AutoParallel(GPT(layers=layers, d=128, heads=4), "data_parallel", compile=True)
    inputs = batch("gpt")
    net.compile(*inputs)
    times = []
    for _ in range(2):
        start = time.perf_counter()
        net(*inputs).backward()
        times.append(time.perf_counter() - start)
    compiler = net.settings.compiler
    assert compiler is not None
    Path(out).write_text(json.dumps([times[0] - times[1], len(compiler.functions.known)]))


def launch(*arguments: str, ranks: int = 1) -> Any:
    """Runs this file on ranks, with an empty disk cache; returns what it writes."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "result.json")
        job = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "cache")}
        subprocess.run([sys.executable, *job, __file__, "--out", out, *arguments], check=True, env=environment)
        return json.loads(Path(out).read_text())


def table(results: dict[int, Any], compiling: dict[int, Any]) -> str:
    lines = ["| model | ranks | eager / compiled | (DDP + torch.compile) / compiled |", "|---|---|---|---|"]
    for ranks, cases in results.items():
        for case, found in cases.items():
            m = found["median"]
            ddp = f"{m[VARIANTS[2]] / m['compiled']:.2f}" if VARIANTS[2] in m else "–"
            lines.append(f"| {case} | {ranks} | {m['eager'] / m['compiled']:.2f} | {ddp} |")
    lines += ["", "| GPT of 12 layers / of 2 layers | |", "|---|---|"]
    (few, few_count), (many, many_count) = compiling[2], compiling[12]
    lines.append(f"| time to compile | {many / few:.2f} |")
    lines.append(f"| functions compiled | {many_count} / {few_count} |")
    return "\n".join(lines)


def problems(results: dict[int, Any], compiling: dict[int, Any]) -> list[str]:
    found = []
    for ranks, cases in results.items():
        for case, result in cases.items():
            m, (eager, ddp) = result["median"], LIMITS[case]
            if m["eager"] < eager * m["compiled"]:
                found.append(f"{case} on {ranks}: eager / compiled is {m['eager'] / m['compiled']:.2f}, not {eager}")
            if ddp is not None and m[VARIANTS[2]] < ddp * m["compiled"]:
                found.append(
                    f"{case} on {ranks}: DDP + torch.compile / compiled is {m[VARIANTS[2]] / m['compiled']:.2f}, not {ddp}"
                )
            if result["differs"] > 1e-4:
                found.append(f"{case} on {ranks}: weights differ by {result['differs']:.1e} after training")
    ratio = compiling[12][0] / compiling[2][0]
    return found + ([f"12 layers take {ratio:.2f} times as long to compile as 2"] if ratio > COMPILE_LIMIT else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    parser.add_argument("--out", help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out:
        logging.basicConfig(level=logging.WARNING)
        compile_worker(options.layers, options.out) if options.layers else worker(options.rounds, options.out)
        return 0
    results = {n: launch("--rounds", str(options.rounds), ranks=n) for n in options.ranks}
    compiling = {layers: launch("--layers", str(layers)) for layers in (2, 12)}
    print(table(results, compiling))
    missed = problems(results, compiling)
    print("\n".join(f"missed: {line}" for line in missed) or "all targets reached")
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
