"""Makes the local program of a plan: partitions it and runs the plan's passes.

This is the only way from a plan to what a rank runs. Running, predictions of memory and prices of recomputation all use it,
so that all of them see the same program.
"""

from __future__ import annotations

from shardwright.base.dump import NO_DUMP, Dump
from shardwright.ir.plan import Plan
from shardwright.ir.program import LocalProgram
from shardwright.partition.partitioner import scheduled, unscheduled
from shardwright.redistribute.links import machine_links
from shardwright.redistribute.planner import Options


def options_of(plan: Plan) -> Options:
    """Returns the steps that a plan's redistributions may use, with costs on its machine."""
    if plan.machine is None:
        return Options(enable_alltoall=plan.enable_alltoall)
    return Options(machine_links(plan.machine, plan.mesh), enable_alltoall=plan.enable_alltoall)


def program_before_overlap(
    plan: Plan, options: Options | None = None, first_rank_only: bool = False, dump: Dump = NO_DUMP
) -> LocalProgram:
    """Partitions a plan and runs the passes that come before moves are fused.

    Args:
        options: what redistributions may use; default: :func:`options_of` the plan.
        first_rank_only: whether to make the program of the first rank, without looking at the others.
        dump: writes the program's text after each pass.
    """
    program = unscheduled(plan.graph, plan, options or options_of(plan), first_rank_only)
    _write(dump, "partition", program)
    for each in plan.passes:
        if not each.after_overlap:
            program = each.change(program, plan)
            _write(dump, each.name, program)
    return program


def finished(program: LocalProgram, plan: Plan, dump: Dump = NO_DUMP) -> LocalProgram:
    """Fuses the moves of a program, starts them early, and runs the passes that follow."""
    program = scheduled(program, plan.schedule)
    _write(dump, "overlap", program)
    for each in plan.passes:
        if each.after_overlap:
            program = each.change(program, plan)
            _write(dump, each.name, program)
    return program


def local_program(
    plan: Plan, options: Options | None = None, first_rank_only: bool = False, dump: Dump = NO_DUMP
) -> LocalProgram:
    """Makes the program that a rank runs.

    Args:
        plan, options, first_rank_only, dump: see :func:`program_before_overlap`.
    """
    return finished(program_before_overlap(plan, options, first_rank_only, dump), plan, dump)


def first_rank_program(plan: Plan) -> LocalProgram:
    """Makes the program of the first rank, without looking at the others; cached, as several views ask for it."""
    if "first rank" not in plan.memo:
        plan.memo["first rank"] = local_program(plan, first_rank_only=True)
    return plan.memo["first rank"]  # type: ignore[no-any-return]


def _write(dump: Dump, name: str, program: LocalProgram) -> None:
    dump.write("program", name, program.text)
