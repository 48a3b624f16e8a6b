"""Entries of layouts as users write them: checked, and parsed from texts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from shardwright.errors import ArgumentTypeError, LayoutError
from shardwright.ir.mesh import AxisWords, check_axes, check_ranks

# The virtual axis: it cuts what one device holds into copies, and has no devices of its own.
INTERLEAVED = "interleaved_parallel"

# An alias, "None", a tuple of aliases that split a dim jointly, or an explicit order such as "sp>dp".
DimSpec = str | tuple[str, ...] | list[str]
Sizes = tuple[tuple[int, ...] | None, ...]

# What errors call the sizes, names, one name, ranks and mesh of a Layout.
_WORDS = AxisWords("device_matrix", "alias_name", "alias", "rank_list", "the device matrix")


def check_device_matrix(device_matrix: object, alias_name: object, rank_list: object) -> None:
    """Checks the arguments of a :class:`~shardwright.ir.layout.Layout`.

    Raises:
        TypeError: a device matrix, alias or rank list of the wrong type.
        LayoutError: lengths that differ, an unknown or repeated alias, a virtual axis that is not the last.
    """
    sizes, names = check_axes(device_matrix, alias_name, _WORDS)
    if INTERLEAVED in names[:-1]:
        raise LayoutError(
            f"alias_name {names} has {INTERLEAVED!r} at {names.index(INTERLEAVED)}: it cuts what one device holds, "
            "so it has to be the last alias"
        )
    if rank_list is not None:
        check_ranks(rank_list, math.prod(sizes[:-1] if INTERLEAVED in names else sizes), _WORDS)


def axes_of_entry(entry: DimSpec, position: int, aliases: Sequence[str]) -> tuple[str, ...]:
    """Returns the axes that a user's entry for a dim names, the most significant first.

    Raises:
        TypeError: the entry, or an alias in it, has the wrong type.
        LayoutError: an alias that is unknown, repeated, or virtual and not the last.
    """
    if isinstance(entry, str):
        names = [part.strip() for part in entry.split(">")]
        ordered = len(names) > 1
    elif isinstance(entry, (tuple, list)):
        names, ordered = list(entry), False
    else:
        raise ArgumentTypeError(
            f"layout entry {position} is {entry!r}, a {type(entry).__name__}; give an alias, 'None' or a tuple of aliases"
        )
    for name in names:
        if not isinstance(name, str):
            raise ArgumentTypeError(f"layout entry {position} holds {name!r}, a {type(name).__name__}, not an alias")
        if name != "None" and name not in aliases:
            raise LayoutError(
                f"layout entry {position} names {name!r}, which is not an alias of this layout; the aliases are "
                f"{', '.join(aliases)}"
            )
    names = [n for n in names if n != "None"]
    if len(set(names)) != len(names):
        raise LayoutError(f"layout entry {position} {entry!r} lists an alias twice; list each alias once")
    if ordered and INTERLEAVED in names[:-1]:
        raise LayoutError(
            f"layout entry {position} {entry!r} has {INTERLEAVED!r} above {names[-1]!r}: copies cut what a device holds; "
            "write it last"
        )
    return tuple(names) if ordered else tuple(sorted(names, key=aliases.index))


def parse_entries(text: str) -> tuple[list[DimSpec], list[tuple[int, ...] | None]]:
    """Parses entries such as ``mp,(dp,sp)[3 7]``: the entry of each dim, and its explicit piece sizes or None.

    Raises:
        LayoutError: piece sizes that are no whole numbers.
    """
    entries: list[DimSpec] = []
    sizes: list[tuple[int, ...] | None] = []
    if text.strip() == "()":
        text = ""
    for entry in re.findall(r"\([^)]*\)(?:\[[^\]]*\])?|[^,\[\s]+(?:\[[^\]]*\])?", text):
        name, _, explicit = entry.partition("[")
        numbers = explicit.rstrip("]").split()
        if not all(n.isdigit() for n in numbers):
            raise LayoutError(f"cannot read the piece sizes [{explicit}: write whole numbers, dp[3 7]")
        sizes.append(tuple(map(int, numbers)) if explicit else None)
        entries.append(tuple(n.strip() for n in name[1:-1].split(",")) if name.startswith("(") else name)
    return entries, sizes


def parse_reductions(texts: Sequence[str]) -> list[tuple[str, str]]:
    """Parses pending reductions such as ``sum(dp,mp)``: each axis with ``"sum"``, ``"max"`` or ``"min"``.

    Raises:
        LayoutError: a text of another form.
    """
    partial = []
    for text in texts:
        match = re.fullmatch(r"\s*(sum|max|min)\(([^)]*)\)\s*", text)
        if not match:
            raise LayoutError(f"cannot read the pending reduction {text.strip()!r}: write '+sum(dp,mp)'")
        partial += [(axis.strip(), match[1]) for axis in match[2].split(",")]
    return partial


def call_text(entries: Sequence[DimSpec]) -> str:
    """Returns the entries as a user writes them in a call, for errors."""
    return "(" + ", ".join(repr(e) for e in entries) + ")"
