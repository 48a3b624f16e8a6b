"""Reads sizes as people write them: ``80GB`` of memory, an optimizer by its name."""

from __future__ import annotations

import re

from shardwright.errors import ShardwrightError

# Bytes of optimizer state a byte of parameter, by the optimizer's name.
OPTIMIZER_STATES = {"sgd": 0.0, "momentum": 1.0, "adagrad": 1.0, "rmsprop": 1.0, "adam": 2.0, "adamw": 2.0, "none": 0.0}

_UNITS = {"": 1.0, "B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2.0**10, "MIB": 2.0**20, "GIB": 2.0**30}


def memory_bytes(memory: float | str) -> float:
    """Reads a size such as ``"80GB"`` in bytes; powers of ten, or of two as in ``"80GiB"``.

    Raises:
        ShardwrightError: the text is not a size above 0.

    >>> memory_bytes("1.5GB"), memory_bytes("2KiB"), memory_bytes(100)
    (1500000000.0, 2048.0, 100.0)
    """
    if isinstance(memory, (int, float)) and not isinstance(memory, bool):
        found: float | None = float(memory)
    else:
        match = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", str(memory))
        unit = _UNITS.get(match[2].upper()) if match else None
        found = float(match[1]) * unit if match and unit is not None and match[1].count(".") < 2 else None
    if found is None or not found > 0:
        raise ShardwrightError(f"memory {memory!r} is not a size: write '80GB', '640MiB' or a number of bytes")
    return found


def optimizer_bytes_per_byte(optimizer: str | float) -> float:
    """Returns the bytes of optimizer state per byte of parameter.

    Raises:
        ShardwrightError: no such optimizer is known.
    """
    if isinstance(optimizer, (int, float)) and not isinstance(optimizer, bool) and optimizer >= 0:
        return float(optimizer)
    if isinstance(optimizer, str) and optimizer.lower() in OPTIMIZER_STATES:
        return OPTIMIZER_STATES[optimizer.lower()]
    known = ", ".join(OPTIMIZER_STATES)
    raise ShardwrightError(f"optimizer {optimizer!r} is not known: use one of {known}, or bytes of state a byte of parameter")
