"""A small kubelet with the controllers above it: runs the pods of rendered manifests, each in a network namespace of its own.

It does what the controllers of JobSet, Kubeflow Trainer and Job do as far as rendered manifests use it: names of hosts, fields
and labels of pods, what counts as success, and what is started again after a failure. It needs root and ``ip``.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

INDEX = "batch.kubernetes.io/job-completion-index"


@dataclass
class Pod:
    """A pod: its place, what it runs and its process."""

    job: str
    job_index: int
    index: int
    host: str
    subdomain: str
    spec: dict[str, Any]
    annotations: dict[str, str]
    labels: dict[str, str]
    address: str = ""
    process: subprocess.Popen[bytes] | None = None
    code: int | None = None
    starts: int = 0


@dataclass
class Group:
    """A job of pods, as the Job controller knows it."""

    name: str
    rjob: str
    job_index: int
    spec: dict[str, Any]
    pods: list[Pod] = field(default_factory=list)
    depends: tuple[str, ...] = ()
    failures: int = 0


def can_run() -> bool:
    """Tells whether network namespaces can be made here."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        return False
    name = f"swprobe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return made


class Kubelet:
    """Runs manifests.

    Args:
        manifests: as rendered.
        folder: for logs.
        environment: variables that images have.
    """

    def __init__(self, manifests: list[dict[str, Any]], folder: Path, environment: dict[str, str]):
        self.folder, self.environment = folder, environment
        self.number = os.getpid() % 200
        self.bridge = f"swbr{self.number}"
        self.namespaces: list[str] = []
        self.restarts = 0
        self.alone: list[str] = []
        self.spec, self.groups = _groups(manifests)
        for at, pod in enumerate(pod for group in self.groups for pod in group.pods):
            pod.address = f"10.77.{self.number}.{at + 2}"

    def __enter__(self) -> Kubelet:
        _run("ip", "link", "add", self.bridge, "type", "bridge")
        _run("ip", "addr", "add", f"10.77.{self.number}.1/24", "dev", self.bridge)
        _run("ip", "link", "set", self.bridge, "up")
        pods = [pod for group in self.groups for pod in group.pods]
        lines = ["127.0.0.1 localhost"]
        for pod in pods:
            full = f"{pod.host}.{pod.subdomain}"
            lines.append(f"{pod.address} {full} {full}.default.svc.cluster.local {full}.default.svc")
        for at, pod in enumerate(pods):
            name = self.namespace(pod)
            _run("ip", "netns", "add", name)
            self.namespaces.append(name)
            _run("ip", "link", "add", f"swv{self.number}p{at}", "type", "veth", "peer", "name", "eth0", "netns", name)
            _run("ip", "link", "set", f"swv{self.number}p{at}", "master", self.bridge, "up")
            for command in (f"addr add {pod.address}/24 dev eth0", "link set eth0 up", "link set lo up"):
                _run("ip", "-n", name, *command.split())
            hosts = Path("/etc/netns") / name / "hosts"
            hosts.parent.mkdir(parents=True, exist_ok=True)
            hosts.write_text("\n".join([*lines, f"{pod.address} {pod.host}", ""]))
        return self

    def __exit__(self, *_: object) -> None:
        for group in self.groups:
            self.stop(group)
        for name in self.namespaces:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True)

    def namespace(self, pod: Pod) -> str:
        """Names the network namespace of a pod."""
        return f"sw{self.number}-{pod.job}-{pod.job_index}-{pod.index}"

    def run(self, seconds: float, meanwhile: Callable[[Kubelet], None] = lambda kubelet: None) -> bool:
        """Runs until the whole has succeeded or failed; tells which.

        Args:
            seconds: after which it is an error.
            meanwhile: called all the while.
        """
        for group in self.groups:
            self.start(group)
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            meanwhile(self)
            for group in self.groups:
                self._look_after(group)
            failed = [group for group in self.groups if self._has_failed(group)]
            if failed and not self._start_again(failed):
                return False
            wanted = self.spec.get("successPolicy", {}).get("targetReplicatedJobs") or [g.rjob for g in self.groups]
            if all(_has_succeeded(group) for group in self.groups if group.rjob in wanted):
                return True
            time.sleep(0.1)
        raise TimeoutError(self.logs())

    def _is_of(self, rule: dict[str, Any], group: Group) -> bool:
        """Tells whether a rule of a failure policy is about the failure of a job."""
        if group.rjob not in rule.get("targetReplicatedJobs", (group.rjob,)):
            return False
        permanent: set[int] = set()
        for own in group.spec.get("podFailurePolicy", {}).get("rules", ()):
            permanent |= set(own["onExitCodes"]["values"])
        reason = "PodFailurePolicy" if any(pod.code in permanent for pod in group.pods) else "BackoffLimitExceeded"
        return reason in rule.get("onJobFailureReasons", (reason,))

    def start(self, group: Group) -> None:
        """Starts all pods of a job."""
        group.failures = 0
        for pod in group.pods:
            self._start(pod)

    def stop(self, group: Group) -> None:
        """Kills the pods of a job that run."""
        for pod in group.pods:
            if pod.process is not None and pod.process.poll() is None:
                os.killpg(pod.process.pid, signal.SIGKILL)
                pod.process.wait()

    def logs(self) -> str:
        """Returns what all pods have printed."""
        return "\n".join(f"-- {path.name}\n{path.read_text()}" for path in sorted(self.folder.glob("*.log")))

    def _start(self, pod: Pod) -> None:
        container = next(c for c in pod.spec["containers"] if c["name"] == "mindspore")
        own = dict(self.environment)
        for variable in container.get("env", ()):
            own[variable["name"]] = _value(variable, pod)
        own["JOB_COMPLETION_INDEX"] = str(pod.index)
        command = [sys.executable if word == "python" else word for word in [*container["command"], *container.get("args", ())]]
        inside = ["unshare", "--uts", "sh", "-c", f'hostname {pod.host}; exec "$@"', "sh", *command]
        log = self.folder / f"{pod.host}.{pod.starts}.log"
        pod.starts, pod.code = pod.starts + 1, None
        with log.open("w") as file:
            pod.process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace(pod), *inside],
                env=own, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def _look_after(self, group: Group) -> None:
        for pod in group.pods:
            if pod.process is None or pod.code is not None:
                continue
            pod.code = pod.process.poll()
            if pod.code:
                group.failures += 1
                if pod.spec["restartPolicy"] == "OnFailure" and group.failures <= group.spec["backoffLimit"]:
                    self._start(pod)

    def _has_failed(self, group: Group) -> bool:
        failed = [pod for pod in group.pods if pod.code]
        if "backoffLimitPerIndex" in group.spec:
            return len(failed) > group.spec["maxFailedIndexes"]
        return bool(failed)

    def _start_again(self, failed: list[Group]) -> bool:
        policy = self.spec.get("failurePolicy", {})
        for group in failed:
            rules = [rule for rule in policy.get("rules", ()) if self._is_of(rule, group)]
            if rules and rules[0]["action"] == "FailJobSet":
                return False
            if self.restarts >= policy.get("maxRestarts", 0):
                return False
            self.restarts += 1
            if rules and rules[0]["action"] == "RestartJob":
                self.alone.append(group.name)
                self.stop(group)
                self.start(group)
                continue
            for each in self.groups:
                self.stop(each)
            for each in self.groups:
                self.start(each)
            return True
        return True


def _has_succeeded(group: Group) -> bool:
    rules = group.spec.get("successPolicy", {}).get("rules")
    pods = [group.pods[int(rules[0]["succeededIndexes"])]] if rules else group.pods
    return all(pod.code == 0 for pod in pods)


def _groups(manifests: list[dict[str, Any]]) -> tuple[dict[str, Any], list[Group]]:
    """Expands manifests as the controllers do."""
    kinds = {manifest["kind"]: manifest for manifest in manifests}
    if "Job" in kinds:
        job, service = kinds["Job"], kinds["Service"]
        name, template = job["metadata"]["name"], job["spec"]["template"]
        assert service["spec"]["clusterIP"] == "None"
        assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
        assert service["metadata"]["name"] == template["spec"]["subdomain"]
        return {}, [_group(name, name, 0, job["spec"], lambda index: f"{name}-{index}", template["spec"]["subdomain"])]
    if "TrainJob" in kinds:
        train, runtime = kinds["TrainJob"], kinds["TrainingRuntime"]
        assert train["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
        name, spec = train["metadata"]["name"], runtime["spec"]["template"]["spec"]
        for own in spec["replicatedJobs"]:
            if (
                own["template"].get("metadata", {}).get("labels", {}).get("trainer.kubeflow.org/trainjob-ancestor-step")
                == "trainer"
            ):
                count = train["spec"]["trainer"]["numNodes"]
                own["template"]["spec"] |= {"completions": count, "parallelism": count}
    else:
        name, spec = kinds["JobSet"]["metadata"]["name"], kinds["JobSet"]["spec"]
    network = spec["network"]
    assert network["enableDNSHostnames"]
    assert network["publishNotReadyAddresses"]
    found = []
    for own in spec["replicatedJobs"]:
        for at in range(own["replicas"]):
            base = f"{name}-{own['name']}-{at}"
            host = lambda index, base=base: f"{base}-{index}"  # noqa: E731
            found.append(_group(base, own["name"], at, own["template"]["spec"], host, network["subdomain"]))
    return spec, found


def _group(name: str, rjob: str, at: int, spec: dict[str, Any], host: Callable[[int], str], subdomain: str) -> Group:
    assert spec["completionMode"] == "Indexed"
    group = Group(name, rjob, at, spec)
    for index in range(spec["completions"]):
        annotations = {INDEX: str(index)}
        labels = {INDEX: str(index), "jobset.sigs.k8s.io/job-index": str(at)}
        group.pods.append(Pod(rjob, at, index, host(index), subdomain, spec["template"]["spec"], annotations, labels))
    return group


def _value(variable: dict[str, Any], pod: Pod) -> str:
    if "value" in variable:
        return str(variable["value"])
    path = variable["valueFrom"]["fieldRef"]["fieldPath"]
    match = re.fullmatch(r"metadata\.(annotations|labels)\['([^']+)'\]", path)
    assert match is not None, path
    found: dict[str, str] = getattr(pod, match[1])
    return found[match[2]]


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
