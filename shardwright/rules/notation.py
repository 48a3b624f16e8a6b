"""Notation: reads rules as they are written, ``m k+, k+ n -> m n``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shardwright.ir.operator import Operator
from shardwright.ir.signature import DimFactors, Signature, TensorFactors

_TOKEN = re.compile(r"\([^)]*\)|\.\.\.|[A-Za-z_]\w*[+!~]?|1")


def parse(
    notation: str,
    op: Operator,
    sizes: Mapping[str, int] | None = None,
    linear: Sequence[Sequence[int]] = (),
    lowering: Callable[[Any], Any] | None = None,
    late: Sequence[int] = (),
) -> Signature:
    """Builds the signature that ``notation`` gives an operator call. Sizes follow from its shapes.

    Args:
        notation: the rule.
        op: the call.
        sizes: sizes of the factors of compound dims.
        linear, lowering, late: see :class:`~shardwright.ir.signature.Signature`.

    Raises:
        ValueError: the notation does not fit the shapes.
    """
    left, _, right = notation.partition("->")
    marks: dict[str, str] = {}
    found: dict[str, int] = dict(sizes or {})
    texts = left.split(",") if op.inputs or left.strip() else []  # a single input of 0 dims is written as an empty text
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
