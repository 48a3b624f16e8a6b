"""Operators that a plan with micro-batches adds: shares of values that all of them have, and pieces of whole results."""

from __future__ import annotations

from torch import Tensor

from shardwright.ir.instructions import PerRank, Ref
from shardwright.rules.lowering import Local


def share(value: Tensor, place: int, parts: int) -> Tensor:
    """Computes a micro-batch's share of a value that is the same for all of them; the shares add up to it.

    Args:
        value: the value.
        place: of the micro-batch, which makes its share another value than theirs.
        parts: number of shares.
    """
    return value / parts


def lowered_share(ranks: int, parts: int, local: Local) -> tuple[Ref, ...]:
    """Emits the call of :func:`share` for one of ``parts`` shares, on ``ranks`` ranks."""
    return (local.call(share, local.inputs[0], PerRank(lambda rank: rank // ranks), parts),)


def alias(value: Tensor) -> Tensor:
    """Returns the value."""
    return value.view_as(value)


def lowered_alias(local: Local) -> tuple[Ref, ...]:
    """Emits the call of :func:`alias`."""
    return (local.call(alias, local.inputs[0]),)
