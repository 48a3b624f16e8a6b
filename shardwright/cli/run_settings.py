"""Settings of ``shardwright run``: finds the job that its options describe, and refuses what contradicts itself."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from shardwright.cli.options import _count, _UsageError
from shardwright.cli.run_binding import read_binding
from shardwright.cli.run_flags import Read
from shardwright.errors import WorldError, counted, numbered
from shardwright.launch.background import log_name
from shardwright.launch.job import GRACE, PATIENCE, Launch
from shardwright.launch.meeting import is_own_address
from shardwright.world.job.rank_table import check_table

DEVICES = "SHARDWRIGHT_DEVICES"
DEFAULT_DEVICES = 8
_BACKENDS = ("static", "c10d", "etcd", "etcd-v2")


def devices_from_environment(variables: Mapping[str, str]) -> int:
    """Returns the number of devices that the environment asks for.

    Raises:
        _UsageError: it is no number.
    """
    text = variables.get(DEVICES)
    try:
        return DEFAULT_DEVICES if text is None else _count(text)
    except argparse.ArgumentTypeError as error:
        raise _UsageError(f"{DEVICES}={error}") from None


def find_launch(
    arguments: argparse.Namespace, command: tuple[str, ...], variables: Mapping[str, str]
) -> tuple[Launch | None, int | None]:
    """Finds what is to be started: a job of processes, or ``None`` and the number of ranks to simulate.

    Args:
        arguments: of the command line.
        command: what every rank runs.
        variables: of the environment.

    Raises:
        _UsageError: options make no sense, or contradict each other; all problems are listed.
    """
    read = Read(arguments, variables)
    on_line = [key for key in read.given if not read.source[key].startswith("PET_")]
    level = read.number("sim_level", -1)
    if level is not None and level >= 0:
        return None, _simulated(read, arguments, level)
    from_variables = arguments.devices is None and {"nproc_per_node", "nnodes"} & set(read.given)
    if not (arguments.distributed or on_line or from_variables):
        return None, arguments.devices
    if arguments.devices is not None and not arguments.distributed and "nproc_per_node" not in read.given:
        read.problems.append(
            f"{read.called(on_line[0])} is for jobs of processes, and --devices {arguments.devices} simulates: add "
            "--distributed, or drop it"
        )
    if "sim_rank_id" in read.given and read.given["sim_rank_id"] != "-1":
        read.problems.append("--sim_rank_id: it is one of simulated ranks: add --sim_level 0, or give --dry-run RANK")
    launch = _read_launch(read, arguments, command)
    if read.problems or launch is None:
        raise _UsageError(_listed(read.problems))
    return launch, None


def _listed(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{counted(problems, 'nothing was started')}\n{numbered(problems)}"


def _simulated(read: Read, arguments: argparse.Namespace, level: int) -> int | None:
    """Returns the number of ranks to simulate, by the older spelling."""
    size = read.number("worker_num", 1) or read.number("nproc_per_node", 1)
    if level > 1:
        read.problems.append(
            f"--sim_level {level}: kernels of a device are not run without it: give --sim_level 1, and ask 'shardwright plan' "
            "for time and memory"
        )
    if arguments.devices is not None and size not in (None, arguments.devices):
        read.problems.append(f"--devices {arguments.devices} and {size} workers: give one of them")
    size = arguments.devices or size
    rank = read.number("sim_rank_id", -1)
    if rank is not None and size is not None and rank >= size:
        read.problems.append(f"--sim_rank_id {rank}: ranks go from 0 to {size - 1}")
    if arguments.distributed:
        read.problems.append(f"--sim_level {level} simulates, and --distributed starts processes: drop one of them")
    if read.problems:
        raise _UsageError(_listed(read.problems))
    return size


def _read_launch(read: Read, arguments: argparse.Namespace, command: tuple[str, ...]) -> Launch | None:
    given, problems = read.given, read.problems
    table = _read_table(read) if "rank_table_file" in given else None
    ranks = _ranks(read, arguments, table)
    least, most = _nodes(read, ranks, table)
    address, port, backend = _meeting_place(read, least, most, table)
    node = read.number("node_rank", -1)
    node = None if node == -1 else node
    if table is not None:
        node = table.node if node is None else node
    if node is not None and node >= most:
        problems.append(f"--node-rank {node}: the nodes' ranks go from 0 to {most - 1}")
    alone = most == 1 and not backend
    restarts = read.number("max_restarts", 0) or 0
    grace = read.number("grace", 1)
    patience, timeout = _patience(read)
    cores, launcher_cores, memory = read_binding(read, ranks)
    folder, joins = given.get("log_dir"), given.get("join", "True")
    if joins not in ("True", "False"):
        problems.append(f"--join {joins}: give True or False")
    if joins == "False" and folder is None:
        problems.append("--no-join: nobody reads what the job prints: add --log-dir DIR")
    if joins == "False" and "tail" in given:
        problems.append(f"{read.called('tail')}: nothing is printed with --no-join: drop one of them")
    if "log_name" in given and folder is None:
        problems.append("--log-name names files in a directory: add --log-dir DIR")
    if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
        problems.append(f"--log-dir {folder} is a file: name a directory")
    if given.get("dry_run") is not None and (most != least or backend):
        problems.append("--dry-run: torch's rendezvous gives ranks when it runs: give a fixed --nnodes")
    shown = _shown(read, None if least != most else ranks * least)
    if problems:
        return None
    return Launch(
        command=command,
        ranks=ranks,
        nodes=least,
        most_nodes=most if most != least else None,
        node=0 if alone else node,
        address=address,
        port=port,
        backend=backend,
        run_id=given.get("rdzv_id", "shardwright"),
        options=_options(read),
        restarts=restarts,
        folder=folder,
        log_name=log_name(given.get("log_name", "worker")),
        shown=shown,
        patience=patience,
        timeout=timeout,
        grace=GRACE if grace is None else float(grace),
        cores=cores,
        launcher_cores=launcher_cores,
        memory_nodes=memory,
    )


class _Table(NamedTuple):
    """A rank table as far as this node needs it."""

    hosts: list[str]
    counts: list[int]
    node: int | None


def _read_table(read: Read) -> _Table | None:
    path = read.given["rank_table_file"]
    try:
        places = check_table(json.loads(Path(path).read_text("utf-8")), path)
    except (OSError, ValueError, WorldError) as error:
        read.problems.append(str(error) if isinstance(error, WorldError) else f"--rank-table-file {path}: {error}")
        return None
    hosts = list(dict.fromkeys(host for host, _ in places))
    own = [node for node, host in enumerate(hosts) if is_own_address(host)]
    node = own[0] if len(own) == 1 else None
    if node is None and "node_rank" not in read.given:
        found = "none" if not own else "more than one"
        read.problems.append(
            f"--rank-table-file {path}: {found} of its servers has an address of this machine: add --node-rank"
        )
    return _Table(hosts, [sum(host == other for other, _ in places) for host in hosts], node)


def _ranks(read: Read, arguments: argparse.Namespace, table: _Table | None) -> int:
    """Finds the number of ranks on this node; 1 where there is a problem."""
    found: dict[str, int] = {}
    text = read.given.get("nproc_per_node")
    if text in ("auto", "cpu", "gpu"):
        from torch.distributed.run import determine_local_world_size

        try:
            found[read.called("nproc_per_node")] = determine_local_world_size(text)
        except ValueError as error:
            read.problems.append(f"{read.called('nproc_per_node')}: {error} give a number")
    elif text is not None:
        number = read.number("nproc_per_node", 1)
        if number is not None:
            found[read.called("nproc_per_node")] = number
    if arguments.devices is not None:
        found[f"--devices {arguments.devices}"] = arguments.devices
    if table is not None:
        node = int(read.given["node_rank"]) if read.given.get("node_rank", "").isdigit() else table.node
        if node is not None and node < len(table.counts):
            found[f"the {table.counts[node]} devices of server {table.hosts[node]}"] = table.counts[node]
    if len(set(found.values())) > 1:
        read.problems.append(f"{' and '.join(found)} say how many ranks this node has, and differ: give one of them")
    if found:
        return next(iter(found.values()))
    total = read.number("worker_num", 1)
    nodes = read.given.get("nnodes", "1")
    if total is not None and nodes.isdigit() and int(nodes):
        if total % int(nodes):
            read.problems.append(f"--worker_num {total} cannot be divided by --nnodes {nodes}: add --nproc-per-node")
        return max(1, total // int(nodes))
    if arguments.distributed:
        return devices_from_environment(os.environ)
    if nodes == "1" and table is None:
        read.problems.append("nothing says how many ranks to start: add --nproc-per-node N")
    return 1


def _nodes(read: Read, ranks: int, table: _Table | None) -> tuple[int, int]:
    """Finds the least and the greatest number of nodes."""
    text = read.given.get("nnodes")
    total = read.number("worker_num", 1)
    least = most = 1
    if text is not None:
        match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2] or match[1]):
            read.problems.append(f"{read.called('nnodes')}: give a number from 1, or MIN:MAX as 2:4")
            return 1, 1
        least, most = int(match[1]), int(match[2] or match[1])
    elif table is not None:
        return len(table.hosts), len(table.hosts)
    elif total is not None:
        if total < ranks:
            read.problems.append(f"--worker_num {total} is less than the {ranks} ranks of this node: give {ranks} or more")
        elif total % ranks:
            read.problems.append(f"--worker_num {total} are no whole nodes of {ranks} ranks: add --nnodes")
        return max(1, total // ranks), max(1, total // ranks)
    if table is not None and (least, most) != (len(table.hosts), len(table.hosts)):
        read.problems.append(f"{read.called('nnodes')}, and the rank table has {len(table.hosts)} servers: drop --nnodes")
    if total is not None and least == most and total != least * ranks and "nproc_per_node" in read.given:
        read.problems.append(f"--worker_num {total}, and {least} nodes of {ranks} ranks are {least * ranks}: drop --worker_num")
    return least, most


def _meeting_place(read: Read, least: int, most: int, table: _Table | None) -> tuple[str, int, str]:
    """Finds where nodes meet, and torch's backend where they meet by it."""
    given, problems = read.given, read.problems
    backend = given.get("rdzv_backend", "static" if least == most else "c10d")
    if backend not in _BACKENDS:
        problems.append(f"{read.called('rdzv_backend')}: give one of {', '.join(_BACKENDS)}")
    if backend == "static" and least != most:
        problems.append(f"{read.called('rdzv_backend')} is for a fixed number of nodes: give --rdzv-backend c10d")
    for key in ("rdzv_id", "rdzv_conf"):
        if key in given and backend == "static":
            problems.append(
                f"{read.called(key)}: nodes that meet at --master-addr need none: drop it, or add --rdzv-backend c10d"
            )
    if "node_rank" in given and backend != "static":
        problems.append(f"{read.called('node_rank')}: --rdzv-backend {backend} gives ranks itself: drop --node-rank")
    if "standalone" in given and most > 1:
        problems.append(f"--standalone is for a single node, and --nnodes says {most}: drop one of them")
    address = given.get("master_addr", table.hosts[0] if table is not None else "127.0.0.1")
    port = read.number("master_port", 1024, 65535)
    endpoint = given.get("rdzv_endpoint")
    if endpoint is not None:
        match = re.fullmatch(r"\[?([^\[\]]+?)\]?(?::(\d+))?", endpoint)
        if match is None:
            problems.append(f"{read.called('rdzv_endpoint')}: give HOST:PORT")
        elif "master_addr" in given or "master_port" in given:
            problems.append(f"{read.called('rdzv_endpoint')} and --master-addr both say where nodes meet: drop one of them")
        else:
            address, port = match[1], int(match[2] or 29400)
    if most > 1 and "master_addr" not in given and endpoint is None and table is None:
        problems.append(f"{most} nodes need to know where node 0 is: add --master-addr HOST")
    if most > 1 and port is None and "master_port" not in given:
        port = 29500
    return address, port or 0, "" if backend == "static" else backend


def _patience(read: Read) -> tuple[float, float | None]:
    text = read.given.get("timeout")
    if text is None:
        return PATIENCE, None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if math.isnan(seconds) or seconds == 0:
        read.problems.append(f"{read.called('timeout')}: give seconds, as 60, or -1 to wait for ever")
        return PATIENCE, None
    seconds = seconds if 0 < seconds < 1e9 else 1e9
    return seconds, seconds


def _options(read: Read) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in read.given.get("rdzv_conf", "").split(",") if pair]
    return {name.strip(): value.strip() for name, _, value in pairs}


def _shown(read: Read, size: int | None) -> tuple[int, ...] | None:
    text = read.given.get("tail", "-1")
    if text == "-1":
        return None
    if not re.fullmatch(r"\d+(,\d+)*", text):
        read.problems.append(f"{read.called('tail')}: give ranks with commas between them, as 0,3")
        return None
    ranks = tuple(int(part) for part in text.split(","))
    beyond = [rank for rank in ranks if size is not None and rank >= size]
    if beyond:
        read.problems.append(f"{read.called('tail')}: the job's ranks go from 0 to {(size or 1) - 1}")
    return ranks
