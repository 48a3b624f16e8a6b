"""A job of roles: values alone, whatever they were read from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SCHEDULER, SERVER, WORKER = "scheduler", "server", "worker"
CONTAINER, PORT_NAME, DEFAULT_PORT = "mindspore", "msjob-port", 2222


@dataclass(frozen=True)
class Role:
    """Pods of one kind.

    Args:
        name: ``scheduler``, ``server`` or ``worker``.
        replicas: number of pods.
        restart: when a pod that ended is started again: ``Never``, ``OnFailure``, ``Always`` or ``ExitCode``.
        template: the pod template, with a container named ``mindspore``.
        port: that the container listens on.
    """

    name: str
    replicas: int
    restart: str
    template: dict[str, Any]
    port: int = DEFAULT_PORT

    @property
    def container(self) -> dict[str, Any]:
        """The container that runs the script."""
        found: dict[str, Any] = next(c for c in self.template["spec"]["containers"] if c.get("name") == CONTAINER)
        return found


@dataclass(frozen=True)
class Job:
    """A job of roles.

    Args:
        name: of the job.
        metadata: its namespace, labels and annotations.
        roles: by name; there are workers.
        all_workers: whether the job succeeds when all workers have; else when worker 0 has.
        tolerates_workers: whether the job goes on where workers fail.
        clean_pods: which pods are deleted at the end: ``None``, ``Running`` or ``All``.
        restarts: how often a failed job is started again.
        deadline: seconds that it may take.
        keep: seconds that it is kept after its end.
        notes: what was read and has no meaning here.
    """

    name: str
    metadata: dict[str, Any]
    roles: dict[str, Role]
    all_workers: bool = False
    tolerates_workers: bool = False
    clean_pods: str = "Running"
    restarts: int = 0
    deadline: int | None = None
    keep: int | None = None
    notes: tuple[str, ...] = field(default=())

    def count(self, role: str) -> int:
        """Returns the number of pods of a role."""
        return self.roles[role].replicas if role in self.roles else 0
