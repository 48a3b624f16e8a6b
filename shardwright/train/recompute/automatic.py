"""Chooses modules to compute again so that a step fits into memory, at the least cost.

The modules of a model form tiers: the innermost ones of several operators, those around them, and so on. Within a tier
modules are taken in the order of bytes freed per second of computing, as many as needed; the cheapest tier wins. Whether
they suffice is not computed from these bytes but simulated (:func:`shardwright.plan.memory.memory_of`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from shardwright.base.text import bytes_text, enough
from shardwright.errors import MemoryLimitError, ShardwrightError
from shardwright.ir.plan import Plan
from shardwright.plan.memory import MemoryTimeline, step_memory
from shardwright.plan.price.price_of import price_of
from shardwright.plan.request import PlanRequest
from shardwright.train.recompute.marked import outermost
from shardwright.train.recompute.request import RecomputeRequest

SEARCHES = ("auto", "dynamic_programming", "recursive_programming")

# Limits that plans are searched for, as shares of the one that holds with recompute: the fastest plan of all, those that
# need little recompute, and one that needs none.
_PLANNED_FOR = (None, 2.0, 1.4, 1.0)


# Gives a plan the passes that compute these modules again.
Again = Callable[[Plan, Mapping[str, RecomputeRequest]], Plan]


def plan_with_recompute(
    make: Callable[[PlanRequest], Plan], again: Again, request: PlanRequest, marked: Mapping[str, RecomputeRequest],
    automatic: RecomputeRequest | None,
) -> Plan:  # fmt: skip
    """Makes the plan that is asked for, with values computed again.

    Args:
        make: plans, with the marked values computed again.
        again: adds the recompute passes to a plan.
        request: what is asked of the plan.
        marked: by module path, what is computed again whatever the memory.
        automatic: asks for more recompute where the plan does not fit.

    Raises:
        MemoryLimitError: it does not fit even so.
    """
    if automatic is None:
        return make(request)
    limit = automatic.memory or request.memory_limit
    if limit is None:
        raise ShardwrightError(
            f"recompute('auto') at {automatic.source} has no memory to fit: give recompute('auto', memory='80GB'), or "
            ".search(memory='80GB')"
        )
    found: list[tuple[Plan, float]] = []
    problem: MemoryLimitError | None = None
    for allowed in _PLANNED_FOR if request.mode in SEARCHES else (None,):
        if found and allowed not in (None, 1.0):
            continue  # only where neither the fastest plan nor the smallest fits
        try:
            plan = make(replace(request, memory_limit=None if allowed is None else allowed * limit))
            found.append(_fitting(replace(plan, memory_limit=limit), again, limit, marked, automatic, request))
        except MemoryLimitError as error:
            problem = error if problem is None or error.least < problem.least else problem
            continue
        if not found[-1][1]:
            break  # nothing is to be computed again
    if not found:
        assert problem is not None
        raise problem
    return found[request.on_first_rank(lambda: min(range(len(found)), key=lambda i: price_of(found[i][0]).seconds))][0]


def _fitting(
    plan: Plan, again: Again, limit: float, marked: Mapping[str, RecomputeRequest], automatic: RecomputeRequest,
    request: PlanRequest,
) -> tuple[Plan, float]:  # fmt: skip
    """Adds recomputed modules to the plan until it fits; returns the plan and the seconds that they take."""
    found = request.on_first_rank(lambda: Chooser(plan, again, marked, automatic).choose(limit))
    if isinstance(found[0], str):
        raise MemoryLimitError(found[0], found[1])
    paths, seconds = found
    return again(plan, {**dict.fromkeys(paths, automatic), **marked}), seconds


@dataclass(frozen=True)
class Candidate:
    """A module that might be computed again: bytes kept within, and seconds of its forward."""

    path: str
    bytes: float
    seconds: float


class Chooser:
    """Chooses modules of a plan.

    Args:
        again: adds the recompute passes to a plan.
        marked: what is computed again in any case.
        automatic: how modules are computed again.
    """

    def __init__(self, plan: Plan, again: Again, marked: Mapping[str, RecomputeRequest], automatic: RecomputeRequest):
        self.plan, self.again, self.marked, self.automatic = plan, again, marked, automatic
        self.peaks: dict[tuple[str, ...], MemoryTimeline] = {}

    def choose(self, limit: float) -> tuple[list[str] | str, float]:
        """Chooses the modules that fit at the least cost: paths and seconds; where nothing fits, why, and the bytes needed."""
        if self.timeline([]).peak <= limit:
            return [], 0.0
        found: list[tuple[float, list[str]]] = []
        least: MemoryTimeline | None = None
        for tier in self.tiers():
            tier.sort(key=lambda c: -c.bytes / max(c.seconds, 1e-12))  # stable: of equal ones those that are kept longest
            count = self.fewest(tier, limit)
            if count is not None:
                found.append((sum(c.seconds for c in tier[:count]), [c.path for c in tier[:count]]))
            else:
                whole = self.timeline([c.path for c in tier])
                least = whole if least is None or whole.peak < least.peak else least
        if found:
            seconds, paths = min(found, key=lambda item: item[0])
            return paths, seconds
        best = least or self.timeline([])
        return (
            f"recompute('auto') at {self.automatic.source}: no choice of modules fits into {bytes_text(int(limit))} a rank; "
            f"at least {best}\n  allow memory='{enough(best.peak)}', use more devices or a smaller batch",
            best.peak,
        )

    def fewest(self, tier: Sequence[Candidate], limit: float) -> int | None:
        """Returns how many of the first modules of a tier are needed."""
        if self.timeline([c.path for c in tier]).peak > limit:
            return None
        low, high = 0, len(tier)  # low does not fit, high does
        while high - low > 1:
            middle = (low + high) // 2
            if self.timeline([c.path for c in tier[:middle]]).peak <= limit:
                high = middle
            else:
                low = middle
        return high

    def timeline(self, paths: Sequence[str]) -> MemoryTimeline:
        """Simulates a rank's memory with these modules computed again."""
        key = tuple(sorted(paths))
        if key not in self.peaks:
            self.peaks[key] = step_memory(self.again(self.plan, {**dict.fromkeys(paths, self.automatic), **self.marked}))
        return self.peaks[key]

    # -- candidates ---------------------------------------------------------------------------------------------------

    def tiers(self) -> list[list[Candidate]]:
        """Groups modules into tiers without overlap, from small to large, in program order."""
        candidates = self.candidates()
        heights: dict[str, int] = {}
        for path in sorted(candidates, key=lambda p: -p.count(".")):
            inner = [heights[p] for p in heights if p.startswith(path + ".")]
            heights[path] = 1 + max(inner, default=-1)
        found = []
        for height in sorted(set(heights.values())):
            low = [p for p in candidates if heights[p] <= height]
            found.append([candidates[p] for p in low if outermost(p, [q for q in low if q != p]) is None])
        return found

    def candidates(self) -> dict[str, Candidate]:
        """Collects modules of several operators that are not computed again already. Mere lists of modules are left out."""
        nodes: dict[str, list[str]] = {}
        for node in self.plan.graph.nodes:
            parts = node.module.split(".") if node.module else []
            for depth in range(1, len(parts) + 1):
                nodes.setdefault(".".join(parts[:depth]), []).append(node.name)
        children: dict[str, set[str]] = {}
        for path in nodes:
            parent, _, name = path.rpartition(".")
            children.setdefault(parent, set()).add(name)
        price = price_of(self.plan)
        found = {}
        for path, names in nodes.items():
            inside = children.get(path, set())
            is_list = bool(inside) and all(name.isdigit() for name in inside)
            if len(names) < 2 or is_list or outermost(path, self.marked) is not None:
                continue
            priced = [price.operators[name] for name in names if name in price.operators]  # others cost nothing: every rank
            kept = sum(operator.kept for operator in priced)  # includes their inputs, such as positions
            seconds = sum(operator.forward for operator in priced) + self.moving(names)
            found[path] = Candidate(path, kept, seconds)
        return found

    def moving(self, names: Sequence[str]) -> float:
        """Sums the seconds of these operators' redistributions, forward, as far as they are repeated."""
        again = self.automatic
        moves = {id(m): m for name in names for m in price_of(self.plan).moves_to(name)}
        return sum(
            step.seconds
            for move in moves.values()
            if (again.parallel_optimizer_comm_recompute if move.of_parameter else again.mp_comm_recompute)
            for step in move.forward
        )
