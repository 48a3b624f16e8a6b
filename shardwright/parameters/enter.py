"""Gives programs the local tensors of distributed parameters."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import get_gradient_edge
from torch.distributed.tensor import DTensor

from shardwright.base.torch_private import will_execute_node
from shardwright.parameters.handles import current
from shardwright.parameters.placements import _alike


def enter(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Returns the local tensors of many parameters, differentiably: their gradients become DTensor gradients.

    Each local gradient must be the parameter's piece of the whole gradient, reduced already. Frozen parameters give
    tensors without gradient.

    Args:
        parameters: DTensors; ordinary tensors among them are returned as they are.

    Returns:
        One local tensor per parameter, which shares its memory.
    """
    found: list[Any] = list(map(current, parameters))
    training = torch.is_grad_enabled()
    group: list[int] = []
    size = 0
    for i, parameter in enumerate(found):
        if type(parameter) is not DTensor:
            continue
        if not (training and parameter.requires_grad):
            found[i] = parameter._local_tensor.detach()
            continue
        group.append(i)
        size += parameter._local_tensor.nbytes
        if size >= _GROUP_BYTES:
            _enter_group(found, group)
            group, size = [], 0
    if group:
        _enter_group(found, group)
    return found


# Parameters enter in groups, so that the gradients of one group are delivered before those of the next are complete.
_GROUP_BYTES = 4 << 20


def _enter_group(found: list[Any], group: Sequence[int]) -> None:
    for i, local in zip(group, _Enter.apply(_sentinel().leaf, *[found[i] for i in group])):
        found[i] = local


class _Enter(torch.autograd.Function):
    """Autograd function from DTensor parameters to their local tensors, and from local gradients back.

    Autograd would accept a DTensor gradient for each parameter, at 9 us each. In an ordinary ``.backward()``, for a
    parameter without hooks, it is cheaper to do here what autograd's AccumulateGrad does: set ``.grad`` or add to it.
    """

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor, *parameters: Any) -> Any:
        ctx.set_materialize_grads(False)
        ctx.parameters = parameters
        return tuple([parameter._local_tensor.detach() for parameter in parameters])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        references = list(map(sys.getrefcount, gradients))
        if torch.is_grad_enabled():
            return None, *(g if g is None else _alike(p, g) for g, p in zip(gradients, ctx.parameters))
        _, node, alone = _sentinel()
        direct = will_execute_node(node)
        results: list[Any] = [None]
        for parameter, gradient, count in zip(ctx.parameters, gradients, references):
            if gradient is None:
                results.append(None)
                continue
            have = parameter.grad if parameter.is_leaf else None
            plain = direct and parameter.is_leaf and not (parameter._backward_hooks or parameter._post_accumulate_grad_hooks)
            if plain and type(have) is DTensor and have._spec.placements == parameter._spec.placements:
                have._local_tensor.add_(gradient)
                results.append(None)
                continue
            if not gradient.is_contiguous():
                gradient = gradient.contiguous()
            elif count > alone or gradient._use_count() > 1:
                gradient = gradient.clone()  # others hold it, and optimizers write into gradients
            whole = DTensor(gradient, parameter._spec, requires_grad=False)
            if plain and have is None:
                parameter.grad = whole
                results.append(None)
            else:
                results.append(whole)
        return tuple(results)


class _Sentinel(NamedTuple):
    """A leaf whose gradient nobody asks for, so that the engine visits its node only if it visits every leaf.

    ``alone``: the references that Python counts, in a backward function, to a gradient that nobody else holds.
    """

    leaf: torch.Tensor
    node: Any
    alone: int


@lru_cache(maxsize=1)
def _sentinel() -> _Sentinel:
    counts: list[int] = []

    class Count(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            counts.extend(map(sys.getrefcount, gradients))
            return gradients

    with torch.inference_mode(False), torch.enable_grad():
        leaf = torch.zeros((), device="cpu", requires_grad=True)
        (Count.apply(torch.zeros((), device="cpu", requires_grad=True)) * 2).backward()
    return _Sentinel(leaf, get_gradient_edge(leaf).node, counts[0])
