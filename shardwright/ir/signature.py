"""Signature: the factors that one operator call's dims map to, and what splitting each factor means.

A factor is an index letter of an operator's rule. Written form, one group of factors per tensor:

    "... m k+, ... k+ n -> ... m n"

- ``k+``: summed; splitting it leaves a partial sum on the output.
- ``n!``: whole; it is never split.
- ``c~``: inner; it reaches no output, and where it is split the lowering itself makes the output whole.
- ``(h d)``: a compound dim, ``h`` the more significant factor. Only its first factor of size above 1 can be split.
- ``1``: a dim of size 1 that carries no factor (it is broadcast).
- ``...``: any number of leading dims, matched from the right, and broadcast where an input's dim has size 1.

A factor that reaches no output and bears no mark is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh

DimFactors = tuple[str, ...]
TensorFactors = tuple[DimFactors, ...]
Split = tuple[tuple[str, ...], "tuple[int, ...] | None"]


@dataclass(frozen=True)
class Signature:
    """A rule for one operator call.

    Args:
        inputs, outputs: for every tensor, for every dim, its factors, most significant first; ``()`` for a dim that
            carries none (size 1 and broadcast).
        sizes: global size of every factor.
        summed: factors whose split leaves a partial sum.
        whole: factors that are never split.
        linear: sets of inputs in which the operator is jointly linear and cheap (views, sums, sum of two): if exactly
            one such set is partial on the same axes, the operator may run on the partial values.
        lowering: makes the local call, if it is not the same call on local tensors.
        late: inputs that are used only after the output's pending sums are reduced (a bias). Such a call reduces its output
            itself, and these inputs are laid out to fit the reduced output.
        tied: factors that the same axes may split, all of them at once.
        pairs: inner factors over which the lowering reduces only two numbers, a sum and a count, in one collective.
    """

    inputs: tuple[TensorFactors, ...]
    outputs: tuple[TensorFactors, ...]
    sizes: Mapping[str, int]
    summed: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()
    linear: tuple[frozenset[int], ...] = ()
    lowering: Callable[[Any], Any] | None = None
    late: frozenset[int] = frozenset()
    inner: frozenset[str] = frozenset()
    order: tuple[str, ...] = field(default=())
    tied: frozenset[str] = frozenset()
    pairs: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        order: dict[str, None] = {}
        for tensor in (*self.inputs, *self.outputs):
            for dim in tensor:
                for factor in dim:
                    order.setdefault(factor)
        object.__setattr__(self, "order", tuple(order))
        reached = {f for tensor in self.outputs for dim in tensor for f in dim}
        for factor in order:
            if factor not in reached and factor not in self.summed | self.whole | self.inner:
                raise ValueError(f"factor {factor!r} reaches no output and bears no mark")
        dims = (dim for tensor in (*self.inputs, *self.outputs) for dim in tensor)
        minor = {factor for dim in dims for factor in dim if factor != self.major(dim)}
        object.__setattr__(self, "whole", self.whole | minor)

    def splittable(self, factor: str) -> bool:
        """Tells whether a factor may be split."""
        return factor not in self.whole

    def conflicting_factor(self, factor: str, axes: Sequence[str], split: Mapping[str, Split]) -> str | None:
        """Finds a factor that forbids splitting ``factor`` by these axes. Some of them split it already."""
        others = (f for f, (a, _) in split.items() if f != factor and set(a) & set(axes))
        return next((f for f in others if not {f, factor} <= self.tied), None)

    def layouts(self, mesh: Mesh, split: Mapping[str, Split]) -> tuple[tuple[Layout, ...], tuple[Layout, ...]]:
        """Computes the layouts of inputs and outputs. Each factor in ``split`` is split by its axes and piece sizes."""
        inputs = tuple(self._layout(tensor, mesh, split, ()) for tensor in self.inputs)
        summed = [(a, "sum") for f, (axes, _) in split.items() if f in self.summed for a in axes]
        return inputs, tuple(self._layout(tensor, mesh, split, summed) for tensor in self.outputs)

    def _layout(
        self, tensor: TensorFactors, mesh: Mesh, split: Mapping[str, Split], partial: Sequence[tuple[str, str]]
    ) -> Layout:
        dims, sizes = [], []
        for factors in tensor:
            major = self.major(factors)
            axes, pieces = split.get(major, ((), None)) if major else ((), None)
            dims.append(axes)
            rest = math.prod(self.sizes[f] for f in factors if f != major)
            if axes and rest != 1:
                whole = pieces or _chunks(mesh, axes, self.sizes[major])  # type: ignore[index]
                pieces = tuple(p * rest for p in whole)
            sizes.append(pieces)
        shape = tuple(math.prod(self.sizes[f] for f in factors) for factors in tensor)
        return Layout.of(mesh, dims, partial, sizes).normal(shape)

    def major(self, factors: DimFactors) -> str | None:
        """Returns the factor of a compound dim that may be split: the first of size above 1 (or the last)."""
        for factor in factors:
            if self.sizes[factor] > 1:
                return factor
        return factors[0] if factors else None


def _chunks(mesh: Mesh, axes: tuple[str, ...], size: int) -> tuple[int, ...]:
    from shardwright.ir.pieces import chunk_pieces

    return chunk_pieces(size, tuple(mesh.axis_size(a) for a in axes))
