"""Reads the variables that mpirun sets: Open MPI's, and those of PMI (MPICH, Intel MPI)."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from shardwright.errors import WorldError
from shardwright.world.job.job import Job, check_rank, read_number, read_port

# rank, number of ranks, rank on this host, number of ranks on it
_OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
_PMI = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")


def read_ranks(variables: Mapping[str, str]) -> tuple[int, int] | None:
    """Reads the rank and the number of ranks that mpirun gives; None outside of it.

    Raises:
        WorldError: a variable is missing or makes no sense.

    >>> read_ranks({"PMI_RANK": "1", "PMI_SIZE": "4"})
    (1, 4)
    """
    names = _names(variables)
    if names is None:
        return None
    rank, size = read_number(variables, names[0]), read_number(variables, names[1], 1)
    check_rank(rank, size, names[0], names[1])
    return rank, size


def read_mpi(variables: Mapping[str, str]) -> Job | None:
    """Reads the job that mpirun describes; None outside of one, or where it has a single rank.

    Ranks meet at ``MASTER_ADDR`` if that is set, on one host at its loopback address, else where mpi4py tells that rank 0 is.

    Raises:
        WorldError: a variable is missing or makes no sense, or nothing tells where rank 0 is, or at which port.

    >>> four = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
    >>> read_mpi(four).address
    '127.0.0.1'
    """
    names, ranks = _names(variables), read_ranks(variables)
    if names is None or ranks is None or ranks[1] == 1:
        return None
    rank, size = ranks
    local_rank = read_number(variables, names[2]) if variables.get(names[2]) else rank
    local_size = read_number(variables, names[3], 1) if variables.get(names[3]) else None
    # the processes of one host have one parent where nothing else names the job
    port = read_port(variables, f"mpi {variables.get('PMIX_NAMESPACE') or os.getppid()}")
    address = variables.get("MASTER_ADDR")
    if address and local_size != size and not (variables.get("MASTER_PORT") or variables.get("PMIX_NAMESPACE")):
        raise WorldError(
            f"mpirun started {size} ranks on several hosts, MASTER_ADDR is {address}, and no port is known to all: "
            "export MASTER_PORT=<a free port of that host> to all ranks"
        )
    if not address and local_size == size:
        address = "127.0.0.1"
    if not address:
        told = _tell_first_host(port)
        if told is None:
            here = f"{local_size} of which run on this host" if local_size else f"and {names[3]} is not set"
            raise WorldError(
                f"mpirun started {size} ranks, {here}, and nothing says where rank 0 is: export MASTER_ADDR=<host of rank 0> "
                "to all ranks (Open MPI: mpirun -x MASTER_ADDR), or install mpi4py"
            )
        address, port = told
    return Job("mpirun", rank, size, local_rank, local_size or local_rank + 1, address, port)


def is_started_by_mpirun(variables: Mapping[str, str]) -> bool:
    """Tells whether mpirun has started this process, alone or as one of several."""
    return _names(variables) is not None


def _names(variables: Mapping[str, str]) -> tuple[str, str, str, str] | None:
    return next((names for names in (_OPEN_MPI, _PMI) if variables.get(names[0])), None)


def _tell_first_host(port: int) -> tuple[str, int] | None:
    """Asks MPI for the name of rank 0's host, and its port."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):  # not installed, or without an MPI library
        return None
    name, first_port = MPI.COMM_WORLD.bcast((socket.gethostname(), port), 0)
    return str(name), int(first_port)
