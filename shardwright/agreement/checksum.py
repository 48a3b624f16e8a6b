"""Checksums that tell whether ranks hold the same tensor."""

from __future__ import annotations

from functools import lru_cache

import torch

_COLUMNS = 4093  # a prime, so that rows of any usual width do not fall on the same columns


def checksum(value: torch.Tensor) -> int:
    """Computes a number that differs, in all likelihood, where the bits differ; one pass over the value."""
    whole = value.detach().reshape(-1)
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32}
    bits = whole.view(kinds.get(whole.element_size(), torch.int64))
    sums = _columns(bits, torch.int64)
    return int((sums * _weights(sums.device)).sum()) >> 1


@lru_cache(maxsize=16)
def _weights(device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.arange(1, _COLUMNS + 1, device=device) * 0x1E3779B97F4A7C15  # wraps around


def sketch(value: torch.Tensor) -> list[float]:
    """Computes a few numbers that are near where the values of floating tensors are near: the norm and four projections.

    Projections of other values differ by about the norm of the difference; where only rounding differs, they differ as little.
    """
    whole = value.detach().reshape(-1)
    if whole.is_complex():
        whole = torch.view_as_real(whole).reshape(-1)
    if whole.dtype.itemsize < 4:
        whole = whole.float()  # of some narrow dtypes there are no sums
    whole = whole.nan_to_num(0.0, 1.0, -1.0)
    norm = torch.linalg.vector_norm(whole, dtype=torch.float64)
    at = torch.arange(1, _COLUMNS + 1, device=whole.device, dtype=torch.float64)
    waves = torch.stack([torch.cos(at * at * step) for step in (0.7548, 1.3247, 2.2361, 2.6458)])
    return [float(n) for n in torch.cat([norm.view(1), waves @ _columns(whole, torch.float64)]).tolist()]


def _columns(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sums a flat tensor, laid out in rows of many columns, over its rows."""
    tail = len(values) % _COLUMNS
    sums = values[: len(values) - tail].view(-1, _COLUMNS).sum(0, dtype=dtype)
    sums[:tail] += values[len(values) - tail :].to(dtype)
    return sums
