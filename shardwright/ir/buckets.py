"""Buckets: moves of a program that share collectives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Buckets:
    """Rules for grouping moves of one kind into buckets that share a collective.

    Args:
        bytes: bytes of global gradients (or gathered parameters) from which a bucket is full; 0: no moves share.
        starts: positions at which buckets begin, counted in moves of the kind in the order in which they are read; used
            instead of ``bytes``.
    """

    bytes: int = 0
    starts: tuple[int, ...] | None = None


@dataclass(frozen=True)
class MoveBuckets:
    """Settings for which moves of a program share collectives, and which are worth starting early.

    Args:
        small: bytes of a local tensor up to which moves share collectives.
        bucket: most bytes that share one collective.
        large: bytes of a local tensor from which a move is worth starting early.
        sums: buckets of moves that only sum gradients.
        gathers: buckets of moves that gather parameters.
        ids: bucket number by name of the program's input: those with the same number share; 0 shares with none.
    """

    small: int = 1 << 16
    bucket: int = 1 << 20
    large: int = 1 << 16
    sums: Buckets = Buckets(16 << 20)
    gathers: Buckets = Buckets(4 << 20)
    ids: Mapping[str, int] = field(default_factory=dict)
