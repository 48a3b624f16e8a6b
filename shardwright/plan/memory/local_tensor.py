"""Shape, strides and dtype of a tensor that a local call reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

Strides = tuple[int, ...]


class LocalTensor(NamedTuple):
    """Local shape, strides, dtype, and whether autograd makes a gradient for it."""

    shape: tuple[int, ...]
    stride: Strides
    dtype: torch.dtype
    needs_grad: bool

    @property
    def bytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Tells whether it lies in memory in the order of its dims."""
        return self.stride == contiguous_strides(self.shape)


def contiguous_strides(shape: Sequence[int]) -> Strides:
    """Computes the strides of a contiguous tensor.

    >>> contiguous_strides((2, 3, 4))
    (12, 4, 1)
    """
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
