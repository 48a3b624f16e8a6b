"""Several nodes for real: each in a network namespace of its own, joined by a bridge; run by ``make test-all``."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import kubelet
import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
PORT = "29571"

pytestmark = pytest.mark.skipif(
    os.environ.get("SHARDWRIGHT_TEST_ALL") != "1" or not kubelet.can_run(), reason="make test-all, where namespaces can be made"
)


def ip(*arguments, check=True):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=check)


@pytest.fixture
def nodes():
    """Two network namespaces and their addresses."""
    number = os.getpid() % 200
    bridge = f"swnb{number}"
    names = [f"swn{number}n{node}" for node in range(2)]
    addresses = [f"10.78.{number}.{node + 2}" for node in range(2)]
    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("link", "set", bridge, "up")
        for name, address in zip(names, addresses, strict=True):
            ip("netns", "add", name)
            ip("link", "add", f"{name}v", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"{name}v", "master", bridge, "up")
            for command in (f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
                ip("-n", name, *command.split())
        yield list(zip(names, addresses, strict=True))
    finally:
        for name in names:
            ip("netns", "del", name, check=False)
        ip("link", "del", bridge, check=False)


def start(folder, nodes, node, options, *script):
    """Starts the launcher of one node, as a user does there."""
    command = ["ip", "netns", "exec", nodes[node][0], sys.executable, "-m", "shardwright", "run"]
    command += [
        "--nnodes",
        "2",
        "--nproc-per-node",
        "2",
        "--master-addr",
        nodes[0][1],
        "--master-port",
        PORT,
        *options,
        *script,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("GLOO_SOCKET_IFNAME", None)
    with open(folder / f"node{node}.txt", "w") as output:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)


def end(folder, launchers, seconds=150):
    """Waits for the launchers; returns their exit codes and texts."""
    until = time.monotonic() + seconds
    try:
        codes = [launcher.wait(max(1, until - time.monotonic())) for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
    return codes, [(folder / f"node{node}.txt").read_text() for node in range(len(launchers))]


@pytest.mark.parametrize("ranks", ["given", "by arrival"])
def test_two_nodes_train_as_one_device_does(tmp_path, nodes, ranks):
    script = str(HERE / "train_anywhere.py")
    alone = subprocess.run(
        [sys.executable, script], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    loss = float(alone.stdout.split()[-1])
    places = [["--node-rank", str(node)] if ranks == "given" else [] for node in range(2)]
    launchers = [start(tmp_path, nodes, node, [*places[node], "--log-dir", f"logs{node}"], script) for node in range(2)]
    codes, texts = end(tmp_path, launchers)
    assert codes == [0, 0], texts
    for node, text in enumerate(texts):
        found = re.findall(r"\[rank (\d)\]: rank (\d) of 4 attempt 0 loss ([\d.]+)", text)
        assert sorted(rank for _, rank, _ in found) == [str(2 * node), str(2 * node + 1)], text
        assert all(prefix == rank and float(value) == pytest.approx(loss, abs=1e-12) for prefix, rank, value in found)
        assert (tmp_path / f"logs{node}" / f"worker_{2 * node}.log").exists()


def test_ranks_of_both_nodes_start_again(tmp_path, nodes):
    script = str(HERE / "train_anywhere.py")
    options = [["--node-rank", str(node), "--max-restarts", "1"] for node in range(2)]
    launchers = [start(tmp_path, nodes, node, options[node], script, "kill") for node in range(2)]
    codes, texts = end(tmp_path, launchers, 250)
    assert codes == [0, 0], texts
    found = [re.findall(r"rank (\d) of 4 attempt (\d) loss [\d.]+", text) for text in texts]
    assert [sorted(rank for rank, _ in those) for those in found] == [["0", "1"], ["2", "3"]], texts
    assert "rank 1 failed first, of 4 ranks: killed by SIGKILL" in texts[0]


@pytest.mark.parametrize("killed", [0, 1])
def test_a_node_whose_launcher_is_killed_ends_the_other(tmp_path, nodes, killed):
    launchers = [start(tmp_path, nodes, node, ["--node-rank", str(node)], str(HERE / "fail.py"), "signal") for node in range(2)]
    until = time.monotonic() + 60
    while not all((tmp_path / f"pid{rank}").exists() for rank in range(4)) and time.monotonic() < until:
        time.sleep(0.1)
    ranks = [int((tmp_path / f"pid{rank}").read_text()) for rank in range(4)]
    began = time.monotonic()
    os.kill(launchers[killed].pid, signal.SIGKILL)
    codes, texts = end(tmp_path, launchers)
    assert codes[1 - killed] == 1, texts
    said = "node 0's launcher at" if killed == 0 else "node 1 has given no sign of life for 30 s"
    assert said in texts[1 - killed]
    assert time.monotonic() - began < (10 if killed == 0 else 45)
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    for path in tmp_path.glob("child*"):
        try:
            os.kill(int(path.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            continue
