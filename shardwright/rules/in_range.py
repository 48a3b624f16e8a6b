"""In range: raises the single device's error for indices out of range, where ranks look up in pieces.

A rank that holds a piece of a dim takes indices outside of it for another rank's, so the check needs the size of the whole dim.
Ranks that share a dim hold the same indices, so all of them raise. Among ranks with different indices only those that find a
wrong one raise, and the job ends with them. On a CPU the check is one pass over the indices, before anything is sent; on other
devices it is the device's own assertion, which does not wait.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shardwright.errors import IndexRangeError

aten = torch.ops.aten


def check_in_range(indices: Tensor, size: int, what: str, ignored: int | None = None) -> None:
    """Raises an error for indices below 0 or not below ``size``.

    Args:
        indices: the local indices.
        size: global size of the dim.
        what: name of what is indexed, for the error.
        ignored: an index that means none.

    Raises:
        IndexRangeError: on a CPU.

    >>> check_in_range(torch.tensor([0, -100, 2]), 3, "class", ignored=-100)
    """
    if torch.compiler.is_compiling() or indices.device.type not in ("cpu", "meta"):
        is_right = (indices >= 0) & (indices < size)
        is_right = is_right if ignored is None else is_right | (indices == ignored)
        aten._assert_async.msg(is_right.all(), f"index out of range: a {what} is not one of {size}")
        return
    if indices.device.type == "meta" or type(indices) is not Tensor or not indices.numel():
        return  # fake or meta tensors have no values
    low, high = map(int, indices.aminmax())
    if low >= 0 and high < size:
        return
    is_wrong = (indices < 0) | (indices >= size)
    wrong = indices[is_wrong if ignored is None else is_wrong & (indices != ignored)]
    if wrong.numel():
        raise IndexRangeError(f"index out of range: {what} {int(wrong[0])} of {size}, give one from 0 to {size - 1}")
