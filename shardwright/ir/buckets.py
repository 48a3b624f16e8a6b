"""Buckets: which moves of a program share collectives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Buckets:
    """How moves of parameters of one kind are put into buckets.

    Args:
        bytes: of whole gradients (or gathered parameters) from which a bucket is full; 0: every move is alone.
        starts: where buckets begin, counted in moves of the kind in the order in which they are read; in place of bytes.
    """

    bytes: int = 0
    starts: tuple[int, ...] | None = None


@dataclass(frozen=True)
class MoveBuckets:
    """Says which moves of a program share collectives, and which are worth starting early.

    Args:
        small: bytes of a local tensor up to which moves share collectives.
        bucket: bytes that share one collective at most.
        large: bytes of a local tensor from which a move is worth starting early.
        sums: buckets of moves that only sum gradients; ``gathers`` of those that gather parameters.
        ids: buckets by name of the program's input: those with the same number share, 0 is alone.
    """

    small: int = 1 << 16
    bucket: int = 1 << 20
    large: int = 1 << 16
    sums: Buckets = Buckets(16 << 20)
    gathers: Buckets = Buckets(4 << 20)
    ids: Mapping[str, int] = field(default_factory=dict)
