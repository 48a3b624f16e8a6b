"""Value that every launcher's reader returns: one rank's place in a job, and where the ranks meet."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from shardwright.errors import WorldError

_FIRST_PORT, _PORTS = 20000, 10000  # below the range from which systems hand out ports, above what services use


@dataclass(frozen=True)
class Job:
    """One rank's place in a job of ``size`` ranks, which meet at ``address``:``port``, and the launcher that said so."""

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int


def read_number(variables: Mapping[str, str], name: str, least: int = 0) -> int:
    """Reads a variable that must be a whole number of at least ``least``.

    Raises:
        WorldError: the variable is missing, no whole number, or too small.

    >>> read_number({"SLURM_PROCID": "3"}, "SLURM_PROCID")
    3
    """
    text = variables.get(name, "")
    if not text:
        raise WorldError(f"the environment variable {name} is not set: export {name}=<a whole number>")
    try:
        number = int(text)
    except ValueError:
        raise WorldError(f"the environment variable {name} is {text!r}: it must be a whole number") from None
    if number < least:
        raise WorldError(f"the environment variable {name} is {number}: it must be {least} or more")
    return number


def check_rank(rank: int, size: int, rank_name: str, size_name: str) -> None:
    """Refuses a rank that is none of the job's.

    Args:
        rank, size: the rank and the number of ranks.
        rank_name, size_name: the variables that they were read from, for messages.

    Raises:
        WorldError: the rank is not below the size.
    """
    if not 0 <= rank < size:
        raise WorldError(f"{rank_name} is {rank} and {size_name} {size}: ranks must go from 0 to {size_name} - 1")


def read_port(variables: Mapping[str, str], job: str) -> int:
    """Reads ``MASTER_PORT``; without it, derives from the job's name a port that all its ranks agree on.

    Raises:
        WorldError: ``MASTER_PORT`` is no port.

    >>> read_port({}, "slurm 17.0") == read_port({}, "slurm 17.0") != read_port({}, "slurm 18.0")
    True
    """
    if not variables.get("MASTER_PORT"):
        return _FIRST_PORT + zlib.crc32(job.encode()) % _PORTS
    return checked_port(read_number(variables, "MASTER_PORT"), "MASTER_PORT")


def checked_port(port: int, name: str) -> int:
    """Returns a port that a user may listen on.

    Raises:
        WorldError: it is out of range.
    """
    if not 1024 <= port <= 65535:
        raise WorldError(f"{name} is {port}: a port must be from 1024 to 65535, export {name}=29500")
    return port
