"""What goes wrong in a job ends it soon, with a message that names the rank, a code that is not 0, and no process left."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from pathlib import Path

import jobs
import pytest
from launchers import Launcher, check_gone, wait_for

import shardwright as sw

ALL = os.environ.get("SHARDWRIGHT_TEST_ALL") == "1"
TRAIN = str(Path(__file__).with_name("train_wrongly.py"))
FAIL = str(Path(__file__).with_name("fail.py"))
SOON = 10.0  # seconds between a failure and the end

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def pids_of(folder, size=2):
    return [
        int(path.read_text()) for rank in range(size) for path in folder.glob(f"*{rank}") if path.name[:3] in ("pid", "chi")
    ]


# What rank 1 does: the exit code of the launcher, and what it says.
KINDS = {
    "kill": (137, "rank 1 failed first, of 2 ranks: killed by SIGKILL"),
    "raise": (1, "ValueError: raise is what rank 1 does"),
    "child": (1, "rank 1 failed first, of 2 ranks: exit code 1"),
    "blames": (1, "ValueError: blames is what rank 1 does"),
    "exit": (7, "rank 1 failed first, of 2 ranks: exit code 7\n  it printed no error"),
    "crash": (139, "rank 1 failed first, of 2 ranks: killed by SIGSEGV"),
    "stubborn": (1, "ValueError: stubborn is what rank 1 does"),
    "stopped": (1, "ValueError: stopped is what rank 1 does"),
}


@pytest.mark.parametrize("kind", KINDS if ALL else ["kill", "child", "blames"])
def test_a_rank_that_fails_ends_the_job(tmp_path, kind):
    code, said = KINDS[kind]
    launcher = Launcher(tmp_path, "--nproc-per-node", "2", "--log-dir", "logs", FAIL, kind)
    wait_for([tmp_path / "pid0", tmp_path / "pid1"], launcher)
    found, _ = launcher.end(SOON)
    assert (found, said in launcher.text) == (code, True), launcher.text
    assert "logs/worker_1.log" in launcher.text
    assert said in (tmp_path / "logs" / "scheduler.log").read_text()
    check_gone(pids_of(tmp_path))


SIGNALS = {"TERM": 143, "KILL": -9, "HUP": 129, "INT": 130}


@pytest.mark.parametrize("name", SIGNALS if ALL else ["TERM", "KILL"])
def test_no_rank_outlives_its_launcher(tmp_path, name):
    launcher = Launcher(tmp_path, "--nproc-per-node", "2", FAIL, "signal")
    ranks = [int(text) for text in wait_for([tmp_path / "pid0", tmp_path / "pid1"], launcher)]
    launcher.signal(getattr(signal, f"SIG{name}"))
    code, _ = launcher.end(SOON)
    assert code == SIGNALS[name]
    if name == "KILL":  # what ranks have started is theirs to end; the ranks themselves the system kills
        check_gone(ranks)
        for path in tmp_path.glob("child*"):
            os.kill(int(path.read_text()), signal.SIGKILL)
    else:
        assert f"the launcher was ended by SIG{name}" in launcher.text
        check_gone(pids_of(tmp_path))


def test_ranks_start_again(tmp_path):
    launcher = Launcher(tmp_path, "--nproc-per-node", "2", "--max-restarts", "1", "--log-dir", "logs", FAIL, "restart")
    assert launcher.end()[0] == 0, launcher.text
    assert "rank 1 failed first, of 2 ranks: exit code 1" in launcher.text
    assert "all ranks start again: restart 1 of 1" in launcher.text
    assert (tmp_path / "logs" / "worker_1.attempt_0.log").read_text() == "the first attempt fails\n"


def test_a_port_in_use_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        launcher = Launcher(tmp_path, "--nproc-per-node", "2", "--master-port", port, FAIL, "exit")
        assert launcher.end()[0] == 1
    assert f"port {port} of 127.0.0.1 cannot be used: Address already in use; give another --master-port" in launcher.text


TWO = ("--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1")


def test_nodes_that_do_not_come_are_named(tmp_path):
    port = str(jobs.free_port())
    alone = [
        Launcher(tmp_path, *TWO, "--master-port", port, "--node-rank", "0", "--timeout", "1", FAIL, "exit", name="first"),
        Launcher(
            tmp_path,
            *TWO,
            "--master-port",
            str(jobs.free_port()),
            "--node-rank",
            "1",
            "--timeout",
            "1",
            FAIL,
            "exit",
            name="second",
        ),
    ]
    assert [launcher.end()[0] for launcher in alone] == [1, 1]
    assert "1 of 2 nodes came within 1 s: node 1 is missing" in alone[0].text
    assert "node 1 has waited 1 s for node 0 at 127.0.0.1:" in alone[1].text


@pytest.mark.parametrize("ranks", ["given", "by arrival"] if ALL else ["by arrival"])
def test_what_fails_on_one_node_ends_the_others(tmp_path, ranks):
    common = (*TWO, "--master-port", str(jobs.free_port()))
    places = [("--node-rank", str(node)) if ranks == "given" else () for node in range(2)]
    launchers = [Launcher(tmp_path, *common, *place, FAIL, "raise", name=f"node{n}") for n, place in enumerate(places)]
    codes = [launcher.end()[0] for launcher in launchers]
    assert codes == [1, 1], launchers[0].text
    texts = [launcher.text for launcher in launchers]
    said = [text for text in texts if "rank 1 failed first, of 2 ranks: exit code 1\n  its last lines:" in text]
    heard = [text for text in texts if "the job has failed elsewhere: node 1 (" in text]
    assert len(said) == len(heard) == 1, texts
    assert "): rank 1 failed first, of 2 ranks: exit code 1" in heard[0]
    check_gone(pids_of(tmp_path))


# What rank 1 of a training script does, and what the launcher says of it; through the whole of torch, and so in test-all.
TRAININGS = {
    "never comes": "rank 0 has waited 6 s to join the job: 1 of 2 ranks came, rank 1 is missing",
    "ends before": "rank 0 waits to join the job, but rank 1 has ended without joining it",
    "another program": "rank 1 has 'sin",
    "killed": "rank 1 failed first, of 2 ranks: killed by SIGKILL",
    "raises": "ValueError: raised at step 3",
    "hangs": "rank 0 has waited in call 4 of net 0 (Net) for rank 1, which has not come there",
    "stopped": "rank 0 has waited in call 4 of net 0 (Net) for rank 1, which has not come there",
    "another order": "rank 1 is in call 1 of net 1 (Linear), rank 0 in call 4 of net 0 (Net)",
    "other shapes": "rank 1's input 0 is float32 [6, 6], rank 0's float32 [8, 6]",
    "more steps": "rank 1 is in call 7 of net 0 (Net), but rank 0's script has ended after 6 calls of nets",
    "fewer steps": "rank 0 is in call 5 of net 0 (Net), but rank 1's script has ended after 4 calls of nets",
    "no backward": 'train_wrongly.py", line',
}


@pytest.mark.parametrize("kind", TRAININGS if ALL else [])
def test_a_training_that_goes_wrong_on_one_rank_ends(tmp_path, kind):
    launcher = Launcher(tmp_path, "--nproc-per-node", "2", "--log-dir", "logs", TRAIN, kind)
    assert launcher.end(90)[0] > 0, launcher.text
    report = launcher.text[launcher.text.index("shardwright: rank ") :]
    assert "failed first, of 2 ranks" in report
    assert TRAININGS[kind] in report, report


def test_a_signal_ends_a_launcher_that_waits_for_nodes(tmp_path):
    launcher = Launcher(tmp_path, *TWO, "--master-port", str(jobs.free_port()), "--log-dir", "logs", FAIL, "exit")
    wait_for([tmp_path / "logs" / "scheduler.log"], launcher)
    launcher.signal(signal.SIGTERM)
    assert launcher.end(SOON)[0] == 143
    assert "the launcher was ended by SIGTERM" in launcher.text


def test_under_nohup_a_closed_terminal_ends_nothing(tmp_path):
    launcher = Launcher(tmp_path, "--nproc-per-node", "2", FAIL, "signal", ignored=signal.SIGHUP)
    wait_for([tmp_path / "pid0", tmp_path / "pid1"], launcher)
    launcher.signal(signal.SIGHUP)
    launcher.process.join(0.5)
    assert launcher.process.is_alive()
    launcher.signal(signal.SIGTERM)
    assert launcher.end(SOON)[0] == 143
    check_gone(pids_of(tmp_path))


def taken(rank):
    if rank == 0:
        with socket.create_server(("", int(os.environ["MASTER_PORT"]))):
            sw.init(timeout=1)


def test_a_port_that_another_program_has_is_named(tmp_path):
    first, _ = jobs.run(tmp_path, 2, taken)
    assert first.code == 1
    assert re.search(r"rank 0 cannot listen at 127.0.0.1:\d+ \(torchrun\): another program may be there", first.text), (
        first.text
    )


def late(rank):
    if rank == 1:
        return
    os.environ["SHARDWRIGHT_TIMEOUT"] = "1"
    sw.init()


def test_ranks_that_do_not_join_are_named(tmp_path):
    first, _ = jobs.run(tmp_path, 2, late)
    assert first.code == 1
    assert "rank 0 has waited 1 s to join the job: 1 of 2 ranks came, rank 1 is missing" in first.text


def alone(rank):
    os.environ["MASTER_PORT"] = str(jobs.free_port())
    if rank == 1:
        sw.init(timeout=1)


def test_a_rank_0_that_is_not_there_is_named(tmp_path):
    _, second = jobs.run(tmp_path, 2, alone)
    assert second.code == 1
    assert "rank 1 has waited 1 s for rank 0 at 127.0.0.1:" in second.text
