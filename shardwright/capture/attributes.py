"""Operator attributes: the names that ``add_prim_attr`` knows and the values they may have.

What an attribute does to a graph is in :mod:`shardwright.plan.asked.attributes`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shardwright.errors import ArgumentTypeError, ShardwrightError


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "give True or False"


def _whole_number(value: Any) -> str | None:
    return None if isinstance(value, int) and not isinstance(value, bool) else "give the number of a dim of the output, an int"


def _row_counts(value: Any) -> str | None:
    if not isinstance(value, tuple) or not value:
        return "give a tuple with the rows of each slice, (10, 20, 30, 4)"
    for rows in value:
        if not isinstance(rows, int) or isinstance(rows, bool):
            return f"{rows!r} is a {type(rows).__name__}; give the rows of each slice as an int"
        if rows < 1:
            return f"{rows} rows: every slice has at least one"
    return None


# name -> what is wrong with a value, or None
ATTRIBUTES: dict[str, Callable[[Any], str | None]] = {
    "enable_nd_tp": _flag,
    "ndtp_reduce_scatter_axis": _whole_number,
    "manual_split": _row_counts,
    "self_define_shard": _flag,
    "skip_redistribution": _flag,
    "recompute": _flag,
}

# name -> why it is refused, and what to do instead; False, which asks for nothing, is accepted
REFUSED: dict[str, str] = {
    "cross_batch": (
        "without the reduction across ranks each rank would go on with numbers of its own, so the result would depend on how "
        "many ranks there are and replicated parameters would drift apart; reduce by group instead, which is the same on one "
        "device: x.unflatten(0, (groups, -1)).mean(1)"
    ),
    "primitive_target": "running single operators on the host is not built yet; remove it",
    "manual_split_with_offset": "offsets follow from the rows of the slices; give manual_split=(rows, rows, ...)",
}


def check_attribute(what: str, name: Any, value: Any) -> None:
    """Checks one operator attribute. It has to exist, be supported, and have a value that it can have.

    Args:
        what: how to name the place in a message: ``"MatMul.add_prim_attr('enable_nd_tp', 1) at model.py:12"``.

    Raises:
        ArgumentTypeError: a name or a value of the wrong type.
        ShardwrightError: an unknown or unsupported attribute.

    >>> check_attribute("MatMul", "enable_nd_tp", True)
    >>> check_attribute("Gather", "manual_split", (3, 0))
    Traceback (most recent call last):
    shardwright.errors.ArgumentTypeError: Gather: 0 rows: every slice has at least one
    """
    if not isinstance(name, str):
        raise ArgumentTypeError(f"{what}: the name of an attribute is a str, not a {type(name).__name__}")
    if name in REFUSED and value is not False:
        raise ShardwrightError(f"{what}: {REFUSED[name]}")
    if name not in ATTRIBUTES and name not in REFUSED:
        known = ", ".join(ATTRIBUTES)
        raise ShardwrightError(f"{what}: there is no attribute {name!r}; use one of {known}")
    wrong = ATTRIBUTES[name](value) if name in ATTRIBUTES else None
    if wrong is not None:
        raise ArgumentTypeError(f"{what}: {wrong}")


def check_attributes(what: str, attributes: Any) -> dict[str, Any]:
    """Checks the attributes that are given together, and returns them as a dict. ``None`` means none.

    Raises:
        ArgumentTypeError: they are no dict, or a name or a value has the wrong type.
        ShardwrightError: an unknown or unsupported attribute.
    """
    if attributes is None:
        return {}
    if not isinstance(attributes, dict):
        raise ArgumentTypeError(f"{what}: attributes is a {type(attributes).__name__}; give a dict, {{'enable_nd_tp': True}}")
    for name, value in attributes.items():
        check_attribute(f"{what}: attribute {name!r}: {value!r}", name, value)
    return dict(attributes)
