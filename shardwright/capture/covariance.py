"""Covariance: ``torch.cov`` and ``torch.corrcoef`` as the operators that they are made of; torch's read a number on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def covariance(x: Tensor, correction: int = 1, fweights: Tensor | None = None, aweights: Tensor | None = None) -> Tensor:
    """Computes ``torch.cov``.

    Args:
        x, correction, fweights, aweights: as for torch's.
    """
    rows = x if x.dim() == 2 else x.reshape(1, -1)
    given = [w for w in (fweights, aweights) if w is not None]
    count: Any = rows.shape[1]
    weights = None
    if given:
        weights = (given[0] if len(given) == 1 else given[0] * given[1]).to(rows.dtype)
        count = weights.sum()
    mean = (rows if weights is None else rows * weights).sum(1, keepdim=True) / count
    free = count - correction
    if weights is not None and aweights is not None and correction:
        free = count - correction * (weights * aweights).sum() / count
    free = free.clamp(min=0) if isinstance(free, Tensor) else max(free, 0)
    centred = rows - mean
    weighted = centred if weights is None else centred * weights
    return ((weighted @ centred.t().conj()) / free).squeeze()


def correlation(x: Tensor) -> Tensor:
    """Computes ``torch.corrcoef``."""
    found = covariance(x)
    if not found.dim():
        return found / found
    variance = found.diagonal()
    deviation = (variance.real if variance.is_complex() else variance).sqrt()
    found = found / deviation[:, None] / deviation
    if found.is_complex():
        return torch.complex(found.real.clip(-1, 1), found.imag.clip(-1, 1))
    return found.clip(-1, 1)
