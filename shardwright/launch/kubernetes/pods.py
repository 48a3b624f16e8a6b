"""The pods of a role: its template with what is injected, and the job that runs them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from shardwright.launch.kubernetes.environment import variables
from shardwright.launch.kubernetes.job import CONTAINER, PORT_NAME, WORKER, Job, Role

_PERMANENT = list(range(1, 128))  # exit codes of ExitCode after which nothing is tried again; above are signals


def pod_template(job: Job, role: Role, host: str, subdomain: str | None = None) -> dict[str, Any]:
    """Returns the template of a role's pods.

    Args:
        job: the job.
        role: the role.
        host: the name of worker 0's pod in the job's network.
        subdomain: of the headless service, where the pods have to say it themselves.
    """
    template = deepcopy(role.template)
    spec = template["spec"]
    spec["restartPolicy"] = "OnFailure" if is_alone(role) and role.restart in ("Always", "OnFailure") else "Never"
    if subdomain is not None:
        spec["subdomain"] = subdomain
    container = next(c for c in spec["containers"] if c.get("name") == CONTAINER)
    container["env"] = [*(container.get("env") or ()), *(v.manifest() for v in variables(job, role.name, host))]
    ports = container.get("ports") or []
    if not any(port.get("name") == PORT_NAME for port in ports):
        ports = [*ports, {"name": PORT_NAME, "containerPort": role.port}]
    container["ports"] = ports
    return template


def is_alone(role: Role) -> bool:
    """Tells whether a pod of a role can be started again by itself: workers wait for each other, and begin anew together."""
    return role.name != WORKER or role.replicas == 1


def job_spec(job: Job, role: Role, host: str, completions: int, subdomain: str | None = None) -> dict[str, Any]:
    """Returns the spec of an Indexed Job that runs pods of a role.

    Args:
        job, role, host, subdomain: see :func:`pod_template`.
        completions: number of pods.
    """
    spec: dict[str, Any] = {
        "completionMode": "Indexed", "completions": completions, "parallelism": completions,
        "backoffLimit": max(job.restarts, 1) if is_alone(role) and role.restart != "Never" else 0,
    }  # fmt: skip
    if job.deadline is not None:
        spec["activeDeadlineSeconds"] = job.deadline
    if role.restart == "ExitCode":
        codes = {"containerName": CONTAINER, "operator": "In", "values": _PERMANENT}
        spec["podFailurePolicy"] = {"rules": [{"action": "FailJob", "onExitCodes": codes}]}
    if role.name == WORKER and job.tolerates_workers and completions > 1:
        del spec["backoffLimit"]
        spec |= {"backoffLimitPerIndex": 0, "maxFailedIndexes": completions - 1}
    if role.name == WORKER and not job.all_workers:
        spec["successPolicy"] = {"rules": [{"succeededIndexes": "0", "succeededCount": 1}]}
    spec["template"] = pod_template(job, role, host, subdomain)
    return spec
