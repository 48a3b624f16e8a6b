"""Makes loss scaling find infinite gradients on all ranks or on none.

``torch.amp.GradScaler`` asks one operator about all gradients of a dtype. For DTensors torch runs it on the local pieces
and takes the maximum over the axes that split the *first* gradient: where that one is replicated, a rank whose piece of
another overflows skips the step alone. Here the maximum is taken over all axes that split any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shardwright.base.operators import CHECKS_AND_UNSCALES
from shardwright.base.torch_private import replace_dtensor_handler


@lru_cache(maxsize=1)
def agree_on_found_inf() -> None:
    """Makes ``GradScaler`` right for all DTensors, for as long as this process lives."""
    replace_dtensor_handler(CHECKS_AND_UNSCALES, _handler)


def _handler(otherwise: Callable[..., Any]) -> Callable[..., Any]:
    def check_and_unscale(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        gradients, found_inf, inverse_scale = args
        if isinstance(found_inf, DTensor) or isinstance(inverse_scale, DTensor):
            return otherwise(operator, args, kwargs)
        operator([g.to_local() if isinstance(g, DTensor) else g for g in gradients], found_inf, inverse_scale)
        _largest(found_inf, gradients)

    return check_and_unscale


def _largest(found_inf: Tensor, gradients: Sequence[Tensor]) -> None:
    """Replaces ``found_inf`` by the largest among ranks with other pieces of the gradients."""
    splits: dict[DeviceMesh, set[int]] = {}
    for gradient in gradients:
        if isinstance(gradient, DTensor):
            split = {i for i, placement in enumerate(gradient.placements) if not placement.is_replicate()}
            splits.setdefault(gradient.device_mesh, set()).update(split)
    for mesh, dims in splits.items():
        if len(dims) > 1 and mesh.size() == dist.get_world_size():
            dist.all_reduce(found_inf, dist.ReduceOp.MAX)
            continue
        for dim in sorted(dims):
            dist.all_reduce(found_inf, dist.ReduceOp.MAX, group=mesh.get_group(dim))
