"""Reads the variables of a dynamic cluster: ``MS_ROLE``, ``MS_WORKER_NUM``, ``MS_SCHED_HOST`` and the like."""

from __future__ import annotations

from collections.abc import Mapping

from shardwright.errors import WorldError
from shardwright.world.job.job import Job, check_rank, checked_port, read_number


def read_cluster(variables: Mapping[str, str]) -> Job | None:
    """Reads the job of a dynamic cluster; None where ``MS_ROLE`` and the scheduler's address are not all set.

    Ranks meet at rank 0, so ``MS_SCHED_HOST`` has to be the host of rank 0.

    Raises:
        WorldError: a variable is missing or makes no sense, or the process is no worker.

    >>> cluster = {"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "4", "MS_SCHED_HOST": "10.0.0.1", "MS_SCHED_PORT": "8118"}
    >>> read_cluster({**cluster, "MS_NODE_ID": "2"}).rank
    2
    """
    role = variables.get("MS_ROLE", "")
    if not role:
        return None
    if role in ("MS_PSERVER", "MS_SCHED"):  # never alone as a simulated rank, without a word
        raise WorldError(
            f"MS_ROLE={role}: this process is no worker, and ranks meet at rank 0 without a process of their own for it; start "
            "workers only, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        )
    if role != "MS_WORKER":
        raise WorldError(f"MS_ROLE is {role!r}: it must be MS_WORKER, export MS_ROLE=MS_WORKER")
    size = read_number(variables, "MS_WORKER_NUM", 1)
    if size == 1:
        return None
    rank_name = "RANK_ID" if variables.get("RANK_ID") else "MS_NODE_ID"
    if not variables.get(rank_name, "").strip().isdigit():
        raise WorldError(
            f"MS_NODE_ID is {variables.get('MS_NODE_ID')!r} and RANK_ID is not set, so this worker has no rank: export "
            f"MS_NODE_ID=<its rank, from 0 to {size - 1}>"
        )
    rank = read_number(variables, rank_name)
    check_rank(rank, size, rank_name, "MS_WORKER_NUM")
    if not variables.get("MS_SCHED_HOST"):
        raise WorldError("MS_SCHED_HOST is not set, so nothing says where rank 0 is: export MS_SCHED_HOST=<host of rank 0>")
    port = checked_port(read_number(variables, "MS_SCHED_PORT"), "MS_SCHED_PORT")
    local_rank = read_number(variables, "DEVICE_ID") if variables.get("DEVICE_ID") else 0
    return Job("dynamic cluster", rank, size, local_rank, local_rank + 1, variables["MS_SCHED_HOST"], port)
