"""Time to plan: a Llama-3-8B training step on meshes of up to 16,384 devices, on this machine alone.

    python benchmarks/planning.py [--check]

Each case runs in a process of its own, so that memory is its own and nothing is remembered from another. Times are those
of building the model on the meta device, capturing its graph, and planning: *build* writes the problem, *solve* solves it,
and *all* is everything from the model to the plan, the layout of every one of its operators written out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent / "examples"

# (size, layers, mesh, mode)
MESHES = [(8,), (8, 8), (32, 8), (2, 8, 8)]
FLAT = [(2, 4), (8, 8), (64, 8), (2048, 8)]
# meta-pytorch/autoparallel on 8·8, on a machine like this one: build, solve, all with capture, GiB
PEER = {"build and solve": 168 + 159, "all": 366, "GiB": 6.4}
REPEATS, ROUNDS = 9, 4


def one(size: str, layers: int | None, mesh: tuple[int, ...], mode: str, repeats: int) -> dict[str, float]:
    """Plans one case, ``repeats`` times after the first."""
    import math
    import resource
    import time

    sys.path.insert(0, str(EXAMPLES))
    import torch

    import llama
    from shardwright.capture.repeated import capture_repeated
    from shardwright.plan.modes.search import SearchPlanner
    from shardwright.plan.request import PlanRequest

    started = time.perf_counter()
    model, inputs = llama.build(size, layers), llama.inputs(batch=128, sequence=4096, size=size)
    built = time.perf_counter()
    graph = capture_repeated(model, inputs, {}, torch.device("cpu"), {})
    captured = time.perf_counter()
    request = PlanRequest(math.prod(mesh), mode=mode, mesh=mesh, machine="h100")
    plans = [SearchPlanner(graph, request).plan()]
    planned = time.perf_counter()
    plans += [SearchPlanner(graph, request).plan() for _ in range(repeats)]
    searches = [plan.search for plan in plans if plan.search is not None]
    return {
        "model": built - started,
        "capture": captured - built,
        "first plan": planned - captured,
        "all": planned - started,
        "build": searches[0].building,
        "solve": searches[0].solving,
        # the least of several: what the work takes, without what else the machine was doing
        "build and solve again": min(s.building + s.solving for s in searches[1:] or searches),
        "plan again": min(s.planning for s in searches[1:] or searches),
        "GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "nodes": len(graph.nodes),
        "seconds a step": searches[0].seconds,
        "gap": searches[0].gap,
    }


def apart(size: str, layers: int | None, mesh: tuple[int, ...], mode: str, repeats: int = 0) -> dict[str, float]:
    """One case in a process of its own."""
    case = json.dumps([size, layers, mesh, mode, repeats])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--case", case], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        raise SystemExit(f"{case} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def table(rows: list[tuple[str, dict[str, float]]]) -> None:
    columns = ("nodes", "model", "capture", "first plan", "build", "solve", "plan again", "all", "GiB", "gap")
    print(f"{'':34}" + "".join(f"{c:>12}" for c in columns))
    for name, row in rows:
        print(f"{name:34}" + "".join(f"{row[c]:>12.0f}" if c == "nodes" else f"{row[c]:>12.3f}" for c in columns))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        size, layers, mesh, mode, repeats = json.loads(options.case)
        print(json.dumps(one(size, layers, tuple(mesh), mode, repeats)))
        return 0
    missed: list[str] = []

    def reached(what: str, value: float, limit: float) -> None:
        fine = value <= limit
        print(f"  {'reached' if fine else 'MISSED '}  {what}: {value:.3g}, at most {limit:g}")
        if not fine:
            missed.append(what)

    rows = [(f"8B on {'·'.join(map(str, m))}, {mode}", apart("8b", None, m, mode)) for mode in ("auto", "recursive_programming")
            for m in MESHES]  # fmt: skip
    table(rows)
    for name, row in rows:
        if "recursive" in name:
            reached(f"{name}: build and solve", row["first plan"], 0.3)
        else:
            reached(f"{name}: build and solve", row["first plan"], 5.0 if "2·8·8" in name else 2.0)
            reached(f"{name}: all with capture", row["all"], 10.0)
            reached(f"{name}: GiB", row["GiB"], 1.5)
    print(f"  the peer on 8·8: {PEER['build and solve']} s to build and solve, {PEER['all']} s in all, {PEER['GiB']} GiB")

    turns = [[apart("8b", None, m, "auto", REPEATS) for m in FLAT] for _ in range(ROUNDS)]
    # the least of several: what else the machine does only adds
    flat = [(f"8B on {'·'.join(map(str, m))}", {key: min(row[key] for row in rows) for key in rows[0]})
            for m, rows in zip(FLAT, zip(*turns))]  # fmt: skip
    table(flat)
    times = [row["build and solve again"] for _, row in flat]
    reached("8 to 16,384 devices, build and solve, slowest over 8 devices", max(times) / times[0], 1.1)

    deep = [(f"8B of {layers} layers on 8·8", apart("8b", layers, (8, 8), "auto", REPEATS)) for layers in (32, 1000)]
    table(deep)
    reached(
        "1,000 layers over 32, build and solve", deep[1][1]["build and solve again"] / deep[0][1]["build and solve again"], 1.3
    )
    print(f"  with every layer's layouts written out: {deep[1][1]['plan again'] / deep[0][1]['plan again']:.1f} times")

    large = apart("405b", None, (256, 8, 8), "auto")
    table([("405B on 16,384, 256·8·8", large)])
    reached("405B on 16,384 devices: all", large["all"], 15.0)
    reached("405B on 16,384 devices: GiB", large["GiB"], 1.5)
    print(f"{len(missed)} targets missed" if missed else "all targets reached")
    return 1 if missed and options.check else 0


if __name__ == "__main__":
    raise SystemExit(main())
