"""Collectives of the backend, such as NCCL's, as algorithms beside our own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwright.world.distributed.messages import Algorithm, Messenger, Reduction, plain
from shardwright.world.distributed.operations import Operation, _Later
from shardwright.world.execute.summation import prepare_reduce

# The names before torch 2.13 and since.
_all_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_REDUCE = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


def _nothing(run: Callable[[Tensor], Tensor]) -> Operation:
    """Makes an operation that moves nothing."""
    return Operation(lambda dtype: ("nothing", Algorithm(run, lambda result: result, run)), _Later())


def _empty(x: Tensor) -> Tensor:
    return x.new_empty(0)


def _backend_algorithm(
    call: Callable[[Tensor, bool], tuple[Any, Any]], end: Callable[[Any], Tensor] | None = None
) -> Algorithm:
    """Makes an algorithm of one collective of the backend and an optional local step.

    Args:
        call: a function of the tensor and whether to return before the end; returns the work, and what ``end`` needs.
        end: the local step.
    """

    def begin(x: Tensor) -> Any:
        return call(x, True)

    def finish(state: Any) -> Tensor:
        work, value = state
        work.wait()
        return value if end is None else end(value)  # type: ignore[no-any-return]

    def run(x: Tensor) -> Tensor:
        _, value = call(x, False)
        return value if end is None else end(value)  # type: ignore[no-any-return]

    return Algorithm(begin, finish, run)


def _backend_all_reduce(link: Messenger, op: str, inplace: bool) -> Algorithm:
    reduce_op = _REDUCE[op]

    def call(x: Tensor, later: bool) -> tuple[Any, Tensor]:
        x = plain(x)
        out = x if inplace else x.clone()
        return dist.all_reduce(out, reduce_op, link.group, later), out

    return _backend_algorithm(call)


def _backend_copies(link: Messenger, how: Reduction) -> Algorithm:
    """All-reduces a dtype that the backend does not reduce: gathers all tensors on each rank, and combines them."""
    combine, n = prepare_reduce(how.dtype, how.op, link.size), link.size

    def call(x: Tensor, later: bool) -> tuple[Any, Any]:
        x = plain(x)
        out = x.new_empty(n * x.numel())
        work = _all_to_all(link, out, x.view(-1).repeat(n), None, None, later)
        result = torch.empty_like(x)
        return work, (out.split(x.numel()), result, result.view(-1))

    def end(value: Any) -> Tensor:
        parts, result, out = value
        combine([parts[m] for m in how.order], out)
        return result  # type: ignore[no-any-return]

    return _backend_algorithm(call, end)


def _backend_reduce_scatter(link: Messenger, sizes: Sequence[int], op: str) -> Algorithm:
    reduce_op, own = _REDUCE[op], sizes[link.position]

    def call(x: Tensor, later: bool) -> tuple[Any, Tensor]:
        out = x.new_empty(own)
        return _reduce_scatter_single(out, plain(x), reduce_op, link.group, later), out

    return _backend_algorithm(call)


def _backend_scatter_reduce(link: Messenger, sizes: Sequence[int], how: Reduction) -> Algorithm:
    """Reduce-scatters by the backend's all-to-all, and combines locally."""
    combine, n, own = prepare_reduce(how.dtype, how.op, link.size), link.size, sizes[link.position]
    even = len(set(sizes)) == 1
    received, sent = (None, None) if even else ([own] * n, list(sizes))

    def call(x: Tensor, later: bool) -> tuple[Any, Any]:
        out = x.new_empty(n * own)
        return _all_to_all(link, out, plain(x), received, sent, later), (out.view(n, own).unbind(), x.new_empty(own))

    def end(value: Any) -> Tensor:
        parts, result = value
        return combine([parts[m] for m in how.order], result)

    return _backend_algorithm(call, end)


def _backend_all_gather(link: Messenger, total: int) -> Algorithm:
    def call(x: Tensor, later: bool) -> tuple[Any, Tensor]:
        out = x.new_empty(total)
        into, piece = out, plain(x).view(-1)
        if x.dtype not in _MOVABLE:
            into, piece = into.view(torch.uint8), piece.view(torch.uint8)
        return _all_gather_single(into, piece, link.group, later), out

    return _backend_algorithm(call)


def _backend_uneven_gather(link: Messenger, sizes: Sequence[int]) -> Algorithm:
    """All-gathers pieces of several sizes by the backend's all-to-all of copies."""
    n, total, received, sent = link.size, sum(sizes), list(sizes), [sizes[link.position]] * link.size

    def call(x: Tensor, later: bool) -> tuple[Any, Tensor]:
        out = x.new_empty(total)
        return _all_to_all(link, out, plain(x).view(-1).repeat(n), received, sent, later), out

    return _backend_algorithm(call)


def _backend_exchange(link: Messenger, sent: Sequence[int], received: Sequence[int]) -> Algorithm:
    total, takes, gives = sum(received), list(received), list(sent)

    def call(x: Tensor, later: bool) -> tuple[Any, Tensor]:
        out = x.new_empty(total)
        return _all_to_all(link, out, plain(x), takes, gives, later), out

    return _backend_algorithm(call)


def _all_to_all(
    link: Messenger, out: Tensor, packed: Tensor, received: list[int] | None, sent: list[int] | None, later: bool
) -> Any:
    """Runs the backend's all-to-all on flat tensors.

    Args:
        link: the process group.
        out, packed: the tensors to receive into and to send.
        received, sent: elements per member, where they are not all the same.
        later: whether to return before the end.
    """
    if packed.dtype not in _MOVABLE:
        width = packed.dtype.itemsize
        out, packed = out.view(torch.uint8), packed.view(torch.uint8)
        received = None if received is None else [n * width for n in received]
        sent = None if sent is None else [n * width for n in sent]
    return dist.all_to_all_single(out, packed, received, sent, link.group, later)


_WHOLE = frozenset({torch.uint8, torch.int8, torch.int32, torch.int64})
# What gloo and NCCL reduce. (gloo adds bools as bytes, which makes a bool of 2; neither knows int16.)
_REDUCIBLE = _WHOLE | {
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
}
_MOVABLE = _REDUCIBLE | {torch.bool}  # dtypes that they move; others travel as bytes
