"""First rank: the local program as one rank runs it, made without looking at the others."""

from __future__ import annotations

from shardwright.ir.plan import Plan
from shardwright.ir.program import LocalProgram
from shardwright.partition.partitioner import scheduled, unscheduled
from shardwright.redistribute.planner import Options


def first_rank_program(plan: Plan, options: Options) -> LocalProgram:
    """The scheduled program of the first rank; ``lanes`` of what calls make are empty.

    Args:
        options: what redistributions may use, as the partitioner is given them.
    """
    program = unscheduled(plan.graph, plan, options, first_rank_only=True)
    for change in plan.passes:
        program = change(program)
    return scheduled(program, plan.schedule)
