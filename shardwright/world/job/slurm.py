"""Reads the variables that Slurm's srun sets, and expands its lists of nodes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping

from shardwright.errors import WorldError
from shardwright.world.job.job import Job, check_rank, read_number, read_port

_NODES_PART = re.compile(r"\[([^\[\]]*)\]|([^\[\],]+)")


def read_slurm(variables: Mapping[str, str]) -> Job | None:
    """Reads the job step that srun describes; None outside of one, or where it has a single task.

    A batch script that runs without srun is no step: it is one process, whatever the allocation's size.

    Raises:
        WorldError: a variable is missing or makes no sense.

    >>> step = {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "17", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8",
    ...         "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_NODEID": "1",
    ...         "SLURM_STEP_NODELIST": "n[1-2]"}
    >>> job = read_slurm(step)
    >>> job.rank, job.size, job.local_rank, job.local_size, job.address
    (5, 8, 1, 4, 'n1')
    """
    step = _first(variables, "SLURM_STEP_ID", "SLURM_STEPID")
    if not variables.get("SLURM_PROCID") or not variables.get(step):
        return None
    size_name = _first(variables, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")
    rank, size = read_number(variables, "SLURM_PROCID"), read_number(variables, size_name, 1)
    check_rank(rank, size, "SLURM_PROCID", size_name)
    if size == 1:
        return None
    local_rank = read_number(variables, "SLURM_LOCALID")
    counts = _tasks_per_node(variables)
    node = read_number(variables, "SLURM_NODEID") if variables.get("SLURM_NODEID") else 0
    local_size = counts[node] if node < len(counts) else local_rank + 1
    address = variables.get("MASTER_ADDR")
    if not address:
        list_name = _first(variables, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
        nodes = expand_nodes(variables.get(list_name, ""))
        if not nodes:
            raise WorldError(f"{list_name} is not set, so nothing says where rank 0 is: export MASTER_ADDR=<host of rank 0>")
        address = "127.0.0.1" if len(nodes) == 1 else nodes[0]
    job = _first(variables, "SLURM_JOB_ID", "SLURM_JOBID")
    port = read_port(variables, f"slurm {variables.get(job)}.{variables[step]}")
    return Job("Slurm", rank, size, local_rank, local_size, address, port)


def expand_nodes(text: str) -> list[str]:
    """Expands a list of nodes as Slurm writes it, as ``scontrol show hostnames`` does.

    Raises:
        WorldError: the list is malformed.

    >>> expand_nodes("n[1-3,7],login")
    ['n1', 'n2', 'n3', 'n7', 'login']
    >>> expand_nodes("r[1-2]n[09-10]-ib")
    ['r1n09-ib', 'r1n10-ib', 'r2n09-ib', 'r2n10-ib']
    """
    nodes: list[str] = []
    for entry in re.findall(r"(?:\[[^\]]*\]|[^,])+", text.strip()):
        if "".join(m[0] for m in _NODES_PART.finditer(entry)) != entry or entry.count("[") != entry.count("]"):
            raise WorldError(f"the list of nodes {text!r} has unbalanced brackets in {entry!r}: write n[1-4,7]")
        parts = [_expanded(m[1], text) if m[2] is None else [m[2]] for m in _NODES_PART.finditer(entry)]
        nodes += ["".join(piece) for piece in itertools.product(*parts)]
    return nodes


def _expanded(ranges: str, text: str) -> list[str]:
    found: list[str] = []
    for item in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise WorldError(f"the list of nodes {text!r} has the range {item!r}: write a number, or first-last, as n[1-4,7]")
        width = len(match[1])  # numbers keep the zeros before them
        found += [str(number).zfill(width) for number in range(int(match[1]), int(match[2] or match[1]) + 1)]
    return found


def _tasks_per_node(variables: Mapping[str, str]) -> list[int]:
    """Expands ``4(x2),3`` to 4, 4, 3."""
    name = _first(variables, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    counts: list[int] = []
    for item in filter(None, variables.get(name, "").split(",")):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if match is None:
            raise WorldError(f"the environment variable {name} is {variables[name]!r}: write counts as 4(x2),3")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _first(variables: Mapping[str, str], *names: str) -> str:
    """Returns the first of some names that is set, else the first."""
    return next((name for name in names if variables.get(name)), names[0])
