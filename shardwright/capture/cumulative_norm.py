"""Cumulative norm: batch norms without a momentum, whose statistics are the means over all batches."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from shardwright.base.torch_private import batch_norm_forward


def norm_forward(norm: Any, x: Tensor) -> Tensor:
    """Replaces the forward of batch norms in a capture: torch's reads the count of batches as a number, which differs in each.

    Args:
        norm: the module.
        x: what is normalised.
    """
    counts = norm.training and norm.track_running_stats and norm.num_batches_tracked is not None
    if norm.momentum is not None or not counts or norm.running_mean is None:
        return batch_norm_forward(norm, x)  # type: ignore[no-any-return]
    norm._check_input_dim(x)
    norm.num_batches_tracked.add_(1)
    mean, variance = norm.running_mean.clone(), norm.running_var.clone()
    result = F.batch_norm(x, mean, variance, norm.weight, norm.bias, True, 1.0, norm.eps)  # statistics of this batch alone
    share = 1.0 / norm.num_batches_tracked.to(mean.dtype)
    norm.running_mean.copy_(norm.running_mean * (1.0 - share) + mean * share)
    norm.running_var.copy_(norm.running_var * (1.0 - share) + variance * share)
    return result
