"""``shardwright run``: its options in both spellings, what contradicts itself, logs, and what ranks are bound to."""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
import subprocess
import sys
import time
from pathlib import Path

import jobs
import pytest
from launchers import Launcher, check_gone, wait_for

from shardwright.cli import main as cli
from shardwright.cli import run
from shardwright.cli.run_flags import REAL_FLAGS
from shardwright.launch.job import Launch

ROOT = Path(__file__).resolve().parents[2]
SHOW = str(Path(__file__).with_name("show.py"))


@pytest.fixture
def found(monkeypatch):
    """Reads a command line as far as the job that it would start; ``None`` where it simulates."""
    for name in list(os.environ):
        if name.startswith("PET_"):
            monkeypatch.delenv(name)

    def read(*arguments):
        started = []
        with monkeypatch.context() as patch:
            patch.setattr(run, "_start", lambda launch, joins: started.append((launch, joins)) or 0)
            patch.setattr(run, "_run_simulated", lambda devices, given: started.append((devices, True)))
            assert cli.main(["run", *arguments, SHOW, "--nnodes", "9"]) == 0
        return started[0]

    return read


def test_both_spellings_say_the_same(found):
    ours = found(
        *("--nproc-per-node", "2", "--nnodes", "2", "--node-rank", "1", "--master-addr", "n1", "--master-port", "8118"),
        *("--log-dir", "logs", "--timeout", "60", "--tail", "0,3", "--bind-core", "auto"),
    )
    theirs = found(
        *("--worker_num", "4", "--local_worker_num", "2", "--node_rank", "1", "--master_addr", "n1", "--master_port=8118"),
        *("--log_dir", "logs", "--cluster_time_out", "60", "--tail_worker_log", "0,3", "--bind_core", "True", "--join", "True"),
    )
    assert ours == theirs
    launch, joins = ours
    assert (launch.ranks, launch.nodes, launch.node, launch.address, launch.port) == (2, 2, 1, "n1", 8118)
    assert (launch.timeout, launch.patience, launch.shown, joins) == (60, 60, (0, 3), True)
    assert launch.command[-3:] == (SHOW, "--nnodes", "9")
    assert Launch.from_json(launch.to_json()) == launch


def test_variables_of_torchrun_are_read(found, monkeypatch):
    monkeypatch.setenv("PET_NPROC_PER_NODE", "3")
    monkeypatch.setenv("PET_NNODES", "2")
    monkeypatch.setenv("PET_MASTER_ADDR", "n1")
    launch, _ = found()
    assert (launch.ranks, launch.nodes, launch.address, launch.port, launch.node) == (3, 2, "n1", 29500, None)
    assert found("--nnodes", "1", "--master-addr", "127.0.0.1")[0].nodes == 1
    assert found("--devices", "5") == (5, True)  # the command line says that it simulates


def test_a_range_of_nodes_is_for_torchs_rendezvous(found):
    launch, _ = found("--nproc-per-node", "2", "--nnodes", "1:3", "--rdzv-endpoint", "n1:4711", "--rdzv-id", "job")
    assert (launch.nodes, launch.most_nodes, launch.backend) == (1, 3, "c10d")
    assert (launch.address, launch.port, launch.run_id) == ("n1", 4711, "job")


def test_the_old_way_to_simulate(found):
    assert found("--worker_num", "6", "--sim_level", "1", "--sim_rank_id", "5") == (6, True)
    assert found("--sim_level", "-1", "--nproc-per-node", "2")[0].ranks == 2


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ("--devices 4 --log-dir x", ["--log-dir x is for jobs of processes, and --devices 4 simulates: add --distributed"]),
        ("--devices 4 --nproc-per-node 2", ["--nproc-per-node 2 and --devices 4 say how many ranks this node has, and differ"]),
        ("--log-dir x", ["nothing says how many ranks to start: add --nproc-per-node N"]),
        ("--worker_num 2 --local_worker_num 4", ["--worker_num 2 is less than the 4 ranks of this node: give 4 or more"]),
        ("--nproc-per-node 2 --nnodes 2", ["2 nodes need to know where node 0 is: add --master-addr HOST"]),
        ("--nproc-per-node 2 --no-join", ["--no-join: nobody reads what the job prints: add --log-dir DIR"]),
        ("--nproc-per-node 2 --join False --log-dir x --tail 0", ["--tail 0: nothing is printed with --no-join"]),
        ("--worker_num 8 --sim_level 3", ["--sim_level 3: kernels of a device are not run without it: give --sim_level 1"]),
        ("--nproc-per-node 2 --timeout 0", ["--timeout 0: give seconds, as 60, or -1 to wait for ever"]),
        ('--nproc-per-node 2 --bind-core {"device2":["0"]}', ["'device2' is none of device0 to device1"]),
        ('--nproc-per-node 2 --bind-core {"device0":["9999"]}', ["this process may not use core 9999: give cores of"]),
        (
            "--nproc-per-node x --nnodes 3:2 --master-port 80 --tail a --node-rank 1 --max-restarts -1",
            [
                "problems, nothing was started",
                "--nproc-per-node x: give a whole number from 1",
                "--nnodes 3:2: give a number from 1, or MIN:MAX as 2:4",
                "--max-restarts -1: give a whole number from 0",
                "--tail a: give ranks with commas between them, as 0,3",
            ],
        ),
        (
            "--nproc-per-node 2 --nnodes 2 --rdzv-endpoint a:1 --master-addr b --rdzv-id j --standalone --node-rank 2",
            [
                "--rdzv-endpoint a:1 and --master-addr both say where nodes meet: drop one of them",
                "--rdzv-id j: nodes that meet at --master-addr need none: drop it, or add --rdzv-backend c10d",
                "--standalone is for a single node, and --nnodes says 2: drop one of them",
                "--node-rank 2: the nodes' ranks go from 0 to 1",
            ],
        ),
    ],
)
def test_what_contradicts_itself_is_refused(arguments, messages, capsys):
    assert cli.main(["run", *arguments.split(), SHOW]) == 2
    said = capsys.readouterr().err
    for message in messages:
        assert message in said


def shown_by(text):
    """What ranks have shown, by rank."""
    found = [json.loads(line[line.index("{") :]) for line in text.splitlines() if '"RANK"' in line]
    return {int(rank["RANK"]): rank for rank in found}


def test_ranks_have_logs_of_their_own_and_are_bound(tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    bind = json.dumps({"device0": [str(cores[0])], "device1": [str(cores[-1])]})
    options = ["--log-dir", "new/logs", "--log-name", "w_{hostname}", "--tail", "1", "--timeout", "30", "--bind-core", bind]
    numa = ["--bind-numa", "auto"] if Path("/sys/devices/system/node/has_memory").exists() else []
    launcher = Launcher(tmp_path, "--nproc-per-node", "2", *options, *numa, SHOW, "--epochs", "2")
    assert launcher.end()[0] == 0, launcher.text
    folder = tmp_path / "new" / "logs"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    name = f"w_{os.uname().nodename}"
    assert sorted(path.name for path in folder.iterdir()) == ["scheduler.log", f"{name}_0.log", f"{name}_1.log"]
    assert shown_by(launcher.text).keys() == {1}
    assert "[rank 1]: an error" in launcher.text
    assert "[rank 0]" not in launcher.text
    shown = shown_by("\n".join((folder / f"{name}_{rank}.log").read_text() for rank in range(2)))
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "GROUP_RANK": "0", "SHARDWRIGHT_TIMEOUT": "30"}
        assert place.items() <= shown[rank].items()
        assert shown[rank]["arguments"] == ["--epochs", "2"]
        assert shown[rank]["cores"] == [cores[-rank]]
        assert not numa or shown[rank]["memory"].startswith("bind:")


def test_a_job_in_the_background_goes_on(tmp_path):
    began = time.monotonic()
    launcher = Launcher(tmp_path, "--nproc-per-node", "2", "--no-join", "--log-dir", "logs", SHOW)
    assert launcher.end()[0] == 0, launcher.text
    returned = time.monotonic() - began
    match = re.fullmatch(r"started in the background: pid (\d+), log (.*scheduler\.log)\n", launcher.text)
    assert match, launcher.text
    path = tmp_path / "logs" / "scheduler.log"
    assert Path(match[2]) == path
    check_gone([int(match[1])], 60)
    assert path.read_text().strip().endswith("ended with exit code 0"), path.read_text()
    assert returned < time.monotonic() - began
    texts = [(tmp_path / "logs" / f"worker_{rank}.log").read_text() for rank in range(2)]
    assert shown_by("\n".join(texts)).keys() == {0, 1}


def test_a_dry_run_prints_what_a_shell_takes(tmp_path, capsys):
    options = ["--nnodes", "2", "--nproc-per-node", "2", "--master-addr", "n1", "--dry-run"]
    assert cli.main(["run", *options, SHOW, "two words"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = shown_by("\n".join(subprocess.run(line, shell=True, capture_output=True, text=True).stdout for line in lines))
    assert shown.keys() == {0, 1, 2, 3}
    assert {"LOCAL_RANK": "1", "WORLD_SIZE": "4", "GROUP_RANK": "1", "MASTER_ADDR": "n1"}.items() <= shown[3].items()
    assert shown[3]["arguments"] == ["two words"]
    assert cli.main(["run", *options, "3", SHOW, "two words"]) == 0
    assert capsys.readouterr().out.splitlines() == lines[3:]
    assert cli.main(["run", *options, "4", SHOW]) == 2
    assert "--dry-run 4: the job's ranks go from 0 to 3" in capsys.readouterr().err
    assert shlex.split(lines[0])[0] == "env"


def test_a_rank_table_says_who_runs_where(tmp_path, found, capsys):
    devices = [{"device_id": str(d), "device_ip": "", "rank_id": str(d)} for d in range(2)]
    others = [{"device_id": "0", "device_ip": "", "rank_id": "2"}]
    servers = [{"server_id": "127.0.0.1", "device": devices}, {"server_id": "192.0.2.7", "device": others}]
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"version": "1.0", "server_count": "2", "server_list": servers, "status": "completed"}))
    launch, _ = found("--rank-table-file", str(path), "--master-port", "4711")
    assert (launch.ranks, launch.nodes, launch.node, launch.address) == (2, 2, 0, "127.0.0.1")
    launch, _ = found("--rank_table_file", str(path), "--node-rank", "1", "--master-port", "4711")
    assert (launch.ranks, launch.node) == (1, 1)
    assert cli.main(["run", "--rank-table-file", str(path), "--nnodes", "3", "--nproc-per-node", "5", SHOW]) == 2
    said = capsys.readouterr().err
    assert "--nnodes 3, and the rank table has 2 servers: drop --nnodes" in said
    assert "--nproc-per-node 5 and the 2 devices of server 127.0.0.1 say how many ranks this node has, and differ" in said


def test_modules_and_pytest_run_as_programs(tmp_path):
    (tmp_path / "tool.py").write_text(
        "import os, sys\nos.write(1, f'tool {sys.argv[1:]} {os.environ[\"RANK\"]}\\n'.encode())\n"
    )
    launcher = Launcher(tmp_path, "--nproc-per-node", "1", "-m", "tool", "-m", "x")
    assert launcher.end()[0] == 0, launcher.text
    assert launcher.text == "tool ['-m', 'x'] 0\n"
    launcher = Launcher(tmp_path, "--nproc-per-node", "1", "python3", "-c", "print('as given')")
    assert launcher.end()[0] == 0, launcher.text
    assert launcher.text == "as given\n"
    (tmp_path / "test_it.py").write_text("import shardwright as sw\ndef test_it(): assert sw.init().size == 3\n")
    launcher = Launcher(tmp_path, "--devices", "3", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py")
    launcher.end()
    assert "1 passed" in launcher.text
    assert sys.executable


def test_what_is_printed_waits_for_no_log(tmp_path):
    """Without a directory of logs ranks print as they do alone, and nothing is left behind."""
    launcher = Launcher(tmp_path, "--nproc-per-node", "2", SHOW, TMPDIR=str(tmp_path))
    wait_for([launcher.output], launcher)
    assert launcher.end()[0] == 0, launcher.text
    assert sorted(shown_by(launcher.text)) == [0, 1]
    assert launcher.text.count("an error\n") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out.txt"]


PAGE = (ROOT / "docs" / "launching.md").read_text("utf-8")


def test_the_page_runs(tmp_path):
    """Every ``shardwright run`` that the page shows: they run side by side, those of two nodes as one job."""
    lines = [line.partition("#")[0].split() for line in PAGE.splitlines() if line.startswith("shardwright run ")]
    assert len(lines) > 6
    place = {"n1": "127.0.0.1", "29500": str(jobs.free_port())}
    launchers = []
    for number, line in enumerate(lines):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "train.py").write_text("import os, sys\nos.write(1, f'{os.environ.get(\"RANK\")};'.encode())\n")
        launchers.append(Launcher(folder, *(place.get(word, word) for word in line[2:])))
    for line, launcher in zip(lines, launchers, strict=True):
        assert launcher.end(120)[0] == 0, (line, launcher.text)
    texts = {" ".join(line[2:]): launcher.text for line, launcher in zip(lines, launchers, strict=True)}
    assert texts["--devices 4 train.py"] == "None;"
    assert sorted(texts["--nproc-per-node 2 train.py"].split(";")) == ["", "0", "1"]
    assert sorted("".join(text for line, text in texts.items() if "--nnodes" in line).split(";")) == ["", "0", "1", "2", "3"]
    for launcher in launchers:
        started = re.search(r"background: pid (\d+)", launcher.text)
        if started:
            check_gone([int(started[1])], 60)


def test_the_page_names_every_option():
    named = set(re.findall(r"`(--?[\w-]+)|`(PET_\w+)", PAGE))
    wanted = {name for flag in REAL_FLAGS for name in (flag.name, flag.variable)} - {""}
    assert wanted <= {name for pair in named for name in pair}
