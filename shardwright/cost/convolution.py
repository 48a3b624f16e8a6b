"""Convolutions: counts the operations that kernels spend on padded channels.

A kernel holds a block of channels in a vector and computes them together, so that a few channels take as long as a block of
them: oneDNN's on CPUs have 16 (Georganas et al., "Anatomy of high-performance deep learning convolutions on SIMD
architectures", 2018). Both the channels that are read and those that are made come in blocks, but for:

- a tensor with fewer channels than a block is read as it is, so that only the output is padded;
- the weight of a convolution on a picture, which has at most three colours, gets its gradient in the same way;
- a depthwise convolution has blocks of as many groups.

A convolution whose filters are one point, in one group, is a matrix product and is computed as one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from shardwright.ir.operator import Operator
from shardwright.rules.traits import traits_of

Array = np.ndarray[Any, Any]

_COLOURS = 3


class Channels(NamedTuple):
    """Channels of a convolution, as numbers or as arrays over choices.

    Args:
        made, read: channels of a group, of the output and of the input.
        groups: number of groups, 1 or more; which of them a rank has does not matter.
        transposed: whether it is a transposed convolution, which reads like the gradient of another one.
    """

    made: Any
    read: Any
    groups: int = 1
    transposed: bool = False


def is_transposed(op: Operator) -> bool:
    """Tells whether a convolution is a transposed one, by its name or its arguments."""
    return traits_of(op).transposed or bool(op.argument("transposed", False))


def is_product(op: Operator) -> bool:
    """Tells whether a convolution is a matrix product: filters of one point, in one group."""
    return op.argument("groups", 1) == 1 and math.prod(op.inputs[1].shape[2:]) == 1


def channels_of(op: Operator) -> Channels:
    """Returns the channels of a convolution on whole tensors.

    >>> import torch
    >>> from shardwright.ir.operator import Slot, TensorMeta
    >>> x, w, y = (TensorMeta(shape, torch.float32) for shape in ((8, 3, 32, 32), (16, 3, 3, 3), (8, 16, 30, 30)))
    >>> channels_of(Operator(torch.ops.aten.conv2d.default, (Slot(0), Slot(1)), {}, (x, w), (y,)))
    Channels(made=16, read=3, groups=1, transposed=False)
    """
    groups, transposed = int(op.argument("groups", 1)), is_transposed(op)
    first, second = op.inputs[1].shape[:2]
    made, read = (second, first // groups) if transposed else (first // groups, second)
    return Channels(made, read, groups, transposed)


def padding(channels: Channels, block: float) -> tuple[Array, Array, Array]:
    """Returns how many times more operations kernels do: for the output, and the gradients of input and weight.

    Args:
        channels: the channels of the convolution.
        block: channels that are computed together.

    >>> [float(times) for times in padding(Channels(20, 3), 16)]
    [1.6, 8.533333333333333, 1.6]
    """
    made, read = (np.maximum(1.0, each) for each in channels[:2])
    if channels.groups > 1 and made.max() == read.max() == 1:  # depthwise
        return made, made, made
    of_made, of_read = (np.ceil(each / block) * block / each for each in (made, read))
    both = of_made * of_read
    if channels.groups > 1 or channels.transposed:
        return both, both, both
    return np.where(read < block, of_made, both), both, np.where(read <= _COLOURS, of_made, both)


# -- from times -----------------------------------------------------------------------------------------------------------

BLOCKS = (1, 4, 8, 16, 32)
_ROUNDS, _POINTS = 4, 21


class Kernels(NamedTuple):
    """Numbers of convolution kernels, fitted to measured times.

    Args:
        block: channels that are computed together. ``launch``: seconds per call.
        rate: operations per second, with those on padding. ``bandwidth``: bytes per second where memory is the bound.
    """

    block: float
    launch: float
    rate: float
    bandwidth: float


def kernels_of(flops: Sequence[float], traffic: Sequence[float], seconds: Sequence[float], read: Sequence[Channels]) -> Kernels:
    """Fits kernels to measured forward passes, by the mean error of logarithms.

    Args:
        flops: operations of each forward pass.
        traffic: bytes that each reads and writes.
        seconds: measured time of each.
        read: the channels of each.

    The fit uses a grid that is refined around the best. Among blocks that fit equally well it takes the smallest.

    >>> shapes = [Channels(made, 32) for made in (4, 20, 32, 64, 128)] + [Channels(64, 64, 64)]
    >>> work = [1e6 * made for made, *_ in shapes[:-1]] + [1e5]
    >>> taken = [5e-5 + 1e6 * made / 1e11 for made in (16, 32, 32, 64, 128)] + [5e-5 + 1e7 / 1e10]
    >>> found = kernels_of(work, [1e4] * 5 + [1e7], taken, shapes)
    >>> found.block, round(found.launch * 1e5), round(found.rate / 1e9), round(found.bandwidth / 1e9)
    (16, 5, 100, 10)
    """
    work, moved, taken = (np.asarray(each, dtype=float) for each in (flops, traffic, seconds))
    found = []
    for block in BLOCKS:
        padded = work * [float(padding(channels, block)[0]) for channels in read]
        # the grid starts at the highest rates seen, launches included; the real rates are no lower
        centre, width = np.array([taken.min() / 2, (padded / taken).max(), (moved / taken).max()]), 16.0
        for _ in range(_ROUNDS):
            grid = centre[:, None] * np.geomspace(1 / width, width, _POINTS)
            launch, rate, bandwidth = (each[..., None] for each in np.meshgrid(*grid, indexing="ij"))
            off = np.abs(np.log((launch + np.maximum(padded / rate, moved / bandwidth)) / taken)).mean(axis=-1)
            at = np.unravel_index(np.argmin(off), off.shape)
            centre, width = grid[np.arange(3), at], width ** (4 / (_POINTS - 1))
        found.append((round(float(off[at]), 3), block, *centre.tolist()))
    return Kernels(*min(found)[1:])
