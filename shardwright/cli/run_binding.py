"""``--bind-core`` and ``--bind-numa`` of ``shardwright run``: the cores and NUMA nodes of this node's ranks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardwright.cli.run_flags import Read
from shardwright.launch.binding import allowed_cores, memory_nodes, parse_cores, spread_cores, spread_memory


def read_binding(read: Read, ranks: int) -> tuple[dict[int, tuple[int, ...]], tuple[int, ...], dict[int, int]]:
    """Reads the cores of ranks and of the launcher, and the ranks' NUMA nodes."""
    cores: dict[int, tuple[int, ...]] = {}
    launcher: tuple[int, ...] = ()
    memory: dict[int, int] = {}
    how = read.given.get("bind_core", "False")
    allowed = allowed_cores()
    if how in ("auto", "True"):
        cores = spread_cores(ranks, allowed)
    elif how != "False":
        found = _by_device(read, "bind_core", ranks, lambda value: parse_cores(value if isinstance(value, list) else [value]))
        launcher = found.pop(-1, ())
        cores = found
        wrong = sorted({core for some in (*cores.values(), launcher) for core in some} - set(allowed))
        if wrong:
            read.problems.append(f"--bind-core: this process may not use core {wrong[0]}: give cores of {_ranges(allowed)}")
    how = read.given.get("bind_numa", "False")
    if how == "False":
        return cores, launcher, memory
    nodes = memory_nodes()
    if not nodes:
        read.problems.append("--bind-numa: the system names no NUMA nodes: drop it")
    elif how in ("auto", "True"):
        memory = spread_memory(ranks, cores)
    else:
        memory = _by_device(read, "bind_numa", ranks, int)
        memory.pop(-1, None)
        if set(memory.values()) - set(nodes):
            read.problems.append(f"--bind-numa: this machine has the NUMA nodes {', '.join(map(str, nodes))}: give one of them")
    return cores, launcher, memory


def _by_device(read: Read, key: str, ranks: int, convert: Callable[[Any], Any]) -> dict[int, Any]:
    """Reads values by local rank; that of ``"scheduler"`` stands at -1."""
    text, found = read.given[key], {}
    try:
        told = json.loads(Path(text).read_text("utf-8") if text.endswith(".json") else text)
        if not isinstance(told, dict):
            raise ValueError("it must be an object")
        for name, value in told.items():
            match = re.fullmatch(r"(?:device|rank)?(\d+)|scheduler", name)
            if match is None or (match[1] and int(match[1]) >= ranks):
                raise ValueError(f"{name!r} is none of device0 to device{ranks - 1}, and not scheduler")
            found[int(match[1]) if match[1] else -1] = convert(value)
    except (OSError, ValueError, TypeError) as error:
        flag = "--" + key.replace("_", "-")
        example = '{"device0": ["0-3"]}' if key == "bind_core" else '{"device0": 0}'
        read.problems.append(f"{flag}: {error}; give auto, or JSON as {example}")
    return found


def _ranges(numbers: list[int]) -> str:
    """Writes numbers in order as ranges."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
