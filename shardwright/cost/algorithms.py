"""Algorithms: a table of the fastest algorithm of every collective on a machine, by size and by number of ranks.

``shardwright calibrate`` measures it and keeps it in a file of the user; without one :data:`DEFAULT` holds. Results do
not depend on it, only speed does.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardwright.errors import WorldError
from shardwright.redistribute.links import Links

VERSION = 1
VARIABLE = "SHARDWRIGHT_CALIBRATION"

# Every algorithm of every operation on gloo. If the calibration names none that can be used, the first that can is used.
ALGORITHMS: dict[str, tuple[str, ...]] = {
    "all_reduce": ("pieces", "chain", "hub", "copies", "backend"),
    "reduce_scatter": ("direct", "hub", "backend"),
    "all_gather": ("direct", "hub", "backend"),
    "exchange": ("direct", "backend"),
}

# Rows of a table: largest number of bytes, and the algorithms up to there, the fastest first. The last row has no end.
Row = tuple[float, tuple[str, ...]]
Table = tuple[Row, ...]


@dataclass(frozen=True)
class Calibration:
    """Fastest algorithms of a machine.

    Bytes are those of the tensor of an all-reduce, of the whole tensor of a reduce-scatter or all-gather, and those that a
    member sends in an exchange.

    Args:
        tables: for each operation and number of ranks, the algorithms by bytes.
        links: what the planner of redistributions needs: ``Options(links)``.
        cpus: cores of the machine it was measured on.
        origin: its source, for messages.
    """

    tables: Mapping[str, Mapping[int, Table]]
    links: Links
    cpus: int
    origin: str = "measured"

    def choose(self, operation: str, ranks: int, nbytes: int, allowed: Collection[str]) -> str:
        """Returns the fastest of the allowed algorithms. Measurements of the nearest number of ranks decide.

        Args:
            operation: the collective, such as ``all_reduce``.
            ranks: number of ranks in the group.
            nbytes: bytes as the class counts them.
            allowed: the algorithms that can be used.

        >>> DEFAULT.choose("all_reduce", 4, 1024, ["pieces", "hub"])
        'hub'
        >>> DEFAULT.choose("all_reduce", 5, 1 << 24, ["backend", "chain", "pieces"])
        'pieces'
        """
        for name in (*self._ranking(operation, ranks, nbytes), *ALGORITHMS[operation]):
            if name in allowed:
                return name
        raise AssertionError(f"{operation}: {allowed} has no algorithm of {ALGORITHMS[operation]}")

    def _ranking(self, operation: str, ranks: int, nbytes: int) -> tuple[str, ...]:
        measured = self.tables.get(operation)
        if not measured:
            return ()
        nearest = min(measured, key=lambda n: (abs(math.log(n / ranks)), n))
        return next((names for limit, names in measured[nearest] if nbytes <= limit), ())

    def to_dict(self) -> dict[str, Any]:
        """Converts it to plain values, for a file or for other ranks."""
        tables = {
            operation: {
                str(ranks): [[None if limit == math.inf else limit, list(names)] for limit, names in table]
                for ranks, table in measured.items()
            }
            for operation, measured in self.tables.items()
        }
        links = {name: getattr(self.links, name) for name in ("launch", "latency", "bandwidth")}
        return {"version": VERSION, "cpus": self.cpus, "origin": self.origin, "links": links, "tables": tables}

    @classmethod
    def from_dict(cls, values: Any) -> Calibration:
        """Converts the values of :meth:`to_dict` back.

        Raises:
            WorldError: values that :meth:`to_dict` does not return.
        """
        if not isinstance(values, Mapping) or values.get("version") != VERSION:
            version = values.get("version") if isinstance(values, Mapping) else None
            raise WorldError(f"it has version {version!r}, this shardwright reads version {VERSION}")
        try:
            tables = {
                operation: {int(ranks): _table(operation, rows) for ranks, rows in measured.items()}
                for operation, measured in values["tables"].items()
            }
            given = {name: _positive(values["links"][name]) for name in ("launch", "latency", "bandwidth")}
            links = Links(given["launch"], given["latency"], given["bandwidth"])
            return cls(tables, links, int(values["cpus"]), str(values["origin"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise WorldError(f"it is not a calibration: {type(error).__name__}: {error}") from None

    def save(self, path: Path) -> None:
        """Writes it to a file, completely or not at all. Makes the folder."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{os.getpid()}")
        draft.write_text(json.dumps(self.to_dict(), indent=1) + "\n", "utf-8")
        draft.replace(path)


def _table(operation: str, rows: Sequence[Any]) -> Table:
    known = ALGORITHMS[operation]
    table = tuple((math.inf if limit is None else _positive(limit), tuple(names)) for limit, names in rows)
    limits = [limit for limit, _ in table]
    if not table or limits != sorted(limits) or limits[-1] != math.inf:
        raise ValueError(f"the sizes of {operation} do not ascend to the last, which has none")
    unknown = {name for _, names in table for name in names} - set(known)
    if unknown:
        raise ValueError(f"{operation} has no algorithm {', '.join(sorted(map(repr, unknown)))}")
    return table


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{value!r} is not a number from 0")
    return float(value)


def location() -> Path:
    """Returns the path of this user's calibration: ``SHARDWRIGHT_CALIBRATION``, else a file in the user's cache."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "shardwright" / "calibration.json"


def load(path: Path | None = None) -> Calibration:
    """Reads the calibration in a file, default the user's. Returns :data:`DEFAULT` if there is none.

    A file that cannot be used, or that was measured on a machine with another number of cores, is warned of and left.

    A file that cannot be used, or that was measured on a machine with another number of cores, is ignored with a warning.

    Raises:
        WorldError: a file that was asked for is missing, unreadable or of another machine.
    """
    asked = path is not None or bool(os.environ.get(VARIABLE))
    path = path or location()
    try:
        found = Calibration.from_dict(json.loads(path.read_text("utf-8")))
        cpus = os.cpu_count() or 1
        if found.cpus != cpus:
            raise WorldError(f"it was measured on a machine with {found.cpus} cores, this one has {cpus}")
    except FileNotFoundError:
        if not asked:
            return DEFAULT
        problem = "there is no such file"
    except (OSError, UnicodeDecodeError) as error:
        problem = f"it cannot be read: {error}"
    except json.JSONDecodeError as error:
        problem = f"it is not JSON: {error}"
    except WorldError as error:
        problem = str(error)
    else:
        return found
    warnings.warn(
        f"the calibration {path} is not used, the defaults are: {problem}. To measure this machine: shardwright calibrate",
        RuntimeWarning,
        stacklevel=2,
    )
    return DEFAULT


def _default(text: str) -> Mapping[str, Mapping[int, Table]]:
    """Parses tables from lines ``operation ranks: names <= bytes, names <= bytes, names``."""
    tables: dict[str, dict[int, Table]] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        head, _, rest = line.partition(": ")
        operation, ranks = head.split()
        rows = [row.partition(" <= ") for row in rest.split(", ")]
        table = tuple((float(limit) if limit else math.inf, tuple(names.split())) for names, _, limit in rows)
        tables.setdefault(operation, {})[int(ranks)] = table
    return tables


# Two cores of an AMD EPYC, torch 2.13, nothing else running.
DEFAULT = Calibration(
    _default("""
        all_reduce 2: hub <= 1048576, backend chain pieces
        all_reduce 3: hub <= 2097152, pieces chain
        all_reduce 4: hub <= 2097152, pieces chain
        all_reduce 8: hub <= 2097152, chain pieces
        reduce_scatter 2: hub <= 131072, direct backend
        reduce_scatter 3: hub <= 1048576, direct backend
        reduce_scatter 4: hub <= 2097152, direct backend
        reduce_scatter 8: hub <= 524288, backend direct
        all_gather 2: hub <= 262144, direct backend
        all_gather 3: hub <= 1048576, direct backend
        all_gather 4: hub <= 4194304, direct backend
        all_gather 8: hub direct
        exchange 2: direct backend
        exchange 3: direct backend
        exchange 4: direct backend
        exchange 8: backend direct
    """),
    Links(launch=2e-5, latency=1e-4, bandwidth=8e8),
    cpus=2,
    origin="defaults",
)

# Open MPI 5 over shared memory, on the same machine.
MPI = Calibration(
    _default("""
        all_reduce 2: backend <= 131072, copies <= 2097152, pieces chain
        all_reduce 4: backend <= 262144, pieces hub chain
        reduce_scatter 2: backend <= 2097152, direct
        reduce_scatter 4: backend direct
        all_gather 2: backend direct
        all_gather 4: backend direct
        exchange 2: backend direct
        exchange 4: backend direct
    """),
    Links(launch=5e-6, latency=5e-6, bandwidth=4e9),
    cpus=2,
    origin="defaults",
)
