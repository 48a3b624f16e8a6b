"""Layouts as short texts and slice counts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from shardwright.ir.layout import Layout


def texts(layouts: Iterable[Layout]) -> str:
    """Returns the short texts of layouts, side by side."""
    return " | ".join(map(brief, layouts))


def brief(layout: Layout) -> str:
    """Returns the short text of a layout. Long lists of piece sizes are abbreviated.

    >>> brief(Layout.parse("dp[9 1 1 1 1 1 1 1] @ dp=8"))
    'dp[9 1 1 ... 1]'
    """
    return re.sub(r"\[(\d+ \d+ \d+)(?: \d+){4,}( \d+)\]", r"[\1 ...\2]", layout.short())


Counts = tuple[int, ...]


def counts_of(layout: Layout) -> Counts:
    """Counts the slices into which a layout cuts each dim.

    >>> counts_of(Layout((2, 4), ("dp", "tp"))(("dp", "tp"), "None"))
    (8, 1)
    """
    return tuple(math.prod(layout.mesh.axis_size(a) for a in axes) for axes in layout.bound)
