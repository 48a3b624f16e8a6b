"""Registry of rules: gives an operator call its signature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from shardwright.base.opaque import OpaqueFunction
from shardwright.ir.operator import Operator
from shardwright.ir.signature import Signature
from shardwright.rules.notation import parse

Builder = Callable[[Operator], "Signature | None"]

_RULES: dict[str, Builder] = {}


def rule(
    name: str,
    notation: str,
    *,
    linear: Sequence[Sequence[int]] = (),
    lowering: Callable[[Any], Any] | None = None,
    late: Sequence[int] = (),
) -> None:
    """Registers the rule of an operator whose factors do not depend on its arguments.

    Args:
        name: the operator's name, such as ``aten.linear``.
        notation: the rule, see :mod:`shardwright.ir.signature`.
        linear, lowering, late: see :class:`~shardwright.ir.signature.Signature`.

    >>> rule("demo.outer", "m, n -> m n")
    >>> "demo.outer" in registered()
    True
    """

    def build(op: Operator) -> Signature | None:
        return parse(notation, op, None, linear, lowering, late)

    _RULES[name] = build


def rule_for(*names: str) -> Callable[[Builder], Builder]:
    """Registers a function that builds the signature of a call from its shapes and arguments.

    The function returns ``None`` for a call that it has no rule for: the operator then runs replicated.
    """

    def register(build: Builder) -> Builder:
        for name in names:
            _RULES[name] = build
        return build

    return register


def registered() -> tuple[str, ...]:
    """Lists the names of all operators that have a rule."""
    return tuple(sorted(_RULES))


def signature_of(op: Operator) -> Signature | None:
    """Returns the signature of a call; ``None`` if the operator has no rule."""
    build = _RULES.get(op.name)
    if build is None and isinstance(op.target, OpaqueFunction):
        build = _RULES.get("opaque")
    return build(op) if build is not None else None


def replicated_signature(op: Operator) -> Signature:
    """Builds the signature of a call that runs whole on every rank."""
    sizes: dict[str, int] = {}

    def whole(prefix: str, shape: tuple[int, ...]) -> tuple[tuple[str, ...], ...]:
        dims = []
        for i, size in enumerate(shape):
            sizes[f"{prefix}_{i}"] = size
            dims.append((f"{prefix}_{i}",))
        return tuple(dims)

    inputs = tuple(whole(f"i{n}", m.shape) for n, m in enumerate(op.inputs))
    outputs = tuple(whole(f"o{n}", m.shape) for n, m in enumerate(op.outputs))
    return Signature(inputs, outputs, sizes, frozenset(), frozenset(sizes))
