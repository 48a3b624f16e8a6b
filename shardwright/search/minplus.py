"""Min-plus kernel: minima over sums of tables, and powers of matrices in this algebra.

A factor is a table with one axis per variable, its variables in rising order. All work is chunked to fit a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np

Factor = tuple[tuple[int, ...], np.ndarray]

_CHUNK = 1 << 15  # numbers per working table: 256 KiB, so that two of them stay in a level-2 cache


def spread(factor: Factor, variables: tuple[int, ...]) -> np.ndarray:
    """Returns the factor's table with one axis per variable of `variables`. Axes that the factor lacks have length 1."""
    own, table = factor
    order = sorted(range(len(own)), key=lambda axis: variables.index(own[axis]))
    table = table.transpose(order)
    sizes = iter(table.shape)
    return table.reshape([next(sizes) if v in own else 1 for v in variables])


def slim(variables: tuple[int, ...], sizes: Sequence[int]) -> tuple[int, ...]:
    """Returns the variables with more than one choice, or one of the others. An array has no more than 64 axes.

    >>> slim((4, 7, 9), (1, 3, 1)), slim((4, 7), (1, 1))
    ((7,), (4,))
    """
    if 1 not in sizes or len(variables) == 1:
        return variables
    return tuple([v for v, size in zip(variables, sizes) if size > 1]) or variables[:1]


def slimmed(factor: Factor) -> Factor:
    """Drops the axes of length 1 of a factor. One stays if it has no others."""
    variables, table = factor
    kept = slim(variables, table.shape)
    if len(kept) == len(variables):
        return factor
    return kept, table.reshape([n for n in table.shape if n > 1] or [1])


def absorb(factors: list[Factor]) -> list[Factor]:
    """Adds every factor to another one that has all its variables."""
    kept: list[Factor] = []
    for own, table in sorted(factors, key=lambda f: -len(f[0])):
        for place, (others, sum_) in enumerate(kept):
            if set(own) <= set(others):
                kept[place] = (others, sum_ + spread((own, table), others))
                break
        else:
            kept.append((own, table))
    return kept


def minimum_over(variable: int, factors: list[Factor], scope: tuple[int, ...]) -> np.ndarray:
    """Minimises the sum of the factors over one variable. Returns a table over `scope`.

    >>> pair = np.array([[0.0, 5.0], [5.0, 0.0]])
    >>> minimum_over(1, [((0, 1), pair), ((1,), np.array([7.0, 1.0])), ((1, 2), pair)], (0, 2))
    array([[7., 6.],
           [6., 1.]])
    """
    merged = absorb(factors)
    tables = [np.ascontiguousarray(spread(f, (variable, *scope))) for f in merged]
    if len(tables) == 1:
        return tables[0].min(axis=0)
    tables.sort(key=lambda t: t.size)
    shape = tuple(map(max, *(t.shape for t in tables)))[1:]  # np.broadcast_shapes takes a few dozen tables at most
    result = np.empty(shape)
    looped = 0  # leading axes that are walked one by one
    while looped < len(shape) - 1 and prod(shape[looped + 1 :]) > _CHUNK:
        looped += 1
    height = max(1, _CHUNK // prod(shape[looped + 1 :])) if shape else 1  # and the chunk of the next one
    for index in np.ndindex(shape[:looped]):
        for top in range(0, shape[looped] if shape else 1, height):
            block = (*index, slice(top, top + height)) if shape else ()
            _minimum_of_sums([t[_within(block, t.shape[1:])] for t in tables], result[block])
    return result


def _within(block: tuple[int | slice, ...], shape: tuple[int, ...]) -> tuple[int | slice, ...]:
    """Returns the block of a table that is broadcast along its axes of length 1."""
    return (slice(None), *(at if n > 1 else (0 if isinstance(at, int) else slice(None)) for at, n in zip(block, shape)))


def _minimum_of_sums(parts: list[np.ndarray], out: np.ndarray) -> None:
    """Writes the minimum, over the first axis, of the sum of `parts` to `out`."""
    scratch = np.empty_like(out)
    first, second, *others = parts
    for k in range(len(first)):
        into = out if k == 0 else scratch
        np.add(first[k], second[k], out=into)
        for other in others:
            np.add(into, other[k], out=into)
        if k:
            np.minimum(out, into, out=out)


def product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Computes the min-plus product of two stacks of matrices. Their shapes are (g, a, k) and (g, k, b).

    >>> product(np.array([[[0.0, 3.0]]]), np.array([[[5.0], [1.0]]]))
    array([[[4.]]])
    """
    stacks, rows, inner = left.shape
    columns = right.shape[2]
    if inner == 1:
        return left + right
    result = np.empty((stacks, rows, columns))
    height = max(1, _CHUNK // columns)
    if rows == columns == 1:
        return np.min(left[:, 0, :] + right[:, :, 0], axis=1).reshape(stacks, 1, 1)
    for g in range(stacks):
        for top in range(0, rows, height):
            block = np.ascontiguousarray(left[g, top : top + height].T)[:, :, None]
            out = result[g, top : top + height]
            _minimum_of_sums([block, right[g][:, None, :]], out)
    return result


@dataclass(frozen=True, eq=False)
class Power:
    """A power of a stack of transfer matrices, with its two factors.

    >>> step = Power.of(np.array([[[0.0, 1.0], [1.0, 5.0]]]), 3)
    >>> float(step.table[0, 1, 1]), step.path(0, 1, 1)
    (2.0, [1, 0, 0, 1])
    """

    exponent: int
    table: np.ndarray
    left: Power | None = None
    right: Power | None = None
    paths: dict[tuple[int, int, int], list[int]] = field(default_factory=dict)

    @staticmethod
    def of(matrix: np.ndarray, exponent: int) -> Power:
        """Computes the power by repeated squaring."""
        square, result = Power(1, matrix), None
        while True:
            if exponent & 1:
                result = square if result is None else result.times(square)
            exponent >>= 1
            if not exponent:
                assert result is not None
                return result
            square = square.times(square)

    def times(self, other: Power) -> Power:
        """Computes the product of this power and another."""
        return Power(self.exponent + other.exponent, product(self.table, other.table), self, other)

    def path(self, stack: int, first: int, last: int) -> list[int]:
        """Returns the states of a cheapest walk from `first` to `last`, both included."""
        if self.left is None or self.right is None:
            return [first, last]
        walk = self.paths.get((stack, first, last))
        if walk is None:  # most walks soon repeat, so that few are computed
            middle = int(np.argmin(self.left.table[stack, first] + self.right.table[stack, :, last]))
            walk = self.left.path(stack, first, middle)[:-1] + self.right.path(stack, middle, last)
            self.paths[stack, first, last] = walk
        return walk
