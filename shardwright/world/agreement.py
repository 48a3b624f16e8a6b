"""What ranks must agree on before they begin: a rank that was handed something else would leave the others waiting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from shardwright.errors import WorldError


def check_same_shapes(shapes: Sequence[Sequence[int]], size: int) -> None:
    """Refuses slices of the batch that have other shapes on other ranks, on all ranks. All of them make this call.

    Args:
        shapes: of the tensors that this rank was handed.
        size: number of ranks.
    """
    found: list[Any] = [None] * size
    dist.all_gather_object(found, [list(shape) for shape in shapes])
    if any(other != found[0] for other in found):
        listed = "; ".join(f"rank {rank}: {', '.join(map(str, given))}" for rank, given in enumerate(found[:8]))
        raise WorldError(
            f"the ranks hand in slices of several shapes: {listed}; hand in as many rows on each, or the whole batch on all "
            "with dataset_strategy('full_batch')"
        )
