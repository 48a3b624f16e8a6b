"""Memory: bytes that a rank holds of tensors and that operators keep, in closed form."""

from __future__ import annotations

from typing import Any

import numpy as np

from shardwright.cost.saved import Saved

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
