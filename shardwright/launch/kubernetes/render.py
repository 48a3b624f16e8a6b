"""Renders manifests from a job: a JobSet, a TrainJob of Kubeflow with its runtime, or an Indexed Job with its service."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from shardwright.errors import Problems
from shardwright.launch.kubernetes.job import PORT_NAME, SCHEDULER, SERVER, WORKER, Job
from shardwright.launch.kubernetes.pods import is_alone, job_spec

JOB_SET, TRAINER = "jobset.x-k8s.io/v1alpha2", "trainer.kubeflow.org/v1alpha1"
_NODE = "node"  # the job of a runtime whose pods train
_STEP = "trainer.kubeflow.org/trainjob-ancestor-step"
Manifest = dict[str, Any]


def render(job: Job, to: str = "jobset") -> list[Manifest]:
    """Returns the manifests of a job.

    Args:
        job: the job.
        to: ``jobset``, ``trainjob`` or ``job``.

    Raises:
        StrategyError: the kind of manifest cannot do what the job asks for.
    """
    return TARGETS[to](job)


def notes(job: Job, to: str = "jobset") -> list[str]:
    """Lists what is rendered otherwise than it was written.

    Args:
        job: the job.
        to: see :func:`render`.
    """
    found = list(job.notes)
    if SCHEDULER in job.roles:
        found.append("Scheduler: not rendered, as ranks meet at worker 0, which keeps the store")
    for role in job.roles.values():
        if role.restart in ("Always", "OnFailure") and not is_alone(role):
            found.append(
                f"restartPolicy {role.restart} of {role.name}s is Never: they wait for each other, so that all are started "
                "again, runPolicy.backoffLimit times"
            )
        elif role.restart == "Always":
            found.append(
                f"restartPolicy Always of {role.name}s is OnFailure: what has ended well is not started again in a job"
            )
    if job.clean_pods == "All" and job.keep is None:
        found.append("cleanPodPolicy All: the job is deleted with its pods as soon as it ends (ttlSecondsAfterFinished: 0)")
    return found


def worker_host(job: Job, to: str = "jobset") -> str:
    """Returns the name of worker 0's pod in the job's network.

    Args:
        job: the job.
        to: see :func:`render`.
    """
    return {
        "jobset": f"{job.name}-{WORKER}-0-0.{job.name}",
        "trainjob": f"{job.name}-{_NODE}-0-0.{job.name}",
        "job": f"{job.name}-0.{job.name}",
    }[to]


def job_set(job: Job) -> list[Manifest]:
    """Renders a JobSet: a job of workers, and a job for each server, so that one server is started again alone."""
    return [{"apiVersion": JOB_SET, "kind": "JobSet", "metadata": _metadata(job), "spec": _job_set_spec(job, "jobset", WORKER)}]


def train_job(job: Job) -> list[Manifest]:
    """Renders a TrainJob and the TrainingRuntime that it names, whose template is that of a JobSet."""
    runtime = _job_set_spec(job, "trainjob", _NODE)
    node = next(each for each in runtime["replicatedJobs"] if each["name"] == _NODE)
    node["template"]["metadata"] = {"labels": {_STEP: "trainer"}}
    name = f"{job.name}-runtime"
    spec = {"mlPolicy": {"numNodes": job.count(WORKER)}, "template": {"spec": runtime}}
    asked = {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": name}
    own: Manifest = {"runtimeRef": asked, "trainer": {"numNodes": job.count(WORKER)}}
    if job.deadline is not None:
        own["activeDeadlineSeconds"] = job.deadline
    return [
        {"apiVersion": TRAINER, "kind": "TrainingRuntime", "metadata": {**_metadata(job), "name": name}, "spec": spec},
        {"apiVersion": TRAINER, "kind": "TrainJob", "metadata": _metadata(job), "spec": own},
    ]


def indexed_job(job: Job) -> list[Manifest]:
    """Renders an Indexed Job of the workers and the headless service that gives their pods names.

    Raises:
        StrategyError: the job has parameter servers, or workers that are to be started again.
    """
    problems = Problems()
    if SERVER in job.roles:
        problems.add(f"a Job has one kind of pods, and {job.name} has PS beside Worker; render it as a jobset")
    worker = job.roles[WORKER]
    if job.restarts and not is_alone(worker):
        problems.add(
            f"runPolicy.backoffLimit is {job.restarts}, and a Job starts one pod again, not all {worker.replicas} workers, "
            "which wait for each other; render it as a jobset, or write 0"
        )
    problems.raise_if_any("the job cannot be rendered as a Job")
    spec = job_spec(job, worker, worker_host(job, "job"), worker.replicas, job.name)
    spec |= _kept(job)
    labels = {"batch.kubernetes.io/job-name": job.name}
    service = {
        "clusterIP": "None", "publishNotReadyAddresses": True, "selector": labels,
        "ports": [{"name": PORT_NAME, "port": worker.port}],
    }  # fmt: skip
    return [
        {"apiVersion": "v1", "kind": "Service", "metadata": _metadata(job), "spec": service},
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": _metadata(job), "spec": spec},
    ]


TARGETS: Mapping[str, Callable[[Job], list[Manifest]]] = {"jobset": job_set, "trainjob": train_job, "job": indexed_job}


def _metadata(job: Job) -> Manifest:
    return {"name": job.name, **job.metadata}


def _kept(job: Job) -> Manifest:
    keep = 0 if job.clean_pods == "All" and job.keep is None else job.keep
    return {} if keep is None else {"ttlSecondsAfterFinished": keep}


def _job_set_spec(job: Job, to: str, workers: str) -> Manifest:
    """Returns the spec of a JobSet.

    Args:
        job: the job.
        to: what it is rendered for.
        workers: the name of the job of workers.
    """
    host, worker = worker_host(job, to), job.roles[WORKER]
    own: Manifest = {
        "name": workers, "replicas": 1, "template": {"spec": job_spec(job, worker, host, worker.replicas)},
    }  # fmt: skip
    jobs = [own]
    spec: Manifest = {
        "network": {"enableDNSHostnames": True, "subdomain": job.name, "publishNotReadyAddresses": True},
        "successPolicy": {"operator": "All", "targetReplicatedJobs": [workers]},
        "failurePolicy": {"maxRestarts": job.restarts},
    }
    rules = []
    if worker.restart == "ExitCode":
        reasons = {"onJobFailureReasons": ["PodFailurePolicy"], "targetReplicatedJobs": [workers]}
        rules.append({"name": "permanentFailure", "action": "FailJobSet", **reasons})
    if SERVER in job.roles:
        server = job.roles[SERVER]
        template = {"spec": job_spec(job, server, host, 1)}
        jobs.insert(0, {"name": SERVER, "replicas": server.replicas, "template": template})
        own["dependsOn"] = [{"name": SERVER, "status": "Ready"}]
        rules.append({"name": "serverAlone", "action": "RestartJob", "targetReplicatedJobs": [SERVER]})
    if rules:
        spec["failurePolicy"]["rules"] = rules
    return {**spec, **(_kept(job) if to == "jobset" else {}), "replicatedJobs": jobs}
