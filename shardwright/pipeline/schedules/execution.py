"""Runs the rows of a schedule against a clock: each action starts once its rank is free and what it waits for is done.

F of a stage waits for F of the stage before, of the same micro-batch; B and I wait for their own F and for the gradient that
B or I of the stage after gives; W waits for its I. Other actions wait only for what stands before them in their row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shardwright.pipeline.schedules.actions import BACKWARD, FORWARD, INPUT, WEIGHT, Action

Rows = Sequence[Sequence[Action]]


# What an action waits for, as (stage, micro-batch, kind): a forward (F), a gradient of inputs, which B or I gives (B), or an I
# itself. A plain tuple: there are some hundred thousand in a large schedule.
Need = tuple[int, "int | None", str]


def needs_of(action: Action, stage_count: int) -> list[Need]:
    """Lists what an action waits for.

    >>> needs_of(Action(1, "I", 0), stage_count=3)
    [(1, 0, 'F'), (2, 0, 'B')]
    """
    stage, kind, micro = action
    if kind == FORWARD:
        return [(stage - 1, micro, FORWARD)] if stage else []
    if kind in (BACKWARD, INPUT):
        own: list[Need] = [(stage, micro, FORWARD)]
        return own + [(stage + 1, micro, BACKWARD)] if stage < stage_count - 1 else own
    return [(stage, micro, INPUT)] if kind == WEIGHT else []


def gives(action: Action) -> list[Need]:
    """Lists what others wait for that an action gives."""
    stage, kind, micro = action
    if kind == INPUT:
        return [(stage, micro, BACKWARD), (stage, micro, INPUT)]
    return [(stage, micro, kind)] if kind in (FORWARD, BACKWARD) else []


@dataclass(frozen=True)
class Durations:
    """Seconds by kind and stage, delays from a stage to the next, and factors of micro-batches.

    Without seconds everything takes one; kinds that have none take no time; factors are 1 if there are none.
    """

    by_kind: Mapping[str, Sequence[float]] | None = None
    delays: Sequence[float] = ()
    factors: Sequence[float] = ()


class Execution(NamedTuple):
    """Starts and ends of the actions of each row, and what a row that does not get through waits for."""

    starts: list[list[float]]
    ends: list[list[float]]
    blocked: dict[int, Need]


def execute(rows: Rows, stage_count: int, durations: Durations) -> Execution:
    """Runs every row as far as it goes, each action as early as it can."""
    done: dict[Need, float] = {}
    waiting: dict[Need, list[int]] = {}
    starts: list[list[float]] = [[] for _ in rows]
    ends: list[list[float]] = [[] for _ in rows]
    blocked: dict[int, Need] = {}
    by_kind, delays, factors = durations.by_kind, durations.delays, durations.factors
    ready = list(range(len(rows)))[::-1]
    while ready:
        rank = ready.pop()
        blocked.pop(rank, None)
        row_starts, row_ends = starts[rank], ends[rank]
        now = row_ends[-1] if row_ends else 0.0
        for action in rows[rank][len(row_starts) :]:
            stage, kind, micro = action
            for need in needs_of(action, stage_count):
                end = done.get(need)
                if end is None:
                    waiting.setdefault(need, []).append(rank)
                    blocked[rank] = need
                    break
                if delays and need[0] != stage:
                    end += delays[min(need[0], stage)]
                if end > now:
                    now = end
            else:
                row_starts.append(now)
                if by_kind is None:
                    now += 1.0
                elif kind in by_kind:
                    now += by_kind[kind][stage] * (factors[micro] if factors and micro is not None else 1.0)
                row_ends.append(now)
                for given in gives(action):
                    if given not in done:
                        done[given] = now
                        if given in waiting:
                            ready += waiting.pop(given)
                continue
            break
    return Execution(starts, ends, blocked)
