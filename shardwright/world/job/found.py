"""Finds the job that this process is a rank of, whichever launcher started it."""

from __future__ import annotations

from collections.abc import Mapping

from shardwright.errors import WorldError
from shardwright.world.job.cluster import read_cluster
from shardwright.world.job.job import Job, read_number
from shardwright.world.job.mpi import read_mpi, read_ranks
from shardwright.world.job.rank_table import read_rank_table
from shardwright.world.job.slurm import read_slurm
from shardwright.world.job.torchrun import read_environment


def find_job(variables: Mapping[str, str]) -> Job | None:
    """Finds the job that the environment describes: the first of torchrun, rank table, dynamic cluster, mpirun, Slurm.

    None where no launcher started this process, or with a single rank.

    Raises:
        WorldError: a job is described, but not whole; or two launchers give this process different ranks.

    >>> find_job({}) is None
    True
    >>> find_job({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}).launcher
    'torchrun'
    """
    there = {name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if variables.get(name)}
    if len(there) == 3:
        rank, size, local_rank, local_size = read_environment(variables)
        port = read_number(variables, "MASTER_PORT")
        job = Job("torchrun", rank, size, local_rank, local_size, variables["MASTER_ADDR"], port)
        if not variables.get("TORCHELASTIC_RUN_ID"):  # torchrun itself may well run as one task a node of mpirun or srun
            _check_mpi(job, variables, "RANK", "WORLD_SIZE")
        return job
    named = read_rank_table(variables) or read_cluster(variables)
    if named is not None:
        _check_mpi(named, variables, "RANK_ID", "RANK_SIZE")
        return named
    step = read_slurm(variables)
    if step is not None and read_ranks(variables) in (None, (step.rank, step.size)):  # srun sets PMI's variables as well
        return step
    found = read_mpi(variables) or (step if read_ranks(variables) is None else None)
    if found is None and {"RANK", "WORLD_SIZE"} <= there and variables["WORLD_SIZE"].strip() != "1":
        raise WorldError(
            f"this process is rank {variables['RANK']} of a job of {variables['WORLD_SIZE']}, but MASTER_ADDR is not set, so "
            "it cannot find the others: set MASTER_ADDR and MASTER_PORT, or start it with 'torchrun --nproc-per-node "
            f"{variables['WORLD_SIZE']} script.py'; to simulate ranks, unset RANK and WORLD_SIZE"
        )
    return found


def _check_mpi(job: Job, variables: Mapping[str, str], rank_name: str, size_name: str) -> None:
    given = read_ranks(variables)
    if given is not None and given != (job.rank, job.size):
        raise WorldError(
            f"two launchers contradict each other: {job.launcher} ({rank_name}, {size_name}) says rank {job.rank} of "
            f"{job.size}, mpirun rank {given[0]} of {given[1]}: unset the variables of one of them"
        )
