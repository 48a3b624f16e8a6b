"""Sums over micro-batches: operators that may read them pending, and values that are shared out to be added to one."""

from __future__ import annotations

from torch import Tensor

from shardwright.ir.graph import Node
from shardwright.ir.instructions import PerRank, Ref
from shardwright.ir.signature import Signature
from shardwright.rules.lowering import Local
from shardwright.rules.pointwise import ADDS, adds_constant, is_linear_alone


def share(value: Tensor, place: int, parts: int) -> Tensor:
    """Computes a micro-batch's share of a value that is the same for all of them; the shares add up to it.

    Args:
        value: the value.
        place: of the micro-batch, which makes its share another value than theirs.
        parts: number of shares.
    """
    return value / parts


def emit_share(ranks: int, parts: int, local: Local) -> tuple[Ref, ...]:
    """Emits the call of :func:`share`, with the place of the micro-batch.

    Args:
        ranks: of the stage.
        parts: number of shares.
        local: the operator.
    """
    return (local.call(share, local.inputs[0], PerRank(lambda rank: rank // ranks), parts),)


def alias(value: Tensor) -> Tensor:
    """Returns the value."""
    return value.view_as(value)


def emit_alias(local: Local) -> tuple[Ref, ...]:
    """Emits the call of :func:`alias`."""
    return (local.call(alias, local.inputs[0]),)


def linear_group(node: Node, signature: Signature, sums: set[int]) -> frozenset[int] | None:
    """Returns the inputs in which an operator is linear together, if the sums are among them."""
    if node.op.name in ADDS and len(node.op.inputs) == 2:
        return frozenset((0, 1))
    if adds_constant(node.op) is not None:
        return frozenset((0,))
    if len(sums) == 1 and is_linear_alone(node.op, next(iter(sums))):
        return frozenset(sums)
    return next((g for g in signature.linear if sums <= g), None)
