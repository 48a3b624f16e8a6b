"""Signature: how one operator call's dims map to factors, and what splitting each factor means.

A factor is an index letter of an operator's rule. Written form, one group of factors a tensor:

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
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardwright.layout import Layout
from shardwright.mesh import Mesh
from shardwright.rules.operator import Operator

DimFactors = tuple[str, ...]
TensorFactors = tuple[DimFactors, ...]
Split = tuple[tuple[str, ...], "tuple[int, ...] | None"]


@dataclass(frozen=True)
class Signature:
    """The rule of one operator call.

    Args:
        inputs, outputs: for every tensor, for every dim, its factors, most significant first; ``()`` for a dim that
            carries none (size 1 and broadcast).
        sizes: global size of every factor.
        summed: factors whose split leaves a partial sum.
        whole: factors that are never split.
        linear: sets of inputs in which the operator is jointly linear and cheap (views, sums, sum of two): if exactly
            one such set is partial on the same axes, the operator may run on the partial values.
        lowering: how the operator runs locally, where it is not the same call on local tensors.
        late: inputs that are used after the output's pending sums are reduced (a bias). Such a call reduces its output
            itself, and these inputs are laid out to fit the reduced output.
        tied: factors that the same axes may split, all of them at once.
        pairs: inner factors over which the lowering reduces two numbers alone, a sum and a count, in one collective.
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
        return factor not in self.whole

    def taken(self, factor: str, axes: Sequence[str], split: Mapping[str, Split]) -> str | None:
        """A factor that some of these axes split already and that stands against splitting ``factor`` by them."""
        others = (f for f, (a, _) in split.items() if f != factor and set(a) & set(axes))
        return next((f for f in others if not {f, factor} <= self.tied), None)

    def layouts(self, mesh: Mesh, split: Mapping[str, Split]) -> tuple[tuple[Layout, ...], tuple[Layout, ...]]:
        """The layouts of inputs and outputs when each factor in ``split`` is split by its axes and piece sizes."""
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
        """The factor of a compound dim that may be split: the first of size above 1 (or the last)."""
        for factor in factors:
            if self.sizes[factor] > 1:
                return factor
        return factors[0] if factors else None


def _chunks(mesh: Mesh, axes: tuple[str, ...], size: int) -> tuple[int, ...]:
    from shardwright.layout import chunk_pieces

    return chunk_pieces(size, tuple(mesh.axis_size(a) for a in axes))


_TOKEN = re.compile(r"\([^)]*\)|\.\.\.|[A-Za-z_]\w*[+!~]?|1")


def parse(
    notation: str,
    op: Operator,
    sizes: Mapping[str, int] | None = None,
    linear: Sequence[Sequence[int]] = (),
    lowering: Callable[[Any], Any] | None = None,
    late: Sequence[int] = (),
) -> Signature:
    """The signature that ``notation`` gives an operator call; sizes follow from its shapes.

    Args:
        sizes: sizes of the factors of compound dims.

    Raises:
        ValueError: the notation does not fit the shapes.
    """
    left, _, right = notation.partition("->")
    marks: dict[str, str] = {}
    found: dict[str, int] = dict(sizes or {})
    texts = left.split(",") if op.inputs or left.strip() else []  # one input of 0 dims is written as nothing
    out_texts = right.split(",") if op.outputs or right.strip() else []
    if len(texts) != len(op.inputs) or len(out_texts) != len(op.outputs):
        raise ValueError(
            f"{op.name}: the rule {notation!r} has {len(texts)} inputs and {len(out_texts)} outputs, the call has "
            f"{len(op.inputs)} and {len(op.outputs)}"
        )
    outputs = [
        _tensor(text, meta.shape, found, marks, broadcast=False) for text, meta in zip(out_texts, op.outputs, strict=True)
    ]
    inputs = [_tensor(text, meta.shape, found, marks, broadcast=True) for text, meta in zip(texts, op.inputs, strict=True)]
    return Signature(
        tuple(inputs),
        tuple(outputs),
        found,
        frozenset(f for f, m in marks.items() if "+" in m),
        frozenset(f for f, m in marks.items() if "!" in m),
        tuple(frozenset(group) for group in linear),
        lowering,
        frozenset(late),
        frozenset(f for f, m in marks.items() if "~" in m),
    )


def _tensor(text: str, shape: tuple[int, ...], sizes: dict[str, int], marks: dict[str, str], broadcast: bool) -> TensorFactors:
    tokens = _TOKEN.findall(text)
    if "..." in tokens:
        at = tokens.index("...")
        extra = len(shape) - (len(tokens) - 1)
        if extra < 0:
            raise ValueError(f"shape {shape} has too few dims for {text.strip()!r}")
        tokens[at : at + 1] = [f"_{i}" for i in reversed(range(extra))]
    if len(tokens) != len(shape):
        raise ValueError(f"shape {shape} does not fit {text.strip()!r}")
    return tuple(_dim(token, size, sizes, marks, broadcast) for token, size in zip(tokens, shape, strict=True))


def _dim(token: str, size: int, sizes: dict[str, int], marks: dict[str, str], broadcast: bool) -> DimFactors:
    if token == "1":
        return ()
    factors = []
    for name in token.strip("()").split():
        factor = name.rstrip("+!~")
        marks[factor] = marks.get(factor, "") + name[len(factor) :]
        factors.append(factor)
    if len(factors) == 1:
        known = sizes.setdefault(factors[0], size)
        if known != size:
            if broadcast and size == 1:
                return ()
            raise ValueError(f"factor {factors[0]!r} has size {known} and {size}")
    elif math.prod(sizes[f] for f in factors) != size:
        raise ValueError(f"compound {token} does not make {size} of {[sizes[f] for f in factors]}")
    return tuple(factors)
