"""Multi-copy: the batch of one step in several copies, so that one computes while another communicates.

:class:`MicroBatchInterleaved` runs a network once for each part of its batch. In plain PyTorch that is all. Within an
``AutoParallel`` the operators of each copy are marked, and :mod:`shardwright.train.copies.turns` orders them so that the copies
take turns.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.base.torch_private import pytree
from shardwright.capture.session import current_session
from shardwright.errors import ArgumentTypeError, ShardwrightError

REDUCTIONS = ("mean", "sum")


class MicroBatchInterleaved(nn.Module):
    """A network that runs on several parts of its batch, each a copy of the computation.

    Every tensor input whose dim 0 is the batch, which is dim 0 of the first tensor input, is cut along it into
    ``interleave_num`` equal parts; every copy gets everything else as it is. Results are joined:

    - floating-point scalars, such as a mean loss, are averaged: that is the mean over the whole batch;
    - whole numbers, such as a count of right answers, are added;
    - other tensors, such as logits, are concatenated along dim 0;
    - anything that is no tensor has to be the same in all copies.

    Parameters are shared: their gradients are those of the result. Statistics over the batch, as of batch norm, are those of
    each copy, one after the other, here as on a single device.

    Args:
        network: the module. Its parameters are called ``network.…`` here.
        interleave_num: number of copies.
        reduction: ``"mean"``, or ``"sum"`` to add floating-point scalars up: a loss, and with it every gradient, is then
            ``interleave_num`` times the mean.

    Raises:
        TypeError: a network that is no module, a number that is no int.
        ShardwrightError: a number below 1, an unknown reduction; when called, a batch that does not divide by the number,
            results that cannot be joined.

    >>> net = MicroBatchInterleaved(nn.Linear(4, 2), interleave_num=2)
    >>> net(torch.ones(6, 4)).shape
    torch.Size([6, 2])
    """

    wraps_network = True  # checkpoints have the network's own names

    def __init__(self, network: nn.Module, interleave_num: int = 2, reduction: str = "mean"):
        super().__init__()
        if not isinstance(network, nn.Module):
            raise ArgumentTypeError(f"MicroBatchInterleaved({network!r}): give an nn.Module")
        if not isinstance(interleave_num, int) or isinstance(interleave_num, bool):
            raise ArgumentTypeError(f"MicroBatchInterleaved(interleave_num={interleave_num!r}): give an int, 2 say")
        if interleave_num < 1:
            raise ShardwrightError(f"MicroBatchInterleaved(interleave_num={interleave_num}): give 1 copy or more, 2 say")
        if reduction not in REDUCTIONS:
            raise ShardwrightError(f"MicroBatchInterleaved(reduction={reduction!r}): give 'mean' or 'sum'")
        self.network, self.interleave_num, self.reduction = network, interleave_num, reduction

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        batch = _batch_size(leaves)
        if batch % self.interleave_num:
            raise ShardwrightError(
                f"MicroBatchInterleaved({_name(self.network)}): dim 0 of the inputs has size {batch}, which "
                f"{self.interleave_num} copies do not divide; give a batch that "
                f"is a multiple of {self.interleave_num}, or another interleave_num"
            )
        size = batch // self.interleave_num
        now = current_session()
        group = now.new_group() if now is not None else 0
        results = []
        for index in range(self.interleave_num):
            with now.copy(group, index) if now is not None else nullcontext():
                with _of_batch():
                    own = [leaf.narrow(0, index * size, size) if _has_batch(leaf, batch) else leaf for leaf in leaves]
                own_args, own_kwargs = pytree.tree_unflatten(own, spec)
                results.append(self.network(*own_args, **own_kwargs))
        return self._joined(results, size)

    def _joined(self, results: Sequence[Any], size: int) -> Any:
        flat = [pytree.tree_flatten(result) for result in results]
        spec = flat[0][1]
        if any(other != spec for _, other in flat):
            raise ShardwrightError(
                f"MicroBatchInterleaved: {_name(self.network)} returns other structures for other copies, "
                f"{' and '.join(str(s) for _, s in flat)}; return the same for every part of a batch"
            )
        parts = zip(*(leaves for leaves, _ in flat), strict=True)
        return pytree.tree_unflatten([self._joined_leaf(list(part), size) for part in parts], spec)

    def _joined_leaf(self, parts: list[Any], size: int) -> Any:
        first = parts[0]
        if not isinstance(first, Tensor):
            if any(part != first for part in parts):
                raise ShardwrightError(
                    f"MicroBatchInterleaved: {_name(self.network)} returns {first!r} for one copy and "
                    f"{next(p for p in parts if p != first)!r} for another; return a tensor, which can be put together"
                )
            return first
        if first.ndim == 0:
            if first.dtype == torch.bool:
                raise ShardwrightError(
                    f"MicroBatchInterleaved: {_name(self.network)} returns a boolean scalar, and copies may differ in it; "
                    "return a count"
                )
            total = functools.reduce(operator.add, parts)
            averages = self.reduction == "mean" and (first.is_floating_point() or first.is_complex())
            return total / self.interleave_num if averages else total
        if first.shape[0] % size if size else first.shape[0]:
            raise ShardwrightError(
                f"MicroBatchInterleaved: {_name(self.network)} returns a tensor {list(first.shape)} for {size} samples, "
                f"and copies are put together along dim 0, which {size} does not divide; return it with the batch in dim 0"
            )
        with _of_batch():
            return torch.cat(parts, 0)

    def extra_repr(self) -> str:
        return f"interleave_num={self.interleave_num}, reduction={self.reduction!r}"


def _batch_size(leaves: Sequence[Any]) -> int:
    """Returns the dim 0 of the first tensor input that has dims."""
    first = next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), None)
    if first is None:
        raise ShardwrightError("MicroBatchInterleaved: no input is a tensor with a batch to cut; give one")
    return int(first.shape[0])


def _has_batch(leaf: Any, batch: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch


def _of_batch() -> AbstractContextManager[None]:
    now = current_session()
    return now.of_batch() if now is not None else nullcontext()


def _name(network: nn.Module) -> str:
    return type(network).__name__
