"""List scheduling: a rank that is free does, of what it could do now, what is most urgent under a policy."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from shardwright.pipeline.schedules.actions import BACKWARD, FORWARD, INPUT, WEIGHT, Action
from shardwright.pipeline.schedules.bound import Relaxation
from shardwright.pipeline.schedules.clock import StageTimes


@dataclass(frozen=True)
class Policy:
    """A rule for what is urgent.

    Args:
        first: the kinds in the order of their urgency, such as "IFW"; or "", by what remains after an action.
        split: whether backwards are split into I and W.
        in_flight: the most activations that each rank holds.
        patience: the share of a W for whose end a gradient or an activation that is under way need not wait; 0 for none.
        weights: by stage, what the urgency of F and I by remaining time is multiplied by.
    """

    first: str
    split: bool
    in_flight: tuple[int, ...]
    patience: float = 0.0
    weights: tuple[tuple[float, float], ...] = ()


class ListScheduler:
    """Schedules with the times of the stages; :meth:`run` gives what a policy leads to."""

    def __init__(self, times: StageTimes, micro_count: int, row_of_stage: Sequence[int], relaxed: Relaxation):
        self.times, self.micro_count, self.relaxed = times, micro_count, relaxed
        self.row_of_stage = tuple(row_of_stage)
        self.stages = [[s for s, row in enumerate(row_of_stage) if row == r] for r in range(max(row_of_stage) + 1)]
        # How many stages of its own rank a micro-batch passes after a stage: for each of them an activation is kept free,
        # so that what is furthest always finds room.
        self.deeper = [sum(row == row_of_stage[s] for row in row_of_stage[s + 1 :]) for s in range(len(row_of_stage))]
        self.delays = times.delays(row_of_stage)
        self.factors = [times.factor(micro) for micro in range(micro_count)]

    def run(self, policy: Policy) -> tuple[list[list[Action]], float]:
        """Returns the actions of each rank, in order, and when the last one ends."""
        run = _Run(self, policy)
        return run.rows(), max(run.free)


class _Run:
    """The state of one run: what has been done, what has come, and when."""

    def __init__(self, problem: ListScheduler, policy: Policy):
        self.problem, self.policy = problem, policy
        count, stages = problem.micro_count, len(problem.row_of_stage)
        # By stage: how many F, I (or B) and W have been started, and when what each needs has come.
        self.f_count, self.i_count, self.w_count = [0] * stages, [0] * stages, [0] * stages
        self.f_come: list[list[float]] = [[0.0] * count if s == 0 else [] for s in range(stages)]
        self.i_come: list[list[float]] = [[] for _ in range(stages)]
        self.held = [0] * len(problem.stages)
        self.free = [0.0] * len(problem.stages)
        self.events: list[tuple[float, int]] = [(0.0, rank) for rank in range(len(problem.stages))]
        self.result: list[list[Action]] = [[] for _ in problem.stages]
        self.order = {kind: len(policy.first) - at for at, kind in enumerate(policy.first)}

    def rows(self) -> list[list[Action]]:
        """Runs until nothing is left to look at."""
        events = self.events
        while events:
            now, rank = heapq.heappop(events)
            if self.free[rank] <= now:
                choice = self._choose(rank, now)
                if choice is not None:
                    self._start(rank, now, *choice)
        return self.result

    def _choose(self, rank: int, now: float) -> tuple[int, str] | None:
        """Chooses the stage and kind of what a rank starts, or nothing if it is to wait."""
        problem, policy = self.problem, self.policy
        best: tuple[float, float, int] | None = None
        choice: tuple[int, str] | None = None
        coming = float("inf")
        last = problem.micro_count - 1
        for s in problem.stages[rank]:
            f, i, w = self.f_count[s], self.i_count[s], self.w_count[s]
            has_room = self.held[rank] + problem.deeper[s] < policy.in_flight[rank]
            of_f, of_i = policy.weights[s] if policy.weights else (1.0, 1.0)
            options = []
            if f < len(self.f_come[s]) and has_room:
                if self.f_come[s][f] <= now:
                    options.append((FORWARD, of_f * problem.relaxed.remaining_f[s][last - f]))
                else:
                    coming = min(coming, self.f_come[s][f])
            if i < len(self.i_come[s]):
                if self.i_come[s][i] <= now:
                    options.append((INPUT, of_i * problem.relaxed.remaining_i[s][last - i]))
                else:
                    coming = min(coming, self.i_come[s][i])
            if policy.split and w < i:
                options.append((WEIGHT, problem.times.weight[s] * (last + 1 - w)))
            for kind, remaining in options:
                key = (self.order[kind], s, 0) if self.order else (remaining, 0, s)
                if best is None or key > best:
                    best, choice = key, (s, kind)
        if choice is not None and choice[1] == WEIGHT and policy.patience:
            seconds = problem.times.weight[choice[0]] * problem.factors[self.w_count[choice[0]]]
            if coming - now < policy.patience * seconds:
                return None
        return choice

    def _start(self, rank: int, now: float, s: int, kind: str) -> None:
        """Starts an action, and tells whoever waits for it when it will be there."""
        problem, times, split = self.problem, self.problem.times, self.policy.split
        if kind == FORWARD:
            micro = self.f_count[s]
            self.f_count[s] += 1
            self.held[rank] += 1
            end = now + times.forward[s] * problem.factors[micro]
            if s + 1 < len(self.f_come):
                self._tell(self.f_come[s + 1], s + 1, end + problem.delays[s])
            else:  # the last stage's gradient starts from its own forward
                self._tell(self.i_come[s], s, end)
        elif kind == INPUT:
            micro = self.i_count[s]
            self.i_count[s] += 1
            seconds = times.backward[s] + (0.0 if split else times.weight[s])
            end = now + seconds * problem.factors[micro]
            if not split:
                self.held[rank] -= 1
            if s:
                self._tell(self.i_come[s - 1], s - 1, end + problem.delays[s - 1])
        else:
            micro = self.w_count[s]
            self.w_count[s] += 1
            self.held[rank] -= 1
            end = now + times.weight[s] * problem.factors[micro]
        self.result[rank].append(Action(s, kind if split or kind != INPUT else BACKWARD, micro))
        self.free[rank] = end
        heapq.heappush(self.events, (end, rank))

    def _tell(self, come: list[float], s: int, at: float) -> None:
        come.append(at)
        heapq.heappush(self.events, (at, self.problem.row_of_stage[s]))
