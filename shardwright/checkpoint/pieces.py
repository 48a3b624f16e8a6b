"""Pieces: which slice of a tensor this rank holds, and which rank writes it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from shardwright.errors import WorldError
from shardwright.parameters.placements import layout_of

Bounds = tuple[tuple[int, int], ...]


class Piece(NamedTuple):
    """What this rank holds of a tensor: start and stop of each dim, the memory, and whether this rank writes it."""

    bounds: Bounds
    local: Tensor
    is_written: bool


def rank() -> int:
    """Returns the rank of this process, 0 where it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def piece_of(name: str, tensor: Tensor) -> Piece | None:
    """Returns what this rank holds of a tensor; ``None`` if it holds nothing.

    Raises:
        WorldError: ranks hold terms of a sum, or the tensor has no layout.
    """
    if not isinstance(tensor, DTensor):
        return Piece(tuple((0, n) for n in tensor.shape), tensor.detach(), rank() == 0)
    layout = layout_of(tensor)
    if layout is None:
        raise WorldError(f"{name} {list(tensor.shape)} is distributed in no layout: give sw.full_value of it in its place")
    by_rank = layout.bounds(tuple(tensor.shape))
    mine = by_rank.get(rank())
    if mine is None:
        return None
    writer = min(other for other, bounds in by_rank.items() if bounds == mine)
    return Piece(mine, tensor.to_local().detach(), writer == rank())


def gathered(value: Any) -> list[Any]:
    """Returns the plain value of every rank."""
    if not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def agree(problems: list[str], what: str) -> None:
    """Raises the problems of all ranks on all ranks, or does nothing.

    Raises:
        WorldError: there is a problem.
    """
    found = list(dict.fromkeys(line for lines in gathered(problems) for line in lines))
    if found:
        listed = "\n".join(f"  {i}. {line}" for i, line in enumerate(found, 1))
        raise WorldError(f"{what}: {len(found)} problem{'s' * (len(found) > 1)}, nothing was changed\n{listed}")


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name of a dtype.

    >>> dtype_name(torch.float32)
    'float32'
    """
    return str(dtype).removeprefix("torch.")
