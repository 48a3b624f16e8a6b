"""Derivatives: refuses second derivatives of backward passes that have none."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from shardwright.errors import ShardwrightError


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the backward of an ``autograd.Function`` refuse ``create_graph=True`` at once.

    torch's ``once_differentiable`` fails only if the second backward pass comes by. Where nothing else joins the gradient to
    the parameters, it does not, and ``torch.autograd.grad(..., allow_unused=True)`` would return ``None`` for a derivative.

    Raises:
        ShardwrightError: on a backward pass with ``create_graph=True``, not only when the second derivative is used.
    """

    @functools.wraps(backward)
    def only_once(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise ShardwrightError(
                "create_graph=True: this part of a parallel program has first derivatives only, second ones would be missing "
                "or wrong. Such are pipelines, GradAccumulation, programs with compile=, and cross entropies with split "
                "classes\n"
                "  Drop create_graph=True, leave that part out, or take the second derivatives of the model itself, outside of "
                "AutoParallel"
            )
        return backward(ctx, *gradients)

    return only_once


class _FirstOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gradients


def with_first_derivatives_only(values: list[Any]) -> list[Any]:
    """Returns values whose backward pass refuses to be differentiated, where their gradients have none of their own."""
    found = [with_first_derivatives_only(value) if type(value) is list else value for value in values]
    at = [i for i, value in enumerate(values) if isinstance(value, torch.Tensor) and value.requires_grad]
    for i, value in zip(at, _FirstOnly.apply(*[values[i] for i in at]) if at else ()):
        found[i] = value
    return found
