"""Keeps slices, one per rank, of values that many ranks hold alike, for the backward pass."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from shardwright.ir import rank_groups
from shardwright.ir.graph import Graph
from shardwright.ir.instructions import Instruction, KeepSliceForBackward, Move
from shardwright.ir.layout import Layout
from shardwright.ir.operator import TensorMeta
from shardwright.ir.program import LocalProgram
from shardwright.redistribute.steps import redistribution


def keep_in_pieces(program: LocalProgram, graph: Graph, values: Collection[str]) -> LocalProgram:
    """Makes a program keep slices of these values, where several ranks hold the same.

    A value is sliced right after it is made, and gathered when the backward pass needs it.
    """
    meta_of = {program.places[value]: meta for value, meta in graph.metas.items() if value in program.places}
    instructions: list[Instruction] = []
    for instruction in program.instructions:
        instructions.append(instruction)
        for name in instruction.outputs:
            if name in values and name in meta_of:
                made = _keep_piece(name, meta_of[name], program.layouts[name], instruction.cause)
                if made is not None:
                    instructions.append(made)
    return replace(program, instructions=tuple(instructions))


def _keep_piece(name: str, meta: TensorMeta, layout: Layout, cause: str) -> KeepSliceForBackward | None:
    """Makes the instruction for one value; ``None`` where nothing is shared or can be sliced."""
    piece = sliced(layout, meta.shape)
    if piece is None:
        return None
    cut, gather = redistribution(layout, piece, meta.shape), redistribution(piece, layout, meta.shape)
    lanes = (rank_groups.of_layout(layout), rank_groups.of_layout(piece))
    part, edge = f"{name}_piece", f"{name} -> kept in pieces"
    return KeepSliceForBackward(
        Move(name, part, cut, meta.dtype, cause, edge, lanes[1], False),
        Move(part, name, gather, meta.dtype, cause, edge, lanes[0], False),
    )


def sliced(layout: Layout, shape: tuple[int, ...]) -> Layout | None:
    """Returns the layout in which ranks that hold the same share it: it splits the first dim that divides, or the largest.

    >>> str(sliced(Layout((2, 4), ("dp", "tp"))("dp", "None"), (8, 64)))
    '(dp,tp),None @ dp=2,tp=4'
    """
    mesh = layout.mesh
    free = [a for a in mesh.axes if a not in layout.split_axes and mesh.axis_size(a) > 1]
    if not free or layout.partial or not shape:
        return None
    local = layout.local_shape(shape, mesh.ranks[0])
    candidates = [d for d in range(len(shape)) if layout.sizes[d] is None]
    if not candidates:
        return None
    count = mesh.count(free)
    dim = next((d for d in candidates if local[d] and local[d] % count == 0), max(candidates, key=lambda d: local[d]))
    if local[dim] < count:
        return None
    dims = [tuple(axes) + (tuple(free) if d == dim else ()) for d, axes in enumerate(layout.bound)]
    return Layout.of(mesh, dims, (), layout.sizes).normal(shape)
