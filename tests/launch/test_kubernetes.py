"""Jobs on Kubernetes: every rule of an MSJob, every key of what is rendered, and pods that train."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import kubelet
import pytest
import torch
import yaml

import shardwright as sw
from shardwright.cli.main import main
from shardwright.errors import StrategyError, WorldError
from shardwright.launch.kubernetes.environment import INJECTED, variables
from shardwright.launch.kubernetes.msjob import read_msjob
from shardwright.launch.kubernetes.render import TARGETS, render, worker_host
from shardwright.launch.kubernetes.schemas import check_core, read_schemas

HERE = Path(__file__).parent
ALL = os.environ.get("SHARDWRIGHT_TEST_ALL") == "1"
SCHEMAS = os.environ.get("SHARDWRIGHT_CRDS") or HERE.parents[2] / "shared" / "crds"
HAS_SCHEMAS = Path(SCHEMAS).is_dir()


def pod(**more: Any) -> dict[str, Any]:
    container = {"name": "mindspore", "image": "train:1", "command": ["python", "train.py"], **more}
    return {"spec": {"containers": [container]}}


def msjob(**changed: Any) -> dict[str, Any]:
    specs = {"Worker": {"replicas": 3, "template": pod()}}
    return {
        "apiVersion": "mindspore.gitee.com/v1", "kind": "MSJob", "metadata": {"name": "digits"},
        "spec": {"msReplicaSpecs": specs, **changed},
    }  # fmt: skip


def with_roles(**roles: Any) -> dict[str, Any]:
    return msjob(msReplicaSpecs=roles)


def keys_of(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if isinstance(key, str):
            yield (*at, key)
        yield from keys_of(inner, (*at, key))


def misspelt(manifest: Any, at: tuple[Any, ...]) -> Any:
    """A copy with one key misspelt."""
    changed = copy.deepcopy(manifest)
    place = changed
    for key in at[:-1]:
        place = place[key]
    place[at[-1] + "x"] = place.pop(at[-1])
    return changed


PORT_80 = {"name": "msjob-port", "containerPort": 80}
FREE = ("labels", "annotations", "selector", "limits", "requests", "nodeSelector")  # whose keys are the user's


def roles(job: Any) -> Any:
    return job["spec"]["msReplicaSpecs"]


def worker(job: Any) -> Any:
    return roles(job)["Worker"]


WRONG = {
    "apiVersion is 'v1'": lambda j: j.update(apiVersion="v1"),
    "kind is missing; write kind: MSJob": lambda j: j.pop("kind"),
    "metadata.name is missing": lambda j: j["metadata"].pop("name"),
    "'my_job' has underscores, and pods are hosts of that name; write my-job": lambda j: j["metadata"].update(name="my_job"),
    "metadata.name '-A' has what is no small letter": lambda j: j["metadata"].update(name="-A"),
    "has more than 45 letters": lambda j: j["metadata"].update(name="a" * 46),
    "spec.successPolicy is 'AllWorker'; did you mean AllWorkers?": lambda j: j["spec"].update(successPolicy="AllWorker"),
    "spec.enableDynamicWorker is 'yes'; write true or false": lambda j: j["spec"].update(enableDynamicWorker="yes"),
    "cleanPodPolicy is 'all'; did you mean All?": lambda j: j["spec"].update(runPolicy={"cleanPodPolicy": "all"}),
    "spec.runPolicy.backoffLimit is -1; write 0 or more": lambda j: j["spec"].update(runPolicy={"backoffLimit": -1}),
    "spec.runPolicy.backoffLimit is True; write a whole number": lambda j: j["spec"].update(runPolicy={"backoffLimit": True}),
    "spec.msReplicaSpecs has no Worker": lambda j: j["spec"].update(msReplicaSpecs={"PS": {"template": pod()}}),
    "there is no such role; did you mean Worker?": lambda j: roles(j).update(Workers={"template": pod()}),
    "spec.msReplicaSpecs.worker stands there twice": lambda j: roles(j).update(worker={"template": pod()}),
    "a job has one Scheduler at most": lambda j: roles(j).update(Scheduler={"replicas": 2, "template": pod()}),
    "Worker.replicas is 0; write 1 or more": lambda j: worker(j).update(replicas=0),
    "restartPolicy is 'onfailure'; did you mean OnFailure?": lambda j: worker(j).update(restartPolicy="onfailure"),
    "one has to be named mindspore, and there are main": lambda j: worker(j).update(template=pod(name="main")),
    "containers[0].image is None": lambda j: worker(j).update(template=pod(image=None)),
    "env: RANK is injected; remove it": lambda j: worker(j).update(template=pod(env=[{"name": "RANK", "value": "1"}])),
    "containerPort is 80; write 1024 to 65535": lambda j: worker(j).update(template=pod(ports=[PORT_80])),
    "spec.containers is missing": lambda j: worker(j).update(template={}),
}  # fmt: skip


@pytest.mark.whole
@pytest.mark.parametrize("text", WRONG)
def test_every_rule_of_a_job_is_checked(text):
    job = msjob()
    WRONG[text](job)
    with pytest.raises(StrategyError) as error:
        read_msjob(job)
    assert text in str(error.value)


def test_all_problems_are_listed_at_once():
    job = with_roles(Worker={"replicas": -1, "template": pod(image="")}, Schduler={"template": pod()})
    job["metadata"]["name"] = "A_b"
    with pytest.raises(StrategyError) as error:
        read_msjob(job)
    assert len(error.value.problems) == 4
    assert "did you mean Scheduler?" in str(error.value)


@pytest.mark.whole
def test_every_misspelt_key_of_a_job_is_found():
    job = msjob(
        runPolicy={"cleanPodPolicy": "All", "backoffLimit": 1, "activeDeadlineSeconds": 5, "ttlSecondsAfterFinished": 9},
        successPolicy="AllWorkers", enableDynamicWorker=True,
    )  # fmt: skip
    read_msjob(job)
    for at in keys_of(job):
        if "containers" in at[:-1]:
            continue  # keys of pods are checked in what is rendered
        with pytest.raises(StrategyError):
            read_msjob(misspelt(job, at))


def made(target: str, full: bool = True) -> list[Any]:
    own = {"Worker": {"replicas": 3, "restartPolicy": "ExitCode", "template": pod(resources={"limits": {"cpu": 1}})}}
    if full and target != "job":
        own |= {"PS": {"replicas": 2, "template": pod()}, "Scheduler": {"template": pod()}}
    job = with_roles(**own)
    job["spec"]["runPolicy"] = {"backoffLimit": 0 if target == "job" else 2, "activeDeadlineSeconds": 60}
    job["spec"]["runPolicy"]["ttlSecondsAfterFinished"] = 5
    return yaml.safe_load(json.dumps(render(read_msjob(job), target)))


@pytest.mark.whole
@pytest.mark.skipif(not HAS_SCHEMAS, reason="the schemas of custom resources are not here; set SHARDWRIGHT_CRDS")
@pytest.mark.parametrize("target", ["jobset", "trainjob"])
def test_what_is_rendered_fits_the_schemas_and_every_misspelt_key_is_found(target):
    schemas = read_schemas(SCHEMAS)
    for manifest in made(target):
        schema = schemas[manifest["apiVersion"], manifest["kind"]]
        assert schema.check(manifest) == []
        for at in keys_of(manifest):
            if not set(FREE) & set(at[:-1]):
                assert schema.check(misspelt(manifest, at)), at


@pytest.mark.whole
def test_core_kinds_fit_kubernetes_schemas_and_every_misspelt_key_is_found():
    for manifest in made("job"):
        assert check_core(manifest) == []
        for at in list(keys_of(manifest))[:: 1 if ALL else 4]:
            if not set(FREE) & set(at[:-1]) and at != ("apiVersion",) and at != ("kind",):
                assert check_core(misspelt(manifest, at)), at


def test_kubeflows_own_types_take_what_is_rendered():
    models = pytest.importorskip("kubeflow_trainer_api.models")
    runtime, train = made("trainjob")
    kinds = {
        name: getattr(models, name) for name in dir(models) if name.endswith(("V1alpha1TrainJob", "V1alpha1TrainingRuntime"))
    }
    for manifest, suffix in ((train, "V1alpha1TrainJob"), (runtime, "V1alpha1TrainingRuntime")):
        kind = next(own for name, own in kinds.items() if name.endswith(suffix))
        assert kind.from_dict(manifest) is not None


@pytest.mark.whole
@pytest.mark.parametrize("target", TARGETS)
def test_what_is_injected_is_what_is_explained(target, capsys, tmp_path):
    job = with_roles(Worker={"replicas": 3, "template": pod(ports=[{"name": "msjob-port", "containerPort": 3333}])})
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    read = read_msjob(job)
    own = variables(read, "worker", worker_host(read, target))
    assert {v.name for v in own} == set(INJECTED)
    assert main(["k8s", "explain", str(file), "--to", target]) == 0
    text = capsys.readouterr().out
    assert all(v.name in text and (v.field or v.value) in text for v in own)
    assert main(["k8s", "render", str(file), "--to", target]) == 0
    rendered = capsys.readouterr().out
    assert all(v.name in rendered for v in own)
    assert "3333" in rendered
    assert main(["k8s", "validate", str(file)]) == 0


@pytest.mark.parametrize(("key", "all_workers"), list(product(("Never", "OnFailure", "Always"), (False, True))))
def test_policies_are_carried_over(key, all_workers):
    job = with_roles(Worker={"replicas": 3, "restartPolicy": key, "template": pod()}, PS={"replicas": 2, "template": pod()})
    job["spec"] |= {"successPolicy": "AllWorkers" if all_workers else "", "runPolicy": {"backoffLimit": 4}}
    (found,) = render(read_msjob(job))
    server, worker = found["spec"]["replicatedJobs"]
    assert (server["name"], server["replicas"], server["template"]["spec"]["completions"]) == ("server", 2, 1)
    assert worker["dependsOn"] == [{"name": "server", "status": "Ready"}]
    assert ("successPolicy" in worker["template"]["spec"]) == (not all_workers)
    assert worker["template"]["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    assert worker["template"]["spec"]["backoffLimit"] == 0
    assert found["spec"]["failurePolicy"]["maxRestarts"] == 4
    assert found["spec"]["failurePolicy"]["rules"][0]["action"] == "RestartJob"
    with pytest.raises(StrategyError, match="render it as a jobset"):
        render(read_msjob(job), "job")


def test_mistakes_on_the_command_line_are_one_line(tmp_path, capsys):
    (tmp_path / "no.yaml").write_text("a: [1")
    (tmp_path / "other.yaml").write_text("apiVersion: a/v1\nkind: Other\n")
    assert main(["k8s", "render", str(tmp_path / "none.yaml")]) == 2
    assert main(["k8s", "render", str(tmp_path / "no.yaml")]) == 2
    assert main(["k8s", "validate", str(tmp_path / "other.yaml")]) == 1
    assert main(["k8s", "validate", str(tmp_path / "other.yaml"), "--crds", str(tmp_path / "nowhere")]) == 2
    assert main(["k8s", "dockerfile", "../train.py"]) == 2
    text = capsys.readouterr()
    assert "there is no file" in text.err
    assert "is no YAML" in text.err
    assert "Other: cannot be checked" in text.out


def reference() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)).double()
    x, y = torch.randn(12, 8).double(), torch.randint(4, (12,))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.long
@pytest.mark.skipif(not kubelet.can_run(), reason="network namespaces need root and ip")
@pytest.mark.whole
@pytest.mark.parametrize("target", list(TARGETS) if ALL else [])
def test_pods_train_and_a_killed_one_changes_nothing(target, tmp_path):
    out, marker = tmp_path / "weights.pt", tmp_path / "has_died"
    dies = target != "job"  # which has no way to start all workers again
    command = ["python", str(HERE / "train_in_pods.py"), str(out), *([str(marker)] if dies else [])]
    workers = 3 if ALL else 2
    job = with_roles(Worker={"replicas": workers, "template": pod(command=command)})
    job["spec"] |= {"successPolicy": "AllWorkers", "runPolicy": {"backoffLimit": 3 if dies else 0}}
    text = yaml.safe_dump_all(render(read_msjob(job), target))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1]), "GLOO_SOCKET_IFNAME": "eth0"}
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    with kubelet.Kubelet(list(yaml.safe_load_all(text)), tmp_path, environment) as cluster:
        assert cluster.run(240), cluster.logs()
        starts = [pod.starts for group in cluster.groups for pod in group.pods]
    assert marker.exists() == dies
    assert starts == [2 if dies else 1] * workers
    size, role, weights = torch.load(out)
    assert (size, role) == (workers, "MS_WORKER")
    for name, value in reference().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-12, atol=1e-14)


@pytest.mark.skipif(not kubelet.can_run(), reason="network namespaces need root and ip")
@pytest.mark.parametrize("code", [3, 200])
def test_exit_codes_tell_whether_all_workers_are_started_again(code, tmp_path):
    lives = f"echo x >> {tmp_path}/lives-$RANK; test $(wc -l < {tmp_path}/lives-1) -gt 1 && exit 0"
    command = f"{lives}; test $RANK = 1 && exit {code}; sleep 3"
    own = {"replicas": 2, "restartPolicy": "ExitCode", "template": pod(command=["sh", "-c", command])}
    job = with_roles(Worker=own)
    job["spec"] |= {"successPolicy": "AllWorkers", "runPolicy": {"backoffLimit": 1}}
    with kubelet.Kubelet(yaml.safe_load(json.dumps(render(read_msjob(job)))), tmp_path, dict(os.environ)) as cluster:
        assert cluster.run(60) == (code == 200)
        assert [pod.starts for group in cluster.groups for pod in group.pods] == ([2, 2] if code == 200 else [1, 1])


@pytest.mark.skipif(not kubelet.can_run(), reason="network namespaces need root and ip")
def test_a_server_that_fails_is_started_again_alone(tmp_path):
    server = f"test -e {tmp_path}/died-$MS_NODE_ID && exec sleep 60; touch {tmp_path}/died-$MS_NODE_ID; exit 3"
    wait = f"while ! test -e {tmp_path}/died-1; do sleep 0.1; done; sleep 1"
    command = f"{wait}; echo $RANK $MS_SERVER_NUM $MS_ROLE > {tmp_path}/out-$RANK"
    job = with_roles(
        Worker={"replicas": 2, "template": pod(command=["sh", "-c", command])},
        PS={"replicas": 2, "template": pod(command=["sh", "-c", server])},
    )  # fmt: skip
    job["spec"]["runPolicy"] = {"backoffLimit": 3}
    job["spec"]["successPolicy"] = "AllWorkers"
    with kubelet.Kubelet(yaml.safe_load(json.dumps(render(read_msjob(job)))), tmp_path, dict(os.environ)) as cluster:
        assert cluster.run(60), cluster.logs()
        starts = {group.name: [pod.starts for pod in group.pods] for group in cluster.groups}
    assert starts == {"digits-server-0": [2], "digits-server-1": [2], "digits-worker-0": [1, 1]}
    assert [(tmp_path / f"out-{rank}").read_text().split() for rank in (0, 1)] == [[str(r), "2", "MS_WORKER"] for r in (0, 1)]


@pytest.mark.parametrize("role", ["MS_PSERVER", "MS_SCHED"])
def test_what_is_no_worker_is_no_rank(role, monkeypatch):
    monkeypatch.setattr("shardwright.world.current._current", [])
    monkeypatch.setenv("MS_ROLE", role)
    with pytest.raises(WorldError, match=f"MS_ROLE={role}: this process is no worker"):
        sw.init()
