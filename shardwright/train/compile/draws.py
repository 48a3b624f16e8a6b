"""Finds calls that draw random numbers, and splits dropout into a draw and a product.

A compiler has random numbers of its own. So that masks are the single device's, calls that draw are never compiled.
"""

from __future__ import annotations

from dataclasses import replace

from shardwright.base.operators import may_draw
from shardwright.base.torch_private import pytree
from shardwright.ir.graph import Graph, Node
from shardwright.ir.instructions import Call, Instruction, Ref
from shardwright.ir.operator import OpOverload
from shardwright.ir.program import LocalProgram
from shardwright.rules import random_draw

_DRAWS = frozenset(
    {random_draw.filled, random_draw.dropout_noise, random_draw.whole_dropout, random_draw.feature_noise}
    | {random_draw.alpha_noise, random_draw.native_mask}
)


def draws(call: Call, node: Node) -> bool:
    """Tells whether a local call draws random numbers; ``node`` is the graph node that it comes from."""
    if call.function in _DRAWS:
        return True
    functions = [call.function, *pytree.tree_leaves((call.args, call.kwargs))]
    random = any(isinstance(f, OpOverload) and may_draw(f) for f in functions)
    return random and node.op.draws


def drawn_apart(program: LocalProgram, graph: Graph) -> LocalProgram:
    """Splits each dropout of a whole tensor into a draw and a product. The numbers stay the same."""
    nodes = {node.name: node for node in graph.nodes}
    instructions: list[Instruction] = []
    lanes = dict(program.rank_groups)
    for instruction in program.instructions:
        if not (isinstance(instruction, Call) and instruction.function is random_draw.whole_dropout):
            instructions.append(instruction)
            continue
        (value, stride, p), meta = instruction.args, nodes[instruction.cause].op.inputs[0]
        name = f"{instruction.outputs[0]}_noise"
        while name in lanes:
            name += "_"
        lanes[name] = (0,) * program.world_size
        drawn = (meta.shape, stride, meta.dtype, meta.device, p)
        applied = (value, Ref(name), p)
        instructions += [
            replace(instruction, function=random_draw.dropout_noise, args=drawn, outputs=(name,), rank_groups=lanes[name]),
            replace(instruction, function=random_draw.apply_dropout, args=applied),
        ]
    return replace(program, instructions=tuple(instructions), rank_groups=lanes)
