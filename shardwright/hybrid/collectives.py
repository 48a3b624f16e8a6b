"""Collectives by the name of a mesh axis, for per-rank programs.

They work in any code that runs on the ranks of a real job, and in models of ``AutoParallel(model, "hybrid_parallel")`` in
both worlds. Over an axis of one rank they are the identity. Gradients are those of the sum of what all ranks compute:
the gradient of an all-reduce is an all-reduce, of an all-gather a reduce-scatter, of a permutation its inverse.

All ranks of the axis make the same call, with tensors of one shape and dtype.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from shardwright.errors import ArgumentTypeError
from shardwright.hybrid.call import call, checked_dim, even, failed, participants, refuse_gradient
from shardwright.hybrid.mesh import current_mesh, current_tracing
from shardwright.hybrid.mesh import over as over
from shardwright.hybrid.owned_slice import own as own
from shardwright.hybrid.steps import Collective
from shardwright.world.current import current_world

__all__ = [
    "all_gather",
    "all_reduce",
    "all_to_all",
    "broadcast",
    "over",
    "own",
    "permute",
    "rank",
    "reduce_scatter",
    "size",
]


def size(axis: str = "dp") -> int:
    """Returns the number of ranks along an axis.

    >>> size("dp")
    8
    """
    return participants("size", axis)


def rank(axis: str = "dp") -> int:
    """Returns this rank's index along an axis. A program is captured once per answer.

    >>> from shardwright.ir.mesh import Mesh
    >>> with over(Mesh(("dp",), (1,))):
    ...     rank("dp")
    0
    """
    if participants("rank", axis) == 1:
        return 0
    tracing, now = current_tracing(), current_mesh()
    if tracing is not None:
        tracing.asked.add(axis)
        return now.position(axis, tracing.rank)
    here = current_world().rank_or_raise(
        lambda: failed("rank", f"this process simulates all {size(axis)} ranks of {axis!r}", "call it in the model")
    )
    return now.position(axis, here)


def all_reduce(x: Tensor, axis: str = "dp", op: str = "sum") -> Tensor:
    """Reduces all ranks' tensors and returns the result on each; the gradient is all-reduced too.

    Args:
        x: of one shape on all ranks.
        axis: the mesh axis.
        op: ``sum`` or ``mean``; ``max`` and ``min`` have no gradient, so ``x`` must not need one.

    >>> from shardwright.ir.mesh import Mesh
    >>> with over(Mesh(("dp",), (1,))):
    ...     all_reduce(torch.ones(2), "dp")
    tensor([1., 1.])
    """
    if op not in ("sum", "mean", "max", "min"):
        raise failed("all_reduce", f"op={op!r} is unknown", "use sum, mean, max or min")
    count = participants("all_reduce", axis, x)
    if op == "mean" and not (x.is_floating_point() or x.is_complex()):
        raise failed("all_reduce", f"op='mean' of {x.dtype}, which has no fractions", "hand in x.float(), or use sum")
    if count == 1:
        return x
    refuse_gradient("all_reduce", x, op)
    total = call(Collective("all_reduce", axis, "sum" if op == "mean" else op), x)
    return total / count if op == "mean" else total


def all_gather(x: Tensor, axis: str = "dp", dim: int = 0) -> Tensor:
    """Joins all ranks' tensors along a dim, on each rank; the gradient is reduce-scattered.

    Args:
        x: of one shape on all ranks.

    >>> from shardwright.ir.mesh import Mesh
    >>> with over(Mesh(("dp",), (1,))):
    ...     all_gather(torch.ones(2), "dp")
    tensor([1., 1.])
    """
    count = participants("all_gather", axis, x)
    dim = checked_dim("all_gather", x, "dim", dim)
    return x if count == 1 else call(Collective("all_gather", axis, numbers=(dim,)), x)


def reduce_scatter(x: Tensor, axis: str = "dp", dim: int = 0, op: str = "sum") -> Tensor:
    """Returns this rank's piece, along a dim, of the sum of all ranks' tensors; the gradient is all-gathered.

    Args:
        x: of one shape on all ranks, which divides along ``dim``.
        axis: the mesh axis.
        dim: the dim that is cut into pieces.
        op: as for :func:`all_reduce`.

    >>> from shardwright.ir.mesh import Mesh
    >>> with over(Mesh(("dp",), (1,))):
    ...     reduce_scatter(torch.ones(2), "dp")
    tensor([1., 1.])
    """
    if op not in ("sum", "mean", "max", "min"):
        raise failed("reduce_scatter", f"op={op!r} is unknown", "use sum, mean, max or min")
    count = participants("reduce_scatter", axis, x)
    dim = checked_dim("reduce_scatter", x, "dim", dim)
    even("reduce_scatter", x, dim, axis, count)
    if op == "mean" and not (x.is_floating_point() or x.is_complex()):
        raise failed("reduce_scatter", f"op='mean' of {x.dtype}, which has no fractions", "hand in x.float(), or use sum")
    if count == 1:
        return x
    refuse_gradient("reduce_scatter", x, op)
    total = call(Collective("reduce_scatter", axis, "sum" if op == "mean" else op, (dim,)), x)
    return total / count if op == "mean" else total


def all_to_all(x: Tensor, axis: str = "dp", split_dim: int = 0, concat_dim: int = 0) -> Tensor:
    """Sends each rank a piece along one dim, and joins the received pieces along another.

    The gradient goes the same way back.

    Args:
        x: of one shape on all ranks, which divides along ``split_dim``.
        axis: the mesh axis.
        split_dim: the dim that is cut.
        concat_dim: the dim along which received pieces are joined.

    Returns:
        What the ranks sent to this one, joined along ``concat_dim`` in their order.

    >>> from shardwright.ir.mesh import Mesh
    >>> with over(Mesh(("dp",), (1,))):
    ...     all_to_all(torch.ones(2), "dp", 0, 0)
    tensor([1., 1.])
    """
    count = participants("all_to_all", axis, x)
    split = checked_dim("all_to_all", x, "split_dim", split_dim)
    concat = checked_dim("all_to_all", x, "concat_dim", concat_dim)
    even("all_to_all", x, split, axis, count)
    if count == 1:
        return x
    if split != concat:
        return call(Collective("all_to_all", axis, numbers=(split, concat)), x)
    # the pieces become a dim of their own, and the ranks they come from another
    pieces = x.unflatten(split, (1, count, x.shape[split] // count))
    return call(Collective("all_to_all", axis, numbers=(split + 1, split)), pieces).flatten(split, split + 2)


def broadcast(x: Tensor, axis: str = "dp", source: int = 0) -> Tensor:
    """Returns one rank's tensor, on all ranks. Its gradient is the sum of the gradients on that rank, zero on others.

    Args:
        x: of one shape on all ranks.
        source: index along the axis of the rank whose tensor it is.

    >>> from shardwright.ir.mesh import Mesh
    >>> with over(Mesh(("dp",), (1,))):
    ...     broadcast(torch.ones(2), "dp")
    tensor([1., 1.])
    """
    count = participants("broadcast", axis, x)
    if type(source) is not int or not 0 <= source < count:
        raise failed("broadcast", f"source={source!r}", f"give the index of one of the {count} ranks along {axis!r}")
    if count == 1:
        return x
    collective = Collective("broadcast", axis, numbers=(source,))
    return call(collective, x) if x.ndim else call(collective, x.unsqueeze(0)).squeeze(0)


def permute(x: Tensor, axis: str = "dp", shift: int = 1, pairs: Iterable[tuple[int, int]] | None = None) -> Tensor:
    """Sends each rank's tensor to one other rank; the gradient travels back.

    Args:
        x: of one shape on all ranks.
        axis: the mesh axis.
        shift: by how many ranks along the axis, around its end: 1 sends to the next, -1 to the one before.
        pairs: in place of ``shift``, pairs of indices along the axis, from and to. A rank that nobody sends to gets zeros.

    Raises:
        ArgumentTypeError: the shift is not an int.

    >>> from shardwright.ir.mesh import Mesh
    >>> with over(Mesh(("dp",), (1,))):
    ...     permute(torch.ones(2), "dp")
    tensor([1., 1.])
    """
    count = participants("permute", axis, x)
    if pairs is None:
        if type(shift) is not int:
            raise ArgumentTypeError(f"permute(shift={shift!r}): give a number of ranks")
        senders = tuple((position - shift) % count for position in range(count))
    else:
        senders = _senders(list(pairs), count, axis)
    if senders == tuple(range(count)):
        return x
    if count == 1:
        return x.masked_fill(torch.ones((), dtype=torch.bool, device=x.device), 0)
    collective = Collective("permute", axis, numbers=senders)
    return call(collective, x) if x.ndim else call(collective, x.unsqueeze(0)).squeeze(0)


def _senders(pairs: list[Any], count: int, axis: str) -> tuple[int, ...]:
    senders = [-1] * count
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2 or not all(type(i) is int and 0 <= i < count for i in pair):
            raise failed("permute", f"pairs holds {pair!r}", f"give (from, to), two of the {count} indices along {axis!r}")
        if senders[pair[1]] >= 0 or pair[0] in senders:
            raise failed("permute", f"pairs {pairs} names a rank twice as sender or as receiver", "leave one of them out")
        senders[pair[1]] = pair[0]
    return tuple(senders)
