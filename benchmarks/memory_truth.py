"""Predicted memory against measured: what ranks really need over a training step, for models and strategies.

    python benchmarks/memory_truth.py [--ranks 2 4] [--only NAME] [--check]

Starts gloo ranks on this machine. Every case trains for three steps of AdamW under torch's profiler, which sees each
allocation; the most that any rank had at a time, over the second and third step, is compared with the prediction from
the plan. The profiler sees the main thread only: so what a background thread does for moves under way is done by the main
thread here, when the next one starts, and gloo's threads are given a moment to let go of tensors first.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]

from models import GPT, MLP  # noqa: E402

import shardwright as sw  # noqa: E402
from shardwright.plan.memory import memory_of  # noqa: E402
from shardwright.world.distributed import backend, links, operations  # noqa: E402

WITHIN, SHARE = 0.05, 0.9


class CNN(nn.Module):
    """Three convolutions with batch norm and pooling, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 32, 3, 1, 1), nn.Conv2d(32, 64, 3, 1, 1), nn.Conv2d(64, 64, 3, 1, 1)
        self.bn1, self.bn2 = nn.BatchNorm2d(32), nn.BatchNorm2d(64)
        self.fc1, self.fc2 = nn.Linear(64 * 16, 512), nn.Linear(512, 10)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        x = F.avg_pool2d(F.relu(self.conv3(x)), 2)
        x = F.dropout(F.relu(self.fc1(x.flatten(1))), 0.1, self.training)
        return F.cross_entropy(self.fc2(x), target)


def llama() -> nn.Module:
    from llama import Config, Llama

    return Llama(Config(layers=2, dim=256, heads=8, kv_heads=4, hidden=704, vocabulary=1024))


def tokens(vocabulary: int, batch: int = 8, length: int = 128) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, vocabulary, (batch, length + 1), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def images(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator), torch.randint(0, 10, shape[:1], generator=generator)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "mlp": (MLP, lambda: images(512, 784)),
    "mlp, wide": (lambda: MLP((1024, 1536, 1536, 10)), lambda: images(64, 1024)),
    "gpt": (lambda: GPT(vocab=512, layers=2), lambda: tokens(512)),
    "cnn": (CNN, lambda: images(32, 3, 32, 32)),
    "llama": (llama, lambda: tokens(1024)),
}

COLUMNS = ("layers.0", "attention.q", "attention.k", "attention.v", "up", "query", "key", "value", "gate", "head", "fc1")
ROWS = ("layers.1", "proj", "down", "out", "fc2")
NORMS = ("ln1", "ln2", "norm1", "norm2")


def megatron(net: nn.Module, layout: Any) -> dict[str, Any]:
    """The first product of each pair by columns, the second by rows."""
    plan: dict[str, Any] = {}
    for name, _ in net.named_parameters():
        module, _, kind = name.rpartition(".")
        if module.endswith(COLUMNS):
            plan[name] = layout("tp", "None") if kind == "weight" else layout("tp")
        elif module.endswith(ROWS) and kind == "weight":
            plan[name] = layout("None", "tp")
    return plan


def sequence_parallel(net: nn.Module, layout: Any) -> dict[str, Any]:
    """Megatron's split, and norms on pieces of the sequence."""
    plan = megatron(net, layout)
    batch = "dp" if "dp" in layout.mesh.axes else "None"
    return plan | {n: {"in_strategy": (layout(batch, "tp", "None"),)} for n, _ in net.named_modules() if n.endswith(NORMS)}


def at_random(seed: int) -> Callable[[nn.Module, Any], dict[str, Any]]:
    """A random layout for half the parameters."""

    def strategies(net: nn.Module, layout: Any) -> dict[str, Any]:
        choose = random.Random(seed)
        plan: dict[str, Any] = {}
        for name, parameter in net.named_parameters():
            dims = ["None"] * parameter.ndim
            for axis in layout.mesh.axes:
                dim = choose.randrange(parameter.ndim)
                size = layout.mesh.axis_size(axis)
                if choose.random() < 0.5 and dims[dim] == "None" and parameter.shape[dim] % size == 0:
                    dims[dim] = axis
            if choose.random() < 0.5:
                plan[name] = layout(*dims)
        return plan

    return strategies


def recomputed(net: nn.Module) -> list[str]:
    """The layers of a model that has them."""
    return [n for n, m in net.named_modules() if n.rpartition(".")[2].isdigit() and len(list(m.children())) > 1]


STRATEGIES: dict[str, Callable[[nn.Module, Any], dict[str, Any]]] = {
    "data parallel": lambda net, layout: {},
    "tensor parallel": megatron,
    "tensor and sequence": sequence_parallel,
    "random 1": at_random(1),
    "random 2": at_random(2),
    "search": lambda net, layout: {},
    "optimizer parallel": lambda net, layout: {},
    "optimizer parallel, gathered again": lambda net, layout: {},
    "data parallel, recomputed": lambda net, layout: {},
    "tensor parallel, recomputed": megatron,
    "tensor and sequence, recomputed": sequence_parallel,
}


def cases(ranks: int) -> list[tuple[str, str]]:
    found = [(m, s) for m in MODELS for s in STRATEGIES]
    return [(m, s) for m, s in found if (not s.startswith("tensor and") and "recomp" not in s) or m in ("gpt", "llama")]


def prepared(name: str, strategy: str, ranks: int) -> tuple[nn.Module, Any]:
    torch.manual_seed(1)
    net = MODELS[name][0]()
    if strategy == "data parallel":
        return net, sw.AutoParallel(net, "data_parallel")
    if strategy == "search":
        return net, sw.AutoParallel(net, "auto")
    if strategy.startswith("optimizer parallel"):
        return net, sw.AutoParallel(net).hsdp(optimizer_level="level3" if strategy.endswith("again") else "level1")
    layout = sw.Layout((ranks,), ("tp",)) if ranks < 4 else sw.Layout((ranks // 2, 2), ("dp", "tp"))
    call = sw.AutoParallel(net).shard(STRATEGIES[strategy](net, layout))
    return net, call.recompute(recomputed(net)) if strategy.endswith("recomputed") else call


# -- measuring ---------------------------------------------------------------------------------------------------------


class Continued(operations._Continued):
    """What is under way, for whom :class:`MainThread` is not one more that holds it."""

    __slots__ = ("__weakref__",)


class MainThread:
    """Stands for the thread that ends what was started: the next that starts ends the one before."""

    def __init__(self) -> None:
        self.last: Callable[[], Continued | None] = lambda: None

    def put(self, handle: Continued) -> None:
        last, self.last = self.last(), weakref.ref(handle)
        if last is not None:
            last.advance()

    def close(self) -> None:
        self.last = lambda: None


def settled(make: Callable[..., Any]) -> Callable[..., Any]:
    """An algorithm of the backend that gives its threads time to let go of tensors, so that the main thread frees them."""

    def made(*args: Any) -> Any:
        algorithm = make(*args)

        def then_rest(run: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
            def rested(value: Any) -> Tensor:
                result = run(value)
                time.sleep(0.002)
                return result

            return rested

        return algorithm._replace(finish=then_rest(algorithm.finish), run=then_rest(algorithm.run))

    return made


def profiled(work: Callable[[Callable[[], None]], None]) -> list[tuple[int, int]]:
    """Time and bytes of everything that is allocated (freed: below 0) while ``work`` runs.

    Args:
        work: gets a function that leaves a mark.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work(_mark)
    events = profiler.profiler.kineto_results.events()
    return sorted(((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"), key=lambda e: e[0])


_MARK = 12_345_677  # bytes that nothing else has


def _mark() -> None:
    torch.empty(_MARK, dtype=torch.uint8)


def peak_between_marks(events: list[tuple[int, int]]) -> int:
    """The most bytes in use between the first mark and the second.

    >>> peak_between_marks([(0, 5), (1, _MARK), (2, -_MARK), (3, 7), (4, -7), (5, _MARK), (6, -_MARK), (7, 99)])
    12
    """
    total = peak = marks = 0
    for _, size in events:
        if abs(size) == _MARK:
            marks += size > 0
            continue
        total += size
        if marks == 1:
            peak = max(peak, total)
    return peak


def by_hand() -> None:
    """The measure itself, on an example that can be counted: x @ w keeps x; its backward makes gradients of both."""

    def work(mark: Callable[[], None]) -> None:
        x, w = torch.zeros(64, 1000), torch.zeros(1000, 8, requires_grad=True)
        mark()
        (x @ w).sum().backward()
        mark()

    got = peak_between_marks(profiled(work))
    # x, w, its gradient; the gradient of the product, made of that of the sum; the sum and its gradient
    expected = 4 * (64 * 1000 + 1000 * 8 + 1000 * 8 + 64 * 8 + 1 + 1)
    assert got == expected, (got, expected)


def train(
    prepare: Callable[[], tuple[nn.Module, Any]],
    inputs: Callable[[], tuple[Tensor, ...]],
    optimize: Callable[[nn.Module], torch.optim.Optimizer],
    after: Callable[[Any], None],
    world: Any,
) -> list[tuple[int, int]]:
    """Three steps, with marks round the last two; returns what :func:`profiled` does.

    Args:
        prepare: makes a module and what is called for a loss.
        after: gets what was called, when it is over.
    """
    gc.collect()
    world._groups.scratch._kept = None  # an earlier case's

    def work(mark: Callable[[], None]) -> None:
        net, call = prepare()
        batch = inputs()
        if isinstance(call, sw.AutoParallel):
            call.compile(*batch)  # replaces the parameters
        optimizer = optimize(net)
        for number in range(3):
            if number == 1:
                gc.collect()
                mark()
            loss = call(*batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            del loss
        mark()
        after(call)

    return profiled(work)


def measure(name: str, strategy: str, world: Any) -> dict[str, Any]:
    """One case on this rank: what it needed, what was predicted, how long the prediction took."""
    found: dict[str, Any] = {}

    def predict(call: Any) -> None:
        began = time.process_time()
        timeline = memory_of(call.plan, "adamw")
        found.update(
            predicted=timeline.peak, at=timeline.at, parts=dict(timeline.parts), guessed=timeline.guessed,
            seconds=time.process_time() - began,
        )  # fmt: skip

    def adamw(net: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(net.parameters(), 1e-3)

    events = train(lambda: prepared(name, strategy, world.size), MODELS[name][1], adamw, predict, world)
    if os.environ.get("EVENTS"):
        Path(f"{os.environ['EVENTS']}.{world.rank}").write_text(json.dumps(events))
    return found | {"measured": peak_between_marks(events)}


def watch_this_thread() -> None:
    """Has this thread do what others would, from now on: the profiler sees what is allocated and freed here only."""
    links._Later, operations._Continued = MainThread, Continued
    backend._backend_algorithm = settled(backend._backend_algorithm)


def worker(out: str, only: str) -> None:
    """One rank: all cases in turn."""
    torch.set_num_threads(1)
    watch_this_thread()
    world = sw.init()
    by_hand()
    results = []
    for name, strategy in cases(world.size):
        if only in f"{name}, {strategy}":
            mine = measure(name, strategy, world)
            everyone: list[Any] = [None] * world.size
            torch.distributed.all_gather_object(everyone, mine["measured"])
            results.append({"case": f"{name}, {strategy}", "ranks": world.size, **mine, "measured": everyone})
    if world.rank == 0:
        Path(out).write_text(json.dumps(results))


def run(ranks: int, only: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [*launcher, __file__, "--worker", str(out), "--only", only]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600)
        found: list[dict[str, Any]] = json.loads(out.read_text())
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--check", action="store_true", help="fail if fewer than 90 %% are within 5 %%")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.only)
        return 0
    results = [r for ranks in arguments.ranks for r in run(ranks, arguments.only)]
    print(f"{'ranks':>5}  {'case':34} {'measured':>10} {'predicted':>10} {'off':>7}  highest at")
    good = 0
    for r in results:
        measured, predicted = max(r["measured"]), r["predicted"]
        off = predicted / measured - 1
        good += abs(off) <= WITHIN
        guessed = f", guessed {r['guessed']}" if r["guessed"] else ""
        print(
            f"{r['ranks']:5}  {r['case']:34} {measured / 1e6:8.2f}MB {predicted / 1e6:8.2f}MB {off:+7.1%}  "
            f"{' '.join(r['at'])}{guessed}"
        )
    share = good / len(results)
    print(f"{good} of {len(results)} within {WITHIN:.0%}: {share:.0%}")
    return int(arguments.check and share < SHARE)


if __name__ == "__main__":
    sys.exit(main())
