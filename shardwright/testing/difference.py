"""Difference of two values, in units of their rounding."""

from __future__ import annotations

from typing import Any

import torch


def difference(expected: Any, got: Any, tolerance: float, floor: float = 1e-30) -> str | None:
    """Describes the difference of two tensors beyond ``tolerance``; ``None`` if there is none.

    Differences are relative to the largest magnitude, or to ``floor`` where that is larger: a gradient that is zero by
    cancellation is nothing but rounding.

    Args:
        expected, got: the tensors, or other values, to compare.
        tolerance: largest difference allowed, relative to the largest magnitude.
        floor: smallest magnitude that differences are relative to.
    """
    if expected is None or got is None:
        nonzero = [t for t in (expected, got) if t is not None and bool((t != 0).any())]
        return "one of the two has no gradient" if nonzero else None
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return f"{tuple(got.shape)} {got.dtype} instead of {tuple(expected.shape)} {expected.dtype}"
    if not expected.numel():
        return None
    if not expected.is_floating_point() and not expected.is_complex():
        return None if torch.equal(expected, got) else f"{int((expected != got).sum())} elements differ"
    same = (expected == got) | (expected.isnan() & got.isnan())
    error = torch.where(same, torch.zeros_like(expected.abs()), (expected - got).abs())
    scale = torch.nan_to_num(expected.abs(), 0, 0, 0).max().clamp_min(floor)
    worst = float(error.max() / scale)
    return None if worst <= tolerance else f"relative difference {worst:.2e}"
