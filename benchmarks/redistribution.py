"""Redistribution: what ours moves and how long it takes, against DTensor and against the least that can move.

    python benchmarks/redistribution.py [--quick] [--full] [--helped] [--part plans clock] [--check] [--write [PAGE]]

Two parts:

- **Plans.** Every ordered pair of layouts of a 3-D tensor in which each axis splits one dim or none, on six meshes. Counted
  are the elements that ranks receive, over all ranks, against the least: what each rank's target piece has that its source
  piece has not. The least, and every piece that DTensor's steps go through, come from this file's own arithmetic.
- **Clock.** The same pairs on four gloo ranks, one thread each, against ``DTensor.redistribute``. The variants take turns,
  with a barrier before each; the lower quartile of each rank's times, averaged over ranks, is compared. Pairs that look
  slower than DTensor are measured for longer, and once more at the end.

DTensor is counted as the plan that it makes: on the CPU it runs an all-to-all as an all-gather, which moves more. The
rows "DTensor on the CPU" count that, and the clock measures it. ``--helped`` adds a DTensor to the clock that has the
all-to-all, a flattened mesh and its min-cost planner, none of which it has by default.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import itertools
import json
import logging
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, placement_types
from torch.distributed.tensor import _redistribute as planner
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from turns import seconds_in_turn

import shardwright as sw
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.redistribute.steps import redistribution

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- benchmarks/redistribution.py: begin -->", "<!-- benchmarks/redistribution.py: end -->"

LIMITS = {"peak": 1.05, "cold ms": 5.0, "cached µs": 20.0, "geomean": 3.0, "swaps": 8.0, "slower": 1.05}

MESHES = ((8,), (2, 4), (4, 4), (2, 2, 2), (2, 2, 4), (3, 2))
SHAPES = ((48, 48, 48), (41, 50, 53))  # even and uneven, of about one size: a planner that weighs latency needs that
TINY = (7, 10, 13)  # ours only: pieces of a few elements, and empty ones
CLOCK_MESHES = ((4,), (2, 2))
CLOCK_SHAPES = {"256 KB": (64, 32, 32), "1 MB": (64, 64, 64), "4 MB": (128, 128, 64), "16 MB": (256, 128, 128)}
SECONDS = {"256 KB": 0.12, "1 MB": 0.15, "4 MB": 0.3, "16 MB": 1.0}  # of turns for a pair, before any more rounds
LARGE = ("4 MB", "16 MB")
PLANNERS = {"DTensor": False, "DTensor, min-cost": True}  # what it uses by default, and the other; whether that is min-cost

Shape = tuple[int, ...]
Box = tuple[tuple[int, int], ...]
Dims = tuple[tuple[int, ...], ...]  # of every dim, the mesh axes that split it, by number
Places = tuple[int | None, ...]  # of every mesh axis, the dim it splits


# -- layouts, by arithmetic of our own -----------------------------------------------------------------------------------


def all_places(axes: int, ndim: int = 3) -> list[Places]:
    return list(itertools.product((None, *range(ndim)), repeat=axes))


def all_pairs(sizes: Shape) -> list[tuple[Places, Places]]:
    return list(itertools.permutations(all_places(len(sizes)), 2))


def dims_of(places: Places, ndim: int = 3) -> Dims:
    """The axes of every dim, in the order of the mesh, as DTensor has them."""
    return tuple(tuple(a for a, p in enumerate(places) if p == dim) for dim in range(ndim))


def text(places: Places) -> str:
    return ",".join("R" if p is None else f"S{p}" for p in places)


@functools.cache
def boxes(sizes: Shape, dims: Dims, shape: Shape) -> tuple[Box, ...]:
    """What each rank holds: (start, stop) of every dim, cut as ``torch.chunk`` cuts, one axis after the other."""
    found = []
    for coordinates in itertools.product(*map(range, sizes)):
        box = []
        for size, axes in zip(shape, dims, strict=True):
            start, stop = 0, size
            for axis in axes:
                step = -(-(stop - start) // sizes[axis])
                start, stop = (min(start + step * (coordinates[axis] + i), stop) for i in (0, 1))
            box.append((start, stop))
        found.append(tuple(box))
    return tuple(found)


def volume(box: Box) -> int:
    return math.prod(b - a for a, b in box)


def common(one: Box, other: Box) -> int:
    """Number of elements that two boxes share."""
    count = 1
    for (a, b), (c, d) in zip(one, other, strict=True):
        count *= max(0, min(b, d) - max(a, c))
    return count


def least(sizes: Shape, source: Places, target: Places, shape: Shape) -> int:
    """Elements that must move: over all ranks, what the target piece has and the source piece has not."""
    have, want = (boxes(sizes, dims_of(p), shape) for p in (source, target))
    return sum(volume(w) - common(w, h) for h, w in zip(have, want, strict=True))


def layouts(sizes: Shape, source: Places, target: Places) -> tuple[Layout, Layout]:
    """Ours, on a mesh object of their own, so that nothing is remembered with it."""
    mesh = Mesh(tuple(f"a{i}" for i in range(len(sizes))), sizes)
    one, other = (Layout.of(mesh, [[f"a{a}" for a in axes] for axes in dims_of(p)]) for p in (source, target))
    return one, other


# -- plans: what is received ---------------------------------------------------------------------------------------------


class Tally(NamedTuple):
    """Elements received, over all ranks; collectives; elements of the largest tensor that a step leaves on a rank."""

    received: int
    collectives: int
    largest: int


def received_by_step(step: Any, shape: Shape) -> int:
    """Elements that ranks receive in one of our steps. Asserts that its group has what each rank of it lacks."""
    have, want = step.source.bounds(shape), step.target.bounds(shape)
    if step.kind == "slice":
        assert all(common(want[r], have[r]) == volume(want[r]) for r in want), step
        return 0
    total = 0
    for group in step.groups:
        n, parts = len(group), {have[r] for r in group}
        for rank in group:
            if step.kind == "all_reduce":
                total += -(-2 * (n - 1) * volume(want[rank]) // n)
            elif step.kind == "reduce_scatter":
                total += (n - 1) * volume(want[rank])
            else:
                found = sum(common(want[rank], part) for part in parts)  # pieces that differ have nothing in common
                assert found == volume(want[rank]), f"{step}: rank {rank} cannot get all it lacks from {group}"
                total += volume(want[rank]) - common(want[rank], have[rank])
    outside = set(want).difference(*step.groups)
    assert all(common(want[r], have[r]) == volume(want[r]) for r in outside), step
    return total


def tally_ours(sizes: Shape, source: Places, target: Places, shape: Shape) -> Tally:
    ends = layouts(sizes, source, target)
    steps = redistribution(*ends, shape).forward
    for layout, places in zip(ends, (source, target), strict=True):
        assert tuple(layout.bounds(shape).values()) == boxes(sizes, dims_of(places), shape), (layout, places)
    chain = [ends[0].bounds(shape), *(s.target.bounds(shape) for s in steps)]
    assert [s.source.bounds(shape) for s in steps] == chain[:-1], steps
    assert chain[-1] == ends[1].bounds(shape), steps
    largest = max((volume(b) for bounds in chain for b in bounds.values()), default=0)
    collectives = sum(s.kind != "slice" and any(len(g) > 1 for g in s.groups) for s in steps)
    return Tally(sum(received_by_step(s, shape) for s in steps), collectives, largest)


def tally_dtensor(infos: Sequence[Any], sizes: Shape, source: Places, target: Places, shape: Shape, cpu: bool) -> Tally:
    """The same for DTensor's transforms; an even piece of each padded tensor travels, as in its collectives.

    Args:
        cpu: count an all-to-all as the all-gather that the CPU runs in its place.
    """
    axes_of = [list(axes) for axes in dims_of(source)]
    now = boxes(sizes, dims_of(source), shape)
    received, collectives, largest = 0, 0, max(map(volume, now))
    for info in infos:
        axis, (before, after) = info.mesh_dim, info.src_dst_placements
        n, gathered = sizes[axis], now
        if before.is_shard():
            assert axes_of[before.dim].pop() == axis, "DTensor gathers an axis that is not the last of its dim"
            gathered = boxes(sizes, tuple(map(tuple, axes_of)), shape)
        if after.is_shard():
            axes_of[after.dim].append(axis)
        then = boxes(sizes, tuple(map(tuple, axes_of)), shape)
        if before.is_shard():
            collectives += 1
            for box in gathered:
                extent = [b - a for a, b in box]
                extent[before.dim] = -(-extent[before.dim] // n)  # what each sends, padded
                if after.is_shard():
                    extent[after.dim] = -(-extent[after.dim] // n) * (n if cpu else 1)
                received += (n - 1) * math.prod(extent)
            if cpu:
                largest = max(largest, *map(volume, gathered))
        now = then
        largest = max(largest, *map(volume, now))
    assert now == boxes(sizes, dims_of(target), shape), "DTensor's plan does not end at the target"
    return Tally(received, collectives, largest)


# -- plans: DTensor's ----------------------------------------------------------------------------------------------------


def placements(places: Places) -> tuple[Any, ...]:
    return tuple(Replicate() if p is None else Shard(p) for p in places)


@contextlib.contextmanager
def fake_mesh(sizes: Shape) -> Iterator[DeviceMesh]:
    """A DeviceMesh of one process that stands for them all."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=math.prod(sizes), store=FakeStore())
    try:
        yield init_device_mesh("cpu", sizes)
    finally:
        dist.destroy_process_group()


def specs(mesh: DeviceMesh, source: Places, target: Places, shape: Shape) -> tuple[Any, Any]:
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    meta = TensorMeta(torch.Size(shape), strides, torch.float32)
    one, other = (DTensorSpec(mesh, placements(p), tensor_meta=meta) for p in (source, target))
    return one, other


def transforms(ends: tuple[Any, Any], min_cost: bool) -> list[Any]:
    """The transforms that ``DTensor.redistribute`` runs: by its greedy planner, which it uses, or its min-cost one."""
    found = planner._gen_transform_infos_non_cached(*ends, use_graph_based_transform=min_cost)
    return planner._optimize_transform_infos(found, ends[0].mesh, ends[0].placements, ends[1].placements)


@contextlib.contextmanager
def remembered_neighbours() -> Iterator[None]:
    """Lets the min-cost planner remember the neighbours of a state: the same plans, soon enough to count them all."""
    plain = planner.DTensorRedistributePlanner.get_next_state
    planner.DTensorRedistributePlanner.get_next_state = functools.lru_cache(maxsize=None)(plain)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        planner.DTensorRedistributePlanner.get_next_state = plain  # type: ignore[method-assign]
        planner.clear_redistribute_planner_cache()


# -- plans: the comparison -----------------------------------------------------------------------------------------------


def summary(tallies: Sequence[Tally], bounds: Sequence[int], ends: Sequence[int]) -> dict[str, float]:
    ratios = [t.received / b for t, b in zip(tallies, bounds, strict=True) if b]
    exact = sum(t.received == b for t, b in zip(tallies, bounds, strict=True))
    return {
        "pairs": len(tallies),
        "at bound": exact / len(tallies),
        "sum": sum(t.received for t in tallies) / sum(bounds),
        "mean": statistics.fmean(ratios),
        "geomean": statistics.geometric_mean(ratios),
        "worst": max(ratios),
        "for nothing": sum(b == 0 and t.received > 0 for t, b in zip(tallies, bounds, strict=True)),
        "collectives": statistics.fmean(t.collectives for t in tallies),
        "peak": max(t.largest / e for t, e in zip(tallies, ends, strict=True)),
    }


def compare_plans(sizes: Shape, shape: Shape, with_dtensor: bool = True) -> dict[str, dict[str, float]]:
    pairs = all_pairs(sizes)
    bounds = [least(sizes, s, t, shape) for s, t in pairs]
    ends = [max(volume(b) for p in pair for b in boxes(sizes, dims_of(p), shape)) for pair in pairs]
    tallies: dict[str, list[Tally]] = {"ours": [tally_ours(sizes, s, t, shape) for s, t in pairs]}
    with fake_mesh(sizes) as mesh, remembered_neighbours():
        for name, min_cost in PLANNERS.items() if with_dtensor else ():
            plans = [transforms(specs(mesh, s, t, shape), min_cost) for s, t in pairs]
            for label, cpu in ((name, False), (f"{name}, on the CPU", True)):
                found = [tally_dtensor(plan, sizes, s, t, shape, cpu) for plan, (s, t) in zip(plans, pairs, strict=True)]
                tallies[label] = found
    tallies.pop("DTensor, min-cost, on the CPU", None)
    return {name: summary(found, bounds, ends) for name, found in tallies.items()}


# -- plans: how long planning takes --------------------------------------------------------------------------------------


@functools.cache
def cached_functions() -> list[Any]:
    modules = [m for name, m in sys.modules.items() if name.partition(".")[0] == "shardwright"]
    things = [t for m in modules for t in vars(m).values()]
    return [t for t in things if callable(getattr(t, "cache_clear", None))]


def cold(make: Callable[[], tuple[Layout, Layout]], shape: Shape) -> float:
    """Milliseconds of planning with no cache filled."""
    ends = make()
    for function in cached_functions():
        function.cache_clear()
    start = time.perf_counter()
    redistribution(*ends, shape)
    return (time.perf_counter() - start) * 1e3


def cached(make: Callable[[], tuple[Layout, Layout]], shape: Shape, calls: int = 100) -> float:
    """Microseconds of asking once more, with layouts that are equal but not the same."""
    ends, again = make(), make()
    redistribution(*ends, shape)
    start = time.perf_counter()
    for _ in range(calls):
        redistribution(*again, shape)
    return (time.perf_counter() - start) * 1e6 / calls


def median_and_worst(time_one: Callable[[int], float], count: int, unit: str) -> dict[str, float]:
    """Of times that ``time_one`` measures; the worst is the worst median of nine tries, for one try may meet anything."""
    gc.collect()
    times = [time_one(i) for i in range(count)]
    candidates = sorted(range(count), key=times.__getitem__)[-8:]
    again = [statistics.median(time_one(i) for _ in range(9)) for i in candidates]
    median = statistics.median(times)
    return {f"median {unit}": median, f"worst {unit}": max(median, *again)}


def planning(makers: Sequence[Callable[[], tuple[Layout, Layout]]], shape: Shape) -> dict[str, dict[str, float]]:
    return {
        "ours, cold": median_and_worst(lambda i: cold(makers[i], shape), len(makers), "ms"),
        "ours, cached": median_and_worst(lambda i: cached(makers[i], shape), len(makers), "µs"),
    }


def random_layouts(generator: random.Random, sizes: Shape = (2,) * 5, ndim: int = 3) -> Callable[[], tuple[Layout, Layout]]:
    """A source with partial sums and a target without, their axes in any order."""
    axes = [f"a{i}" for i in range(len(sizes))]
    chosen = []
    for kinds in ([*range(ndim), "replicated", "partial"], [*range(ndim), "replicated"]):
        places = {a: generator.choice(kinds) for a in axes}
        order = generator.sample(axes, len(axes))
        dims = [[a for a in order if places[a] == d] for d in range(ndim)]
        chosen.append((dims, [(a, "sum") for a in axes if places[a] == "partial"]))
    mesh_of = functools.partial(Mesh, tuple(axes), sizes)

    def make() -> tuple[Layout, Layout]:
        mesh = mesh_of()
        one, other = (Layout.of(mesh, dims, partial) for dims, partial in chosen)
        return one, other

    return make


def planning_of_dtensor(sizes: Shape, shape: Shape, sample: int) -> dict[str, dict[str, float]]:
    """Cold planning by DTensor of some pairs: its planner objects dropped before each."""
    pairs, found = all_pairs(sizes), {}
    pairs = random.Random(0).sample(pairs, min(sample, len(pairs)))
    with fake_mesh(sizes) as mesh:
        for name, min_cost in PLANNERS.items():

            def time_one(i: int, min_cost: bool = min_cost) -> float:
                planner.clear_redistribute_planner_cache()
                ends = specs(mesh, *pairs[i], shape)
                start = time.perf_counter()
                transforms(ends, min_cost)
                return (time.perf_counter() - start) * 1e3

            found[f"{name}, cold"] = median_and_worst(time_one, len(pairs), "ms")
        planner.clear_redistribute_planner_cache()
    return found


def plans(quick: bool) -> dict[str, Any]:
    meshes = ((2, 4), (3, 2)) if quick else MESHES
    tables: dict[str, Any] = {}
    times: dict[str, Any] = {}
    for shape in SHAPES:
        for sizes in meshes:
            tables[f"{mesh_text(sizes)}, {shape_text(shape)}"] = compare_plans(sizes, shape)
    for sizes in meshes:
        tables[f"{mesh_text(sizes)}, {shape_text(TINY)}"] = compare_plans(sizes, TINY, with_dtensor=False)
    shape = SHAPES[0]
    for sizes in meshes:
        makers = [functools.partial(layouts, sizes, s, t) for s, t in all_pairs(sizes)]
        times[mesh_text(sizes)] = {**planning(makers, shape), **planning_of_dtensor(sizes, shape, 10 if quick else 60)}
    generator = random.Random(0)
    times["2x2x2x2x2, 300 random pairs"] = planning([random_layouts(generator) for _ in range(300)], (64, 64, 64))
    return {"bytes": tables, "planning": times}


def mesh_text(sizes: Shape) -> str:
    return "x".join(map(str, sizes))


shape_text = mesh_text


# -- clock: one rank -----------------------------------------------------------------------------------------------------


def redistribute_with(world: Any) -> Callable[[Tensor, Layout, Layout, Shape], Tensor]:
    """Ours: the world's function or, where it has none yet, what it will be: steps prepared once for each pair."""
    if hasattr(world, "redistribute"):
        return world.redistribute  # type: ignore[no-any-return]
    from shardwright.world.distributed.steps import prepare_steps

    known: dict[Any, Callable[[Tensor], Tensor]] = {}

    def redistribute(local: Tensor, source: Layout, target: Layout, shape: Shape) -> Tensor:
        key = (source, target, shape)
        if key not in known:
            steps = redistribution(source, target, shape).forward
            world._groups.make(steps)
            known[key] = prepare_steps(steps, shape, world.rank, world._groups)
        return known[key](local)

    return redistribute


def all_to_all_of_gloo(tensor: Tensor, gather_dim: int, shard_dim: int, mesh: DeviceMesh, mesh_dim: int) -> Tensor:
    """What DTensor runs off the CPU in place of an all-gather and a slice; gloo can do it, too."""
    n = mesh.size(mesh_dim)
    packed = torch.cat([part.reshape(-1) for part in tensor.chunk(n, shard_dim)])
    out = torch.empty_like(packed)
    dist.all_to_all_single(out, packed, group=mesh.get_group(mesh_dim))
    shape = list(tensor.shape)
    shape[shard_dim] //= n
    return torch.cat([part.view(shape) for part in out.chunk(n)], gather_dim)


def with_help(call: Callable[[], Tensor]) -> Tensor:
    """The call with DTensor's min-cost planner and an all-to-all."""
    plain = placement_types.shard_dim_alltoall
    placement_types.shard_dim_alltoall = all_to_all_of_gloo
    planner._FORCE_MIN_COST_REDISTRIBUTION_PLAN = True
    try:
        return call()
    finally:
        placement_types.shard_dim_alltoall = plain
        planner._FORCE_MIN_COST_REDISTRIBUTION_PLAN = None


Variant = Callable[[Tensor], Callable[[], Tensor]]  # from this rank's piece to what gives its result, the part that is timed


class Case(NamedTuple):
    """A pair of layouts at one size; ``run`` gives this rank's result by each variant, to be called on all ranks."""

    sizes: Shape
    source: Places
    target: Places
    size: str
    steps: str
    run: dict[str, Callable[[], Tensor]]


class Bench:
    """What one rank needs to run cases: the world, DTensor's meshes, the tensors."""

    def __init__(self, helped: bool):
        self.world: Any = sw.init()
        self.ours, self.helped = redistribute_with(self.world), helped
        self.meshes: dict[Shape, DeviceMesh] = {sizes: init_device_mesh("cpu", sizes) for sizes in CLOCK_MESHES}
        self.named: dict[Shape, DeviceMesh] = {
            sizes: init_device_mesh("cpu", sizes, mesh_dim_names=("x", "y")[: len(sizes)]) for sizes in CLOCK_MESHES
        }
        if helped:
            self.named[2, 2]._flatten("both")

    @functools.lru_cache(maxsize=1)  # noqa: B019 (there is one)
    def whole(self, size: str) -> Tensor:
        shape = CLOCK_SHAPES[size]
        return torch.arange(math.prod(shape), dtype=torch.float32).view(shape)  # float32 holds each exactly

    def piece(self, sizes: Shape, places: Places, size: str) -> Tensor:
        box = boxes(sizes, dims_of(places), CLOCK_SHAPES[size])[self.world.rank]
        return self.whole(size)[tuple(slice(a, b) for a, b in box)].contiguous()

    def case(self, sizes: Shape, source: Places, target: Places, size: str) -> Case:
        """The pair, after the results of all variants were found to be right."""
        local, want = self.piece(sizes, source, size), self.piece(sizes, target, size)
        makers = self.variants(sizes, source, target, CLOCK_SHAPES[size])
        for variant, make in makers.items():
            given = [local + i for i in range(3)]  # one after the other and kept: a buffer used again would show
            results = [call() for call in map(make, given)]
            right = all(torch.equal(result, want + i) for i, result in enumerate(results))
            if not right or not all(torch.equal(tensor, local + i) for i, tensor in enumerate(given)):
                raise SystemExit(f"{label(sizes, source, target, size)}: rank {self.world.rank}: {variant} is wrong")
        steps = redistribution(*layouts(sizes, source, target), CLOCK_SHAPES[size]).forward
        run = {variant: make(local) for variant, make in makers.items()}
        return Case(sizes, source, target, size, " + ".join(map(str, steps)) or "nothing", run)

    def variants(self, sizes: Shape, source: Places, target: Places, shape: Shape) -> dict[str, Variant]:
        one, other = layouts(sizes, source, target)
        mesh, named, wanted = self.meshes[sizes], self.named[sizes], placements(target)

        def ours(local: Tensor) -> Callable[[], Tensor]:
            return lambda: self.ours(local, one, other, shape)

        def dtensor(local: Tensor, mesh: DeviceMesh = mesh) -> Callable[[], Tensor]:
            given = DTensor.from_local(local, mesh, placements(source), run_check=False)
            return lambda: given.redistribute(placements=wanted)._local_tensor

        def helped(local: Tensor) -> Callable[[], Tensor]:
            call = dtensor(local, named)
            return lambda: with_help(call)

        return {"ours": ours, "DTensor": dtensor, **({"helped": helped} if self.helped else {})}

    def measure(self, case: Case, patience: float = 1.0) -> dict[str, Any]:
        """Seconds of every variant, the same on all ranks; more rounds while ours looks slower than DTensor."""
        samples: dict[str, list[float]] = {variant: [] for variant in case.run}
        take_turns(case.run, samples, 2)
        turn = sum(typical(samples).values())
        rounds = max(6, min(40, int(patience * SECONDS[case.size] / turn)))
        for _ in range(4):
            take_turns(case.run, samples, rounds)
            found = typical(samples)
            if found["ours"] <= LIMITS["slower"] * found["DTensor"]:
                break
        moves = least(case.sizes, case.source, case.target, CLOCK_SHAPES[case.size]) > 0
        return {
            "mesh": case.sizes,
            "source": case.source,
            "target": case.target,
            "size": case.size,
            "steps": case.steps,
            "moves": moves,
            "rounds": len(samples["ours"]),
            "quartiles": {v: quartiles(times) for v, times in samples.items()},  # on the first rank
            "seconds": found,
        }


def take_turns(run: dict[str, Callable[[], Tensor]], samples: dict[str, list[float]], rounds: int) -> None:
    """Adds ``rounds`` times of each variant to ``samples``, with a barrier before each."""
    for variant, seconds in seconds_in_turn(run, rounds).items():
        samples[variant] += seconds


def typical(samples: dict[str, list[float]]) -> dict[str, float]:
    """The lower quartile of each variant's turns, averaged over the ranks: the same number on every rank.

    Whatever else runs on the machine lengthens turns and never shortens one. Repeated on a busy machine, ratios of these
    vary by two thirds as much as those of the slowest rank's medians.
    """
    found = torch.tensor([quartiles(times)[0] for times in samples.values()], dtype=torch.float64)
    dist.all_reduce(found)
    return dict(zip(samples, (found / dist.get_world_size()).tolist(), strict=True))


def quartiles(times: list[float]) -> list[float]:
    return statistics.quantiles(times, method="inclusive")


def clock_pairs(size: str, quick: bool, full: bool) -> list[tuple[Shape, Places, Places]]:
    """All pairs; at 16 MB on 2x2 all swaps and a third of the others, drawn once, stand for them."""
    line = [((4,), s, t) for s, t in all_pairs((4,))]
    square: list[tuple[Shape, Places, Places]] = [((2, 2), s, t) for s, t in all_pairs((2, 2))]
    swaps = [p for p in square if is_swap(*p[1:])]
    rest = [p for p in square if not is_swap(*p[1:])]
    shuffled = random.Random(0).sample(rest, len(rest))
    if quick:
        return [*line[::4], *swaps[::2], *shuffled[:14]]
    return [*line, *swaps, *(shuffled if full or size != "16 MB" else shuffled[::3])]


def label(sizes: Shape, source: Places, target: Places, size: str) -> str:
    return f"{text(source)} -> {text(target)} on {mesh_text(sizes)}, {size}"


def label_of(result: dict[str, Any]) -> str:
    return label(result["mesh"], result["source"], result["target"], result["size"])


def is_swap(source: Places, target: Places) -> bool:
    """Whether two axes exchange the dims that they split."""
    return None not in source and source[0] != source[-1] and target == source[::-1]


def worker(out: str, quick: bool, full: bool, helped: bool, only: str) -> None:
    """One rank: all sizes, all pairs, then once more those that look slower than DTensor."""
    torch.set_num_threads(1)
    gc.disable()  # whose garbage it is would be chance
    bench, results = Bench(helped), []
    with torch.no_grad():
        for size in ("4 MB",) if quick else CLOCK_SHAPES:
            start = time.perf_counter()
            for pair in clock_pairs(size, quick, full or bool(only)):
                if re.search(only, label(*pair, size)):
                    results.append(bench.measure(bench.case(*pair, size)))
                    gc.collect(0)
            if bench.world.rank == 0:
                print(f"{size}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        for i, found in enumerate(results):
            if found["seconds"]["ours"] > LIMITS["slower"] * found["seconds"]["DTensor"]:
                case = bench.case(found["mesh"], found["source"], found["target"], found["size"])
                results[i] = {**bench.measure(case, patience=3), "first": found["seconds"]}
    if bench.world.rank == 0:
        Path(out).write_text(json.dumps(results))
    gc.enable()


def clock(quick: bool, full: bool, helped: bool, only: str) -> list[dict[str, Any]]:
    flags = ["--only", only] + [flag for flag, on in (("--quick", quick), ("--full", full), ("--helped", helped)) if on]
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "result.json")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, __file__, "--worker", out, *flags], check=True, env=environment)
        found: list[dict[str, Any]] = json.loads(Path(out).read_text())
    for result in found:
        result.update({key: tuple(result[key]) for key in ("mesh", "source", "target")})
    return found


# -- what is reported ----------------------------------------------------------------------------------------------------


def gain(result: dict[str, Any], over: str = "DTensor") -> float:
    return float(result["seconds"][over] / result["seconds"]["ours"])


def geomean(results: Iterable[dict[str, Any]], over: str = "DTensor") -> float:
    return statistics.geometric_mean([gain(r, over) for r in results] or [math.nan])


def swaps_of(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for r in results if r["size"] in LARGE and len(r["mesh"]) == 2 and is_swap(r["source"], r["target"])]


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def header(*cells: str) -> list[str]:
    return [row(*cells), "|" + "---|" * len(cells)]


def bytes_table(found: dict[str, Any]) -> list[str]:
    columns = ("sum", "mean", "geomean", "worst")
    lines = header("mesh, shape", "plan", "pairs at 1.00", *columns, "for nothing", "collectives", "peak")
    for case, variants in found["bytes"].items():
        for name, s in variants.items():
            ratios = [f"{s[column]:.2f}" for column in columns]
            lines.append(
                row(
                    case, name, f"{s['at bound']:.0%}", *ratios, s["for nothing"], f"{s['collectives']:.2f}", f"{s['peak']:.2f}"
                )
            )
    return lines


def planning_table(found: dict[str, Any]) -> list[str]:
    columns = ("ours, cold", "ours, cached", *(f"{name}, cold" for name in PLANNERS))
    lines = header("mesh", *columns)
    for case, times in found["planning"].items():
        cells = []
        for column in columns:
            median, worst = list(times.get(column, {}).items()) or [("", None)] * 2
            cells.append("–" if median[1] is None else f"{median[1]:.2g} {median[0].split()[-1]}, worst {worst[1]:.2g}")
        lines.append(row(case, *cells))
    return lines


def clock_table(results: list[dict[str, Any]]) -> list[str]:
    helped = "helped" in results[0]["seconds"]
    more = ["DTensor helped / ours", "helped, swaps"] if helped else []
    lines = header("size", "pairs", "DTensor / ours", "pairs that move nothing too", "least", "axis swaps", *more)
    for size in [*dict.fromkeys(r["size"] for r in results), "all"]:
        chosen = [r for r in results if size in (r["size"], "all")]
        moving = [r for r in chosen if r["moves"]]
        swaps = [r for r in moving if is_swap(r["source"], r["target"])] if size != "all" else swaps_of(results)
        cells = [geomean(moving), geomean(chosen), min(map(gain, chosen)), geomean(swaps)]
        cells += [geomean(moving, "helped"), geomean(swaps, "helped")] if helped else []
        lines.append(row(size if size != "all" else "all (swaps ≥ 4 MB)", len(chosen), *(f"{c:.2f}" for c in cells)))
    return lines


def worst_table(results: list[dict[str, Any]], count: int = 10) -> list[str]:
    lines = header("pair", "ours", "DTensor", "DTensor / ours", "rounds", "our steps")
    for r in sorted(results, key=gain)[:count]:
        cells = [f"{r['seconds'][v] * 1e3:.2f} ms" for v in ("ours", "DTensor")]
        lines.append(row(label_of(r), *cells, f"{gain(r):.2f}", r["rounds"], r["steps"]))
    return lines


def report(found: dict[str, Any]) -> str:
    parts = []
    if "bytes" in found:
        parts += ["Elements received over the least that must be:", bytes_table(found)]
        parts += ["Time to plan:", planning_table(found)]
    if "clock" in found:
        parts += ["Wall clock on 4 gloo ranks, geometric means over pairs:", clock_table(found["clock"])]
        parts += ["Where ours gains least:", worst_table(found["clock"])]
    return "\n\n".join(p if isinstance(p, str) else "\n".join(p) for p in parts)


def missed_by_plans(found: dict[str, Any]) -> list[str]:
    missed = []
    for case, variants in found["bytes"].items():
        ours = variants["ours"]
        if ours["at bound"] < 1:
            missed.append(f"{case}: {ours['at bound']:.1%} of pairs at the bound, worst {ours['worst']:.2f}x")
        if ours["peak"] > LIMITS["peak"]:
            missed.append(f"{case}: an intermediate {ours['peak']:.2f}x the larger end, not {LIMITS['peak']}")
    for case, times in found["planning"].items():
        once, again = times["ours, cold"]["worst ms"], times["ours, cached"]["worst µs"]
        if once >= LIMITS["cold ms"]:
            missed.append(f"{case}: planning takes up to {once:.2f} ms, not {LIMITS['cold ms']}")
        if again >= LIMITS["cached µs"]:
            missed.append(f"{case}: planning again takes up to {again:.1f} µs, not {LIMITS['cached µs']}")
    return missed


def missed_by_clock(results: list[dict[str, Any]]) -> list[str]:
    missed = []
    overall, swaps = geomean(r for r in results if r["moves"]), geomean(swaps_of(results))
    if overall < LIMITS["geomean"]:  # nan, where no pair is of the kind, misses nothing
        missed.append(f"DTensor / ours is {overall:.2f} over pairs in which something moves, not {LIMITS['geomean']}")
    if swaps < LIMITS["swaps"]:
        missed.append(f"DTensor / ours is {swaps:.2f} over axis swaps of 4 MB and more, not {LIMITS['swaps']}")
    for r in results:
        if r["seconds"]["ours"] > LIMITS["slower"] * r["seconds"]["DTensor"]:
            missed.append(f"{label_of(r)}: {1 / gain(r):.2f}x the time of DTensor")
    return missed


def write(page: Path, tables: str) -> None:
    """Puts the tables between the two comments of ``page``; at its end, where it has none."""
    body = page.read_text()
    if BEGIN not in body:
        body = f"{body.rstrip()}\n\n## Redistribution\n\n{BEGIN}\n{END}\n"
    before, _, rest = body.partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{rest.partition(END)[2]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="two meshes, one size, few pairs")
    parser.add_argument("--full", action="store_true", help="all pairs at 16 MB as well")
    parser.add_argument("--helped", action="store_true", help="time a DTensor with all that it can be given, too")
    parser.add_argument("--only", default="", metavar="REGEX", help="clock these pairs: 'S0,S1 -> S1,S0 on 2x2, (1|4) MB'")
    parser.add_argument("--part", nargs="*", choices=("plans", "clock"), default=["plans", "clock"])
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    parser.add_argument(
        "--write", nargs="?", const=PAGE, type=Path, metavar="PAGE", help=f"write the tables to PAGE ({PAGE.name})"
    )
    parser.add_argument("--json", type=Path, help="write all that was measured to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # it warns that its plans are not the best
    if options.worker:
        worker(options.worker, options.quick, options.full, options.helped, options.only)
        return 0
    found: dict[str, Any] = {}
    missed = []
    if "plans" in options.part:
        found.update(plans(options.quick))
        missed += missed_by_plans(found)
    if "clock" in options.part:
        found["clock"] = clock(options.quick, options.full, options.helped, options.only)
        missed += missed_by_clock(found["clock"])
    tables = report(found)
    print(tables)
    if options.write:
        write(options.write, tables)
    if options.json:
        options.json.write_text(json.dumps(found))
    print("\n".join(f"missed: {line}" for line in missed) or "all targets reached")
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
