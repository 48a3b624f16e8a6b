"""The least time of any schedule of a small pipeline, by constraint programming.

A referee: it shares nothing with the search and the bound.
"""

from __future__ import annotations

from collections.abc import Sequence

from ortools.sat.python import cp_model


def least_seconds(
    forward: Sequence[int],
    backward: Sequence[int],
    weight: Sequence[int],
    micro_count: int,
    row_of_stage: Sequence[int],
    most_in_flight: int | None = None,
    transfer: int = 0,
    limit_s: float = 20.0,
) -> int | None:
    """Returns the optimum for whole numbers of seconds, or None where it is not proved within the time."""
    stages, last = range(len(forward)), len(forward) - 1
    model = cp_model.CpModel()
    horizon = micro_count * sum(map(sum, (forward, backward, weight))) + 2 * last * transfer
    starts = {}
    intervals: dict[int, list] = {rank: [] for rank in row_of_stage}
    held: dict[int, list] = {rank: [] for rank in row_of_stage}
    end_of_all = model.new_int_var(0, horizon, "end")
    for m in range(micro_count):
        for s in stages:
            for kind, seconds in (("F", forward), ("I", backward), ("W", weight)):
                start = starts[kind, s, m] = model.new_int_var(0, horizon, f"{s}{kind}{m}")
                intervals[row_of_stage[s]].append(model.new_fixed_size_interval_var(start, seconds[s], f"{s}{kind}{m}"))
                model.add(start + seconds[s] <= end_of_all)
    for m in range(micro_count):
        for s in stages:
            model.add(starts["F", s, m] + forward[s] <= starts["I", s, m])
            model.add(starts["I", s, m] + backward[s] <= starts["W", s, m])
            if s < last:
                delay = transfer if row_of_stage[s] != row_of_stage[s + 1] else 0
                model.add(starts["F", s, m] + forward[s] + delay <= starts["F", s + 1, m])
                model.add(starts["I", s + 1, m] + backward[s + 1] + delay <= starts["I", s, m])
            if m:  # micro-batches are alike, and so are their turns on a stage
                for kind in "FIW":
                    model.add(starts[kind, s, m - 1] <= starts[kind, s, m])
            if most_in_flight is not None:
                size = model.new_int_var(0, horizon, "")
                end = starts["W", s, m] + weight[s]
                held[row_of_stage[s]].append(model.new_interval_var(starts["F", s, m], size, end, ""))
    for rank, there in intervals.items():
        model.add_no_overlap(there)
        if most_in_flight is not None:
            model.add_cumulative(held[rank], [1] * len(held[rank]), most_in_flight)
    model.minimize(end_of_all)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = limit_s
    solver.parameters.num_workers = 1
    status = solver.solve(model)
    return round(solver.objective_value) if status == cp_model.OPTIMAL else None
