"""Memory: bytes that a rank holds of tensors and that operators keep, in closed form."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from shardwright.cost.saved import Saved
from shardwright.layout import Layout

Array = np.ndarray[Any, Any]


def kept_bytes(saved: Saved, input_bytes: Array, output_bytes: Array, fraction: Array) -> Array:
    """Bytes that an operator keeps for its backward, for each of ``C`` choices.

    Args:
        input_bytes, output_bytes: ``(I, C)`` and ``(O, C)``, what a rank holds of each tensor.
        fraction: ``(C,)``, share of the operator's work that a rank does; what is neither input nor output scales with it.
    """
    total = saved.extra * fraction
    for i in saved.inputs:
        total = total + input_bytes[i]
    for o in saved.outputs:
        if o < len(output_bytes):
            total = total + output_bytes[o]
    return np.asarray(total, dtype=float)


@lru_cache(maxsize=65536)
def local_bytes(layout: Layout, shape: tuple[int, ...], itemsize: int) -> float:
    """Bytes of the largest piece of a tensor of global ``shape``; without looking at every rank.

    >>> local_bytes(Layout((2, 4), ("dp", "tp"))("dp", "tp"), (5, 8), 4)
    24.0
    """
    total = float(itemsize)
    for size, axes, explicit in zip(shape, layout.bound, layout.sizes):
        piece = max(explicit) if explicit is not None else size
        if explicit is None:
            for axis in axes:
                piece = -(-piece // layout.mesh.axis_size(axis))
        total *= piece
    return total
