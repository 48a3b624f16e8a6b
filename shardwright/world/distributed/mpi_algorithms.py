"""Collectives of MPI as algorithms beside our own: MPI moves what each member needs, and the member adds it up itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardwright.world.distributed.messages import Algorithm, Messenger, Reduction, both, plain
from shardwright.world.execute.summation import prepare_reduce


def mpi_all_reduce(link: Messenger, count: int, how: Reduction, inplace: bool) -> Algorithm:
    """All-reduces ``count`` elements, of which each member gets all members' and combines them.

    Args:
        link: the communicator.
        count: elements.
        how: how contributions are combined.
        inplace: whether the result may overwrite the argument.
    """
    combine = prepare_reduce(how.dtype, how.op, link.size)

    def begin(x: Tensor) -> Any:
        x = plain(x)
        memory = link.scratch.take(link.size * count, how.dtype)
        parts = memory[: link.size * count]
        return link.group.gather(parts, x, None), parts.split(count), memory, x if inplace else torch.empty_like(x)

    def finish(state: Any) -> Tensor:
        work, parts, memory, result = state
        work.wait()
        combine([parts[m] for m in how.order], result.view(-1))
        link.scratch.give(memory)
        return result  # type: ignore[no-any-return]

    return both(begin, finish)


def mpi_reduce_scatter(link: Messenger, sizes: Sequence[int], how: Reduction) -> Algorithm:
    """Reduce-scatters a flat tensor: each member gets its piece from all, and combines them."""
    own = sizes[link.position]
    combine, received = prepare_reduce(how.dtype, how.op, link.size), [own] * link.size

    def begin(x: Tensor) -> Any:
        memory = link.scratch.take(link.size * own, how.dtype)
        parts = memory[: link.size * own]
        return link.group.exchange(parts, plain(x), received, sizes), parts, memory, x.new_empty(own)

    def finish(state: Any) -> Tensor:
        work, flat, memory, result = state
        work.wait()
        if own:
            parts = flat.split(own)
            combine([parts[m] for m in how.order], result)
        link.scratch.give(memory)
        return result  # type: ignore[no-any-return]

    return both(begin, finish)


def mpi_all_gather(link: Messenger, sizes: Sequence[int]) -> Algorithm:
    """All-gathers flat pieces."""
    total, uneven = sum(sizes), None if len(set(sizes)) == 1 else sizes

    def begin(x: Tensor) -> Any:
        out = x.new_empty(total)
        return link.group.gather(out, plain(x), uneven), out

    return both(begin, _end)


def mpi_exchange(link: Messenger, sent: Sequence[int], received: Sequence[int]) -> Algorithm:
    """Exchanges flat tensors among the members."""
    total = sum(received)

    def begin(x: Tensor) -> Any:
        out = x.new_empty(total)
        return link.group.exchange(out, plain(x), received, sent), out

    return both(begin, _end)


def _end(state: Any) -> Tensor:
    work, out = state
    work.wait()
    return out  # type: ignore[no-any-return]
