"""Checks the pieces that ranks give to a redistribution. A wrong one would leave other ranks waiting."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from shardwright.errors import Problems, WorldError
from shardwright.ir.layout import Layout
from shardwright.redistribute.routes import extent


def check_layouts(source: Layout, target: Layout, partial_gradient: Sequence[str], size: int) -> None:
    """Refuses layouts between which no redistribution in the world is possible.

    Args:
        source, target: the layouts.
        partial_gradient: axes over which gradients are partial at the target.
        size: number of ranks.
    """
    problems = Problems()
    for name, layout in (("source", source), ("target", target)):
        beyond = sorted(rank for rank in layout.mesh.ranks if rank >= size)
        if beyond:
            problems.add(f"the {name} {layout} is over ranks {beyond}, this world has ranks 0 to {size - 1}: leave them out")
    invented = set(target.partial) - set(source.partial)
    if invented or (target.partial and source.mesh != target.mesh):
        problems.add(
            f"the target {target} leaves a reduction pending that the source {source} does not have there: a reduction is "
            "kept on its own mesh, or done; drop it from the target"
        )
    for axis in partial_gradient:
        if axis not in target.mesh.axes or axis in target.split_axes:
            problems.add(
                f"partial_gradient names {axis!r}: it must be an axis of the target {target} that splits no dim; drop it"
            )
    problems.raise_if_any("redistribute cannot do this")


def check_piece(rank: int, value: Tensor | None, layout: Layout, shape: tuple[int, ...]) -> None:
    """Refuses a value that is not ``rank``'s piece of a tensor of global ``shape``.

    Args:
        rank: the rank.
        value: its piece.
        layout: the layout of the pieces.
        shape: global shape.
    """
    bounds = layout.bounds(shape).get(rank)
    if bounds is None:
        if value is not None:
            raise WorldError(f"rank {rank} hands in a tensor, but the source {layout} does not have that rank: give None")
        return
    if value is None or tuple(value.shape) != extent(bounds):
        given = "nothing" if value is None else f"a tensor of shape {list(value.shape)}"
        raise WorldError(
            f"rank {rank} hands in {given}, but its piece of {list(shape)} laid out as {layout} is {list(extent(bounds))}"
        )


def check_differentiable(source: Layout, target: Layout) -> None:
    """Refuses to differentiate a pending maximum or minimum. Which part its gradient belongs to is unknown."""
    done = [op for axis, op in source.partial if op != "sum" and axis not in target.partial_axes]
    if done:
        raise WorldError(f"redistribute has no gradient through the pending {done[0]} of {source}: hand in value.detach()")
