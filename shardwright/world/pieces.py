"""What ranks hand in to a redistribution: checked, for a wrong piece would leave other ranks waiting."""

from __future__ import annotations

from torch import Tensor

from shardwright.errors import WorldError
from shardwright.layout import Layout


def check_piece(rank: int, value: Tensor | None, layout: Layout, shape: tuple[int, ...]) -> None:
    """Refuses a value that is not the piece ``rank`` holds of a tensor of global ``shape``."""
    bounds = layout.bounds(shape).get(rank)
    if bounds is None:
        if value is not None:
            raise WorldError(f"rank {rank} hands in a tensor, but the source {layout} does not have that rank: give None")
        return
    expected = tuple(b - a for a, b in bounds)
    if value is None or tuple(value.shape) != expected:
        given = "nothing" if value is None else f"a tensor of shape {list(value.shape)}"
        raise WorldError(
            f"rank {rank} hands in {given}, but its piece of {list(shape)} laid out as {layout} is {list(expected)}"
        )
