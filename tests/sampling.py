"""Sampling: of many generated cases ``make test`` runs some, the same ones every time; ``make test-all`` runs them all.

A test function with many parameters stands for as many cases. Each case that is left out is run by ``make test-all``, by
``pytest`` on its file, and by whoever names it. Of tests marked ``whole``, whose cases are written by hand (pages, docstrings,
maps), none is left out.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

IS_ON = os.environ.get("SHARDWRIGHT_TEST_SAMPLE") == "1"
SHARE = 0.05
LEAST = 2  # cases of a test function that run in any case


def sampled(cases: Sequence[T], names: Sequence[str], share: float = SHARE, least: int = LEAST) -> list[T]:
    """Returns a share of the cases, in their order: those whose names have the smallest checksums.

    >>> sampled(range(10), [f"case {i}" for i in range(10)], share=0.3)
    [0, 4, 8]
    """
    count = max(least, round(share * len(cases)))
    order = sorted(range(len(cases)), key=lambda at: (zlib.crc32(names[at].encode()), at))
    return [cases[at] for at in sorted(order[:count])]
