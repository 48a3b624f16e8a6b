"""Text: numbers, bytes, seconds and lists as readable text."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence


def pattern(name: str) -> str:
    """Replaces the numbers in a qualified name by ``*``.

    >>> pattern("blocks.12.attention.query")
    'blocks.*.attention.query'
    """
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", name)


def alike_name(names: Sequence[str]) -> str:
    """Returns what names of similar things have in common: numbers that differ become ``*``, others stay.

    >>> alike_name(["blocks.0.up.0", "blocks.1.up.0"]), alike_name(["blocks.7.norm"])
    ('blocks.*.up.0', 'blocks.7.norm')
    """
    parts = [re.split(r"([./ ])", name) for name in dict.fromkeys(names)]
    if len({len(each) for each in parts}) > 1:
        return pattern(names[0])
    return "".join(each[0] if len(set(each)) == 1 else "*" for each in zip(*parts))


def seconds_text(seconds: float) -> str:
    """Formats a time with its unit.

    >>> seconds_text(0.00312), seconds_text(2.5)
    ('3.12 ms', '2.50 s')
    """
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds >= 1 / scale or unit == "µs":
            return f"{seconds * scale:.3g} {unit}" if seconds * scale >= 100 else f"{seconds * scale:.2f} {unit}"
    raise AssertionError


def bytes_text(count: int) -> str:
    """Formats a number of bytes with its unit: ``1.5 MB``."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError


def enough(count: float) -> str:
    """Rounds a number of bytes up to a short text, as an option takes it.

    >>> enough(55_650), enough(108.21e9)
    ('55.7kB', '108.3GB')
    """
    unit, scale = next(((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if count >= s), ("kB", 1e3))
    return f"{math.ceil(count / scale * 10) / 10:g}{unit}"


def numbers_text(noun: str, numbers: Sequence[int], most: int = 8) -> str:
    """Lists numbers after a noun, with its verb.

    >>> numbers_text("rank", [1]), numbers_text("rank", [1, 3])
    ('rank 1 is', 'ranks 1 and 3 are')
    """
    if len(numbers) == 1:
        return f"{noun} {numbers[0]} is"
    names = [str(number) for number in numbers[:most]]
    if len(numbers) > most:
        return f"{noun}s {', '.join(names)} and {len(numbers) - most} more are"
    return f"{noun}s {', '.join(names[:-1])} and {names[-1]} are"
