"""Makes split outputs whole: the program that does it, and the tensors that run it when they are read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from shardwright.ir.instructions import ProgramInput
from shardwright.ir.layout import Layout
from shardwright.ir.operator import TensorMeta
from shardwright.ir.plan import Plan
from shardwright.ir.program import LocalProgram
from shardwright.partition.builder import Moves, ProgramBuilder
from shardwright.partition.local_program import options_of
from shardwright.redistribute.planner import Options
from shardwright.train.outputs.split_output import SplitOutput
from shardwright.world.world import World


def reading_program(program: LocalProgram, name: str, meta: TensorMeta, needs_grad: bool, options: Options) -> LocalProgram:
    """Makes the program that takes the pieces of a split output and returns the whole one.

    Args:
        program: the program that returns the pieces.
        name: the local value that it returns.
        meta: of the whole tensor.
        needs_grad: whether gradients flow back through it.
        options: which steps redistributions may use and their costs.
    """
    layout = program.layouts[name]
    builder = ProgramBuilder(program.world_size, ())
    builder.rank_groups[name], builder.layouts[name] = program.rank_groups[name], layout
    whole = Layout.replicated(layout.mesh, layout.ndim)
    result = Moves(builder, options, ()).emit(
        name, meta.shape, layout, whole, (), meta.dtype, f"{name} -> output", None, needs_grad, needs_grad
    )
    given = ProgramInput(name, "local", name, meta, layout)
    instructions = tuple(builder.instructions)
    return LocalProgram(program.world_size, (given,), instructions, (result,), (), builder.rank_groups, builder.layouts)


def split_outputs(plan: Plan, program: LocalProgram, world: World) -> list[tuple[int, Callable[[Any], SplitOutput]]]:
    """Binds the reading of the outputs that are split. All processes call it.

    Args:
        plan: the plan.
        program: its program.
        world: where it runs.

    Returns:
        The positions of the outputs that are split, each with what makes a :class:`SplitOutput` of what the program returns.
    """
    readers: dict[str, Callable[[Any], SplitOutput]] = {}
    found = []
    for index, (value, name) in enumerate(zip(plan.graph.outputs, program.outputs, strict=True)):
        if name in program.split:
            if name not in readers:
                readers[name] = _reader(plan, program, value, world)
            found.append((index, readers[name]))
    return found


def _reader(plan: Plan, program: LocalProgram, value: str, world: World) -> Callable[[Any], SplitOutput]:
    name, meta = program.places[value], plan.graph.metas[value]
    reading = reading_program(program, name, meta, value in plan.graph.needs_grad, options_of(plan))
    run, groups = world.bind(reading), program.rank_groups[name]

    def wrap(held: Any) -> SplitOutput:
        pieces = {rank: held[group] for rank, group in enumerate(groups)} if world.runs_rank_groups else {world.rank: held}
        return SplitOutput(meta, program.layouts[name], pieces, partial(_whole, run, held))

    return wrap


def _whole(run: Callable[..., Any], held: Any) -> Any:
    outputs, _ = run(held)
    return outputs[0]
