"""Machine files: machines as TOML files, the presets, and the one calibrated here."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from shardwright.errors import ShardwrightError
from shardwright.ir.machine import _LAUNCHES, Level, Machine

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found]

PRESETS = Path(__file__).parent / "machines"
VARIABLE = "SHARDWRIGHT_MACHINE"


def machines() -> tuple[str, ...]:
    """Lists the names of the machines that come with the package."""
    return tuple(sorted(path.stem for path in PRESETS.glob("*.toml")))


def calibrated() -> Path:
    """Returns the path of this user's measured ``cpu-gloo``."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "shardwright" / "cpu-gloo.toml"


def load_machine(machine: Machine | str | Path) -> Machine:
    """Reads a machine by the name of a preset, or from a TOML file.

    ``cpu-gloo`` is the machine that ``shardwright calibrate`` measured here, if it did. ``SHARDWRIGHT_MACHINE`` names a file
    that takes its place.

    Raises:
        ShardwrightError: there is no such machine, or the file does not describe one.

    >>> load_machine("h100").levels[0].size
    8
    """
    if isinstance(machine, Machine):
        return machine
    if machine == "cpu-gloo":
        chosen = os.environ.get(VARIABLE)
        if chosen:
            return _read(Path(chosen))
        if calibrated().is_file():
            return _read(calibrated())
    preset = PRESETS / f"{machine}.toml"
    if preset.is_file():
        return _preset(str(machine))
    path = Path(machine)
    if path.suffix == ".toml":
        return _read(path)
    raise ShardwrightError(f"machine {str(machine)!r} is not known: use {', '.join(machines())}, or the path of a .toml file")


@cache
def _preset(name: str) -> Machine:
    return _read(PRESETS / f"{name}.toml")


def _read(path: Path) -> Machine:
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ShardwrightError(f"there is no machine file {path}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ShardwrightError(f"the machine file {path} cannot be read: {error}") from None
    return _checked(values, path)


def _checked(values: dict[str, Any], path: Path) -> Machine:
    def number(table: Mapping[str, Any], key: str, where: str = "", default: float | None = None) -> float:
        value = table.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ShardwrightError(f"{path}: {where}{key} is {value!r}; give a number from 0, in bytes, seconds or a second")
        if value == 0 and (where in ("flops.", "efficiency.", "rates.") or key.endswith("bandwidth")):
            raise ShardwrightError(f"{path}: {where}{key} is 0; give what is reached in a second, or leave the line out")
        return float(value)

    def table(key: str, needed: bool) -> dict[str, float]:
        found = values.get(key, {})
        if not isinstance(found, dict) or (needed and not found):
            raise ShardwrightError(f"{path}: [{key}] is missing; list at least one number in it")
        return {name: number(found, name, f"{key}.") for name in found}

    known = {"name", "description", "device", "flops", "efficiency", "rates", "memory", "memory_bandwidth", *_LAUNCHES,
             "levels", "channel_block", "overlap", "gather_overlap"}  # fmt: skip
    unknown = sorted(set(values) - known)
    if unknown:
        raise ShardwrightError(f"{path}: {unknown[0]} is not a key of a machine; the keys are {', '.join(sorted(known))}")
    levels = values.get("levels")
    if not isinstance(levels, list) or not levels:
        raise ShardwrightError(f"{path}: [[levels]] is missing; describe the links, the innermost first")
    if not all(isinstance(level, dict) for level in levels):
        raise ShardwrightError(f"{path}: levels are not tables; write each as [[levels]], then size, latency and bandwidth")
    made = tuple(
        Level(
            str(level.get("name", f"level {i}")), int(number(level, "size", f"levels[{i}].", 0)),
            number(level, "latency", f"levels[{i}]."), number(level, "bandwidth", f"levels[{i}]."),
        )
        for i, level in enumerate(levels)
    )  # fmt: skip
    sizes = [level.size or math.inf for level in made]
    if sizes != sorted(set(sizes)):
        raise ShardwrightError(
            f"{path}: levels have the sizes {[level.size for level in made]}; list the innermost first, each larger than the "
            "one before, the last with size 0 for any number of ranks"
        )
    return Machine(
        str(values.get("name", path.stem)), str(values.get("description", "")), table("flops", True),
        table("efficiency", False), number(values, "memory", default=0.0), number(values, "memory_bandwidth"),
        number(values, "operator_launch", default=0.0), number(values, "collective_launch", default=0.0), made,
        min(1.0, number(values, "overlap", default=0.0)), table("rates", False), str(values.get("device", "cuda")),
        number(values, "optimizer_launch", default=0.0), number(values, "step_launch", default=0.0),
        min(1.0, number(values, "gather_overlap", default=number(values, "overlap", default=0.0))),
        number(values, "convolution_launch", default=0.0), max(1.0, number(values, "channel_block", default=1.0)),
    )  # fmt: skip
