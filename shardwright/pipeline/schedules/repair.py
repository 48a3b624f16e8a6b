"""Improves rows action by action: of what is on the critical path one action goes before another, as in job shops."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from shardwright.pipeline.schedules.actions import BACKWARD, FORWARD, INPUT, WEIGHT, Action
from shardwright.pipeline.schedules.execution import Durations, Execution, Rows, execute, needs_of

FARTHEST = 6  # places that an action moves at once
ASIDE = 0.2  # share of moves that are of anything, not of the critical path: they make room
WARMTH = 0.06  # of the time: how much worse a step may be at first


def repair(
    rows: Rows, durations: Durations, row_of_stage: Sequence[int], limits: Sequence[int], steps: int, good_enough: float
) -> Rows:
    """Moves actions of the critical path by simulated annealing, always the same way; returns the best rows it met.

    Args:
        rows: where it starts.
        durations: the seconds of actions.
        row_of_stage: the rank of each stage.
        limits: the most activations that each rank may hold.
        steps: how many moves to try.
        good_enough: seconds at which it stops.
    """
    draw = random.Random(0)
    count = len(row_of_stage)
    current = [list(row) for row in rows]
    run = execute(current, count, durations)
    seconds = least = _seconds(run)
    best: Rows = rows
    for step in range(steps):
        moves = _critical_pairs(current, run, durations, row_of_stage, draw.random)
        if least <= good_enough or not moves:
            break
        rank, at = draw.choice(moves)
        if draw.random() < ASIDE:
            rank = draw.randrange(len(current))
            at = draw.randrange(1, len(current[rank]))
        row = _within(_moved(current[rank], at, draw), limits[rank])
        if row is None:
            continue
        old, current[rank] = current[rank], row
        tried = execute(current, count, durations)
        now = math.inf if tried.blocked else _seconds(tried)
        warmth = WARMTH * least * (1 - step / steps)
        if now <= seconds - warmth * math.log(draw.random() + 1e-12) * 0.2:
            run, seconds = tried, now
            if seconds < least:
                least, best = seconds, [list(kept) for kept in current]
        else:
            current[rank] = old
    return best


def _seconds(run: Execution) -> float:
    return max((ends[-1] for ends in run.ends if ends), default=0.0)


def _critical_pairs(
    rows: Rows, run: Execution, durations: Durations, row_of_stage: Sequence[int], chance: Callable[[], float]
) -> list[tuple[int, int]]:
    """Follows a critical path back from the end; returns (rank, place) of actions that wait for the one before them."""
    rank = max(range(len(rows)), key=lambda r: run.ends[r][-1] if run.ends[r] else -1.0)
    at = len(rows[rank]) - 1
    pairs = []
    while at >= 0 and run.starts[rank][at] > 0:
        start, action = run.starts[rank][at], rows[rank][at]
        follows = at > 0 and math.isclose(run.ends[rank][at - 1], start, rel_tol=1e-12)
        before = None
        if not follows or chance() < 0.5:
            for stage, micro, kind in needs_of(action, len(row_of_stage)):
                where = row_of_stage[stage]
                kinds = "BI" if kind == BACKWARD else kind
                place = next(
                    p for p, other in enumerate(rows[where])
                    if other.stage == stage and other.micro == micro and other.kind in kinds
                )  # fmt: skip
                delay = durations.delays[min(stage, action.stage)] if durations.delays and stage != action.stage else 0.0
                if math.isclose(run.ends[where][place] + delay, start, rel_tol=1e-12):
                    before = where, place
        if follows:
            pairs.append((rank, at))
        if before is None and not follows:
            break
        rank, at = before or (rank, at - 1)
    return pairs


def _moved(row: Sequence[Action], at: int, draw: random.Random) -> list[Action] | None:
    """Puts an action earlier, or the one before it later; None where that would break the order of a micro-batch."""
    way = draw.choice((-1, 1))
    start = at if way < 0 else at - 1
    distance = 1 if draw.random() < 0.5 else draw.randint(2, FARTHEST)
    end = max(0, min(len(row) - 1, start + way * distance))
    moved = row[start]
    passed = row[end:start] if way < 0 else row[start + 1 : end + 1]
    if any(other.stage == moved.stage and other.micro == moved.micro for other in passed):
        return None
    rest = [*row[:start], *row[start + 1 :]]
    return [*rest[:end], moved, *rest[end:]]


def _within(row: list[Action] | None, limit: int) -> list[Action] | None:
    """Brings W forward to before an F that would hold too much; None where there is none to bring."""
    if row is None:
        return None
    held = at = 0
    ready: list[Action] = []  # W whose I has been
    while at < len(row):
        stage, kind, micro = row[at]
        if kind == FORWARD and held == limit:
            if not ready:
                return None
            row.remove(ready[0])
            row.insert(at, ready[0])
            continue
        held += (kind == FORWARD) - (kind in (BACKWARD, WEIGHT))
        if kind == INPUT:
            ready.append(Action(stage, WEIGHT, micro))
        elif kind == WEIGHT:
            ready.remove(row[at])
        at += 1
    return row
