"""Says what a job becomes on a cluster: its pods, what is injected into them, and when it ends."""

from __future__ import annotations

from shardwright.launch.kubernetes.environment import variables
from shardwright.launch.kubernetes.job import CONTAINER, SCHEDULER, SERVER, WORKER, Job
from shardwright.launch.kubernetes.render import notes, worker_host


def explain(job: Job, to: str = "jobset") -> str:
    """Returns what a job becomes, as text.

    Args:
        job: the job.
        to: what it is rendered as: ``jobset``, ``trainjob`` or ``job``.
    """
    host = worker_host(job, to)
    lines = [f"{job.name} as {to}: " + ", ".join(_counted(role.replicas, role.name) for role in job.roles.values())]
    for role in job.roles.values():
        if role.name == SCHEDULER:
            continue
        own = role.container
        command = " ".join([*(own.get("command") or ()), *(own.get("args") or ())]) or "what its image runs"
        lines += ["", f"{_counted(role.replicas, role.name)}: container {CONTAINER} of {own.get('image')} runs {command}"]
        rows = [(v.name, v.field or v.value, v.meaning) for v in variables(job, role.name, host)]
        widths = [max(len(row[at]) for row in rows) for at in range(2)]
        lines += [f"  {a.ljust(widths[0])}  {b.ljust(widths[1])}  {c}" for a, b, c in rows]
    lines += ["", _end(job), *(f"note: {line}" for line in notes(job, to))]
    return "\n".join(lines)


def _counted(count: int, role: str) -> str:
    return f"{count} {role}{'' if count == 1 else 's'}"


def _end(job: Job) -> str:
    ends = "all workers have ended well" if job.all_workers else "worker 0 has ended well"
    fails = "it goes on as long as one worker runs" if job.tolerates_workers else "a failed worker fails it"
    again = f"then it is started again, {job.restarts} times at most" if job.restarts else "then it ends"
    alone = f"; a failed {SERVER} is started again alone" if job.count(SERVER) else ""
    return f"The job has succeeded when {ends}; {fails}, {again}{alone}." if job.count(WORKER) else ""
