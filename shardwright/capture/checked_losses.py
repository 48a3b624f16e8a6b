"""Losses that look at values first, within torch: the look is a decision of the callable, the rest are operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def gaussian_nll_loss(
    decide: Callable[[Tensor], bool], input: Tensor, target: Tensor, var: Any, full: bool = False, eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor | None:  # fmt: skip
    """Computes ``torch.nn.functional.gaussian_nll_loss``, which raises an error where a variance is negative.

    Args:
        decide: decides by a boolean.
        input, target: means and values.
        var: variances.
        full, eps, reduction: as torch has them.

    Returns:
        The loss; ``None`` where torch reads no values: of a number as variance, and of arguments that it refuses.

    Raises:
        ValueError: a variance is negative.
    """
    if not isinstance(var, Tensor) or reduction not in ("none", "mean", "sum"):
        return None
    narrow = input.shape[:-1] == var.shape
    differ = sum(a != b for a, b in zip(input.shape, var.shape)) if input.dim() == var.dim() else 2
    if not narrow and differ > 1:
        return None
    if decide((var < 0).any()):
        raise ValueError("var has negative entry/entries")
    spread = var.unsqueeze(-1) if narrow and var.shape != input.shape else var
    with torch.no_grad():
        raised = spread.clamp(min=eps) - spread
    spread = spread + raised  # the gradient passes also where the variance is raised to eps
    constant = 0.5 * math.log(2 * math.pi) if full else 0.0
    loss = 0.5 * (spread.log() + (input - target).square() / spread) + constant
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


CHECKED = {F.gaussian_nll_loss: gaussian_nll_loss}
