"""Says what is injected into the containers of each role: torch's names of ranks, and MindSpore's of the same things."""

from __future__ import annotations

from typing import Any, NamedTuple

from shardwright.launch.kubernetes.job import SERVER, WORKER, Job

# Where a pod learns its number: pods of an Indexed Job, and jobs of a JobSet.
POD_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
JOB_INDEX = "metadata.labels['jobset.sigs.k8s.io/job-index']"
_ROLES = {WORKER: "MS_WORKER", SERVER: "MS_PSERVER"}


class Variable(NamedTuple):
    """A variable, with its value or the field of the pod that holds it, and what it means."""

    name: str
    value: str
    field: str
    meaning: str

    def manifest(self) -> dict[str, Any]:
        """Returns the variable as a manifest has it."""
        if self.field:
            return {"name": self.name, "valueFrom": {"fieldRef": {"fieldPath": self.field}}}
        return {"name": self.name, "value": self.value}


def variables(job: Job, role: str, host: str) -> list[Variable]:
    """Lists what is injected into each container of a role.

    Args:
        job: the job.
        role: the role.
        host: the name of worker 0's pod in the job's network.
    """
    workers, port = str(job.count(WORKER)), str(job.roles[WORKER].port)
    of_torch = [
        Variable("RANK", "", POD_INDEX, "rank of the pod, from 0"),
        Variable("WORLD_SIZE", workers, "", "number of ranks"),
        Variable("LOCAL_RANK", "0", "", "rank within the pod"),
        Variable("LOCAL_WORLD_SIZE", "1", "", "ranks of the pod"),
        Variable("MASTER_ADDR", host, "", "host of rank 0, which keeps the store"),
        Variable("MASTER_PORT", port, "", "port of the store"),
    ]
    of_mindspore = [
        Variable("MS_ROLE", _ROLES.get(role, ""), "", "role of the pod"),
        Variable("MS_NODE_ID", "", POD_INDEX if role == WORKER else JOB_INDEX, "number of the pod within its role"),
        Variable("MS_WORKER_NUM", workers, "", "number of workers"),
        Variable("MS_SERVER_NUM", str(job.count(SERVER)), "", "number of parameter servers"),
        Variable("MS_SCHED_HOST", host, "", "host where ranks meet: rank 0, there is no pod of its own for it"),
        Variable("MS_SCHED_PORT", port, "", "port where ranks meet"),
    ]
    return (of_torch if role == WORKER else []) + of_mindspore


INJECTED = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "MS_ROLE", "MS_NODE_ID",
    "MS_WORKER_NUM", "MS_SERVER_NUM", "MS_SCHED_HOST", "MS_SCHED_PORT",
)  # fmt: skip
