"""A real Slurm of two nodes on this machine: the script runs under ``srun`` unchanged, and says what is missing.

It is unpacked in the folder that ``SHARDWRIGHT_SLURM`` names; ``make test-all`` fetches the packages on Debian.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jobs
import pytest

ALL = os.environ.get("SHARDWRIGHT_TEST_ALL") == "1"
GIVEN = os.environ.get("SHARDWRIGHT_SLURM")
CAN_FETCH = ALL and all(map(shutil.which, ["apt-get", "apt-cache", "dpkg"])) and os.getuid() == 0
SCRIPT = str(Path(__file__).parent / "train_anywhere.py")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not (GIVEN or CAN_FETCH), reason="no Slurm: name a folder with one unpacked, SHARDWRIGHT_SLURM"),
]
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/controller.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PluginDir={libraries}/slurm-wlm
SlurmdParameters=config_overrides
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE
"""


def fetched(folder: Path) -> Path:
    """Fetches and unpacks the packages of Slurm and of what it needs and this machine lacks."""
    options = ["recommends", "suggests", "conflicts", "breaks", "replaces", "enhances"]
    command = ["apt-cache", "depends", "--recurse", *[f"--no-{option}" for option in options]]
    found = subprocess.run([*command, "slurmctld", "slurmd", "slurm-client"], capture_output=True, text=True, check=True)
    names = sorted({line.strip() for line in found.stdout.splitlines() if line[:1].isalnum()})
    missing = [name for name in names if subprocess.run(["dpkg", "-s", name], capture_output=True, check=False).returncode]
    got = subprocess.run(["apt-get", "download", *missing], cwd=folder, capture_output=True, check=False)
    if got.returncode:
        pytest.skip("the packages of Slurm cannot be fetched")
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, folder / "root"], check=True)
    return folder / "root"


@pytest.fixture(scope="module")
def srun(tmp_path_factory):
    """Starts a controller and two nodes; yields a function that runs a script on 4 ranks of both."""
    folder = tmp_path_factory.mktemp("slurm")
    root = Path(GIVEN) if GIVEN else fetched(folder)
    libraries = root / "usr/lib/x86_64-linux-gnu"
    for name in ("state", "n1", "n2"):
        (folder / name).mkdir()
    text = CONFIGURATION.format(
        folder=folder, libraries=libraries, host=socket.gethostname().split(".")[0], ports=[jobs.free_port() for _ in range(3)]
    )
    file = folder / "slurm.conf"
    file.write_text(text)
    paths = f"{libraries}:{libraries}/slurm-wlm"
    environment = {**os.environ, "LD_LIBRARY_PATH": paths, "SLURM_CONF": str(file), "PYTHONPATH": str(jobs.ROOT)}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    daemons = [[root / "usr/sbin/slurmctld-wlm", "-c", "-D", "-f", file]]
    daemons += [
        [root / "usr/sbin/slurmd-wlm", "-D", "-N", n, "-f", file, "-d", root / "usr/sbin/slurmstepd-wlm"] for n in ("n1", "n2")
    ]
    started = [subprocess.Popen(daemon, env=environment, stderr=subprocess.DEVNULL) for daemon in daemons]

    def run(*arguments, **variables):
        command = [root / "usr/bin/srun", "-N2", "-n4", "env", "-u", "LD_LIBRARY_PATH", *arguments]
        return subprocess.run(
            command, env={**environment, **variables}, capture_output=True, text=True, timeout=120, check=False
        )

    try:
        until = time.monotonic() + 30
        while run("true").returncode:
            assert time.monotonic() < until, (folder / "controller.log").read_text()[-2000:]
            time.sleep(0.5)
        yield run
    finally:
        for daemon in reversed(started):
            daemon.terminate()
        for daemon in started:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def test_the_script_runs_unchanged(srun):
    done = srun(sys.executable, SCRIPT, MASTER_ADDR="127.0.0.1")
    lines = sorted(done.stdout.splitlines())
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line.split(" attempt")[0] for line in lines] == [f"rank {rank} of 4" for rank in range(4)]
    assert len({line.split("loss ")[1] for line in lines}) == 1


def test_a_node_without_an_address_is_named(srun):
    """The nodes' names are no hosts here: every rank says at once which variable to export."""
    done = srun(sys.executable, SCRIPT)
    assert done.returncode != 0
    assert "cannot find the address of n1" in done.stderr
    assert "export MASTER_ADDR" in done.stderr
