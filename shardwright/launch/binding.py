"""Cores and NUMA nodes that ranks are bound to."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

_NODES = Path("/sys/devices/system/node")


def spread_cores(ranks: int, cores: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """Divides cores among local ranks, neighbours together; ranks share cores where there are fewer.

    >>> spread_cores(2, range(5))
    {0: (0, 1), 1: (2, 3, 4)}
    >>> spread_cores(3, [4])
    {0: (4,), 1: (4,), 2: (4,)}
    """
    many = len(cores)
    if many < ranks:
        return {rank: (cores[rank % many],) for rank in range(ranks)}
    return {rank: tuple(cores[rank * many // ranks : (rank + 1) * many // ranks]) for rank in range(ranks)}


def allowed_cores() -> list[int]:
    """Returns the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def parse_cores(ranges: Sequence[str]) -> tuple[int, ...]:
    """Reads ranges of cores.

    Raises:
        ValueError: one is no range.

    >>> parse_cores(["0-2", "7"])
    (0, 1, 2, 7)
    """
    found: list[int] = []
    for text in ranges:
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", str(text))
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"{text!r} is no range of cores: write '0-3' or '5'")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(dict.fromkeys(found))


def memory_nodes() -> dict[int, tuple[int, ...]]:
    """Returns the cores of each NUMA node that has memory; empty where the system does not say."""
    try:
        numbers = parse_cores((_NODES / "has_memory").read_text().strip().split(","))
        return {
            node: parse_cores(text.split(",")) if (text := (_NODES / f"node{node}/cpulist").read_text().strip()) else ()
            for node in numbers
        }
    except (OSError, ValueError):
        return {}


def spread_memory(ranks: int, cores: Mapping[int, Sequence[int]]) -> dict[int, int]:
    """Gives each local rank a NUMA node: that of its cores where it is bound to some, else nodes in turn."""
    nodes = memory_nodes()
    found = {}
    for rank in range(ranks):
        own = [node for node, theirs in nodes.items() if set(cores.get(rank, ())) & set(theirs)]
        found[rank] = own[0] if own else list(nodes)[rank * len(nodes) // ranks]
    return found
