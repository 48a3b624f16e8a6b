"""Reads a job of roles from the YAML that MindSpore's operator takes: ``kind: MSJob``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from shardwright.errors import Problems
from shardwright.launch.kubernetes.checks import Checked, meant
from shardwright.launch.kubernetes.environment import INJECTED
from shardwright.launch.kubernetes.job import CONTAINER, DEFAULT_PORT, PORT_NAME, SCHEDULER, SERVER, WORKER, Job, Role

API_VERSION, KIND = "mindspore.gitee.com/v1", "MSJob"
_ROLES = {"Scheduler": SCHEDULER, "PS": SERVER, "Worker": WORKER}
_RESTARTS = ("Never", "Always", "OnFailure", "ExitCode")
_RUN_POLICY = (
    "cleanPodPolicy", "backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished", "schedulingPolicy", "suspend",
)  # fmt: skip
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_LONGEST = 63 - len("-worker-9999-99999")  # names of pods are made of it, and are names of hosts


def read_msjob(content: Any) -> Job:
    """Reads a job from the content of a YAML file.

    Args:
        content: the mapping that the file holds.

    Raises:
        StrategyError: something is wrong; all problems are listed, each with its place in the file.

    >>> pod = {"spec": {"containers": [{"name": "mindspore", "image": "train:1", "command": ["python", "train.py"]}]}}
    >>> specs = {"Worker": {"replicas": 4, "template": pod}}
    >>> job = read_msjob({"apiVersion": "mindspore.gitee.com/v1", "kind": "MSJob", "metadata": {"name": "digits"},
    ...                   "spec": {"msReplicaSpecs": specs}})
    >>> job.name, job.count("worker")
    ('digits', 4)
    """
    problems = Problems()
    top = Checked(content, "", problems, ("apiVersion", "kind", "metadata", "spec", "status"))
    for key, value in (("apiVersion", API_VERSION), ("kind", KIND)):
        if top.get(key, str, "", (value,)) == "" and not top.values.get(key):
            problems.add(f"{key} is missing; write {key}: {value}")
    metadata = Checked(
        top.values.get("metadata", {}), "metadata", problems, ("name", "namespace", "labels", "annotations", "generateName")
    )
    name = _name(metadata, problems)
    spec = Checked(
        top.values.get("spec"), "spec", problems, ("runPolicy", "successPolicy", "enableDynamicWorker", "msReplicaSpecs")
    )
    policy = Checked(spec.get("runPolicy", dict, {}), "spec.runPolicy", problems, _RUN_POLICY)
    notes = [
        f"spec.runPolicy.{key} is not carried over: give the job to a queue of your cluster"
        for key in ("schedulingPolicy",)
        if key in policy.values
    ]
    roles = _roles(spec.get("msReplicaSpecs", dict, {}), problems)
    if WORKER not in roles and not any("msReplicaSpecs.Worker" in line for line in problems.lines):
        problems.add("spec.msReplicaSpecs has no Worker; add one with its replicas and its template")
    job = Job(
        name,
        {key: value for key, value in metadata.values.items() if key != "name"},
        roles,
        spec.get("successPolicy", str, "", ("", "AllWorkers")) == "AllWorkers",
        spec.get("enableDynamicWorker", bool, False),
        policy.get("cleanPodPolicy", str, "Running", ("None", "Running", "All")),
        policy.get("backoffLimit", int, 0, least=0),
        policy.get("activeDeadlineSeconds", int, None, least=1),
        policy.get("ttlSecondsAfterFinished", int, None, least=0),
        tuple(notes),
    )
    problems.raise_if_any("the MSJob cannot be followed")
    return job


def _name(metadata: Checked, problems: Problems) -> str:
    name = metadata.get("name", str, "")
    if not name:
        problems.add("metadata.name is missing; write the job's name, such as digits")
    elif not _NAME.fullmatch(name) or len(name) > _LONGEST:
        why = "underscores" if "_" in name else "what is no small letter, digit or dash"
        why = f"more than {_LONGEST} letters" if len(name) > _LONGEST else why
        fine = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")[:_LONGEST] or "job"
        problems.add(f"metadata.name {name!r} has {why}, and pods are hosts of that name; write {fine}")
    return name


def _roles(specs: Mapping[str, Any], problems: Problems) -> dict[str, Role]:
    """Reads the roles; their keys may be written in capitals or not."""
    found: dict[str, Role] = {}
    written = {key.lower(): key for key in _ROLES}
    for key, value in specs.items():
        known = written.get(str(key).lower())
        if known is None:
            problems.add(f"spec.msReplicaSpecs.{key}: there is no such role; {meant(str(key), list(_ROLES))}")
        elif _ROLES[known] in found:
            problems.add(f"spec.msReplicaSpecs.{key} stands there twice; write {known} once")
        else:
            found[_ROLES[known]] = _role(_ROLES[known], value, f"spec.msReplicaSpecs.{key}", problems)
    return found


def _role(name: str, value: Any, place: str, problems: Problems) -> Role:
    spec = Checked(value, place, problems, ("replicas", "restartPolicy", "template"))
    replicas = spec.get("replicas", int, 1, least=1)
    if name == SCHEDULER and replicas > 1:
        problems.add(f"{place}.replicas is {replicas}; a job has one Scheduler at most: write 1")
    restart = spec.get("restartPolicy", str, "Never", _RESTARTS)
    template = Checked(spec.values.get("template", {}), f"{place}.template", problems, ("metadata", "spec"))
    pod = template.values.get("spec")
    containers = pod.get("containers") if isinstance(pod, Mapping) else None
    where = f"{place}.template.spec.containers"
    if not isinstance(containers, list) or not all(isinstance(c, Mapping) for c in containers):
        problems.add(f"{where} is missing; write a list with a container named {CONTAINER}")
        return Role(name, replicas, restart, {"spec": {"containers": [{"name": CONTAINER}]}})
    own = [at for at, c in enumerate(containers) if c.get("name") == CONTAINER]
    if len(own) != 1:
        names = ", ".join(str(c.get("name")) for c in containers) or "none"
        problems.add(f"{where}: one has to be named {CONTAINER}, and there are {names}; rename the one that runs the script")
        return Role(name, replicas, restart, {"spec": {"containers": [{"name": CONTAINER}]}})
    container, at = containers[own[0]], f"{where}[{own[0]}]"
    if not isinstance(container.get("image"), str) or not container["image"]:
        problems.add(f"{at}.image is {container.get('image')!r}; write the image that has the script")
    for variable in container.get("env") or ():
        if isinstance(variable, Mapping) and variable.get("name") in INJECTED:
            problems.add(f"{at}.env: {variable['name']} is injected; remove it")
    return Role(name, replicas, restart, deepcopy(dict(template.values)), _port(container, at, problems))


def _port(container: Mapping[str, Any], place: str, problems: Problems) -> int:
    for at, port in enumerate(container.get("ports") or ()):
        if isinstance(port, Mapping) and port.get("name") == PORT_NAME:
            number = port.get("containerPort")
            if isinstance(number, int) and not isinstance(number, bool) and 1024 <= number <= 65535:
                return number
            problems.add(f"{place}.ports[{at}].containerPort is {number!r}; write 1024 to 65535")
    return DEFAULT_PORT
