"""Options of jobs for ``shardwright run``, with their older spellings and the variables they may come from."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping
from typing import NamedTuple


class Flag(NamedTuple):
    """An option of jobs: its name, what its value is called, its help, other spellings, and the variable it may come from."""

    name: str
    metavar: str
    help: str
    older: tuple[str, ...] = ()
    variable: str = ""

    @property
    def key(self) -> str:
        """Returns the attribute that holds its value."""
        return self.name.lstrip("-").replace("-", "_")


REAL_FLAGS = (
    Flag(
        "--nproc-per-node",
        "N",
        "ranks on this node: a number, or auto, cpu or gpu",
        ("--nproc_per_node", "--local_worker_num"),
        "PET_NPROC_PER_NODE",
    ),
    Flag("--worker_num", "N", "ranks of the whole job; the number of nodes follows"),
    Flag("--nnodes", "N", "number of nodes, or MIN:MAX, which torch's rendezvous counts", (), "PET_NNODES"),
    Flag("--node-rank", "R", "rank of this node, from 0; default: in order of arrival", ("--node_rank",), "PET_NODE_RANK"),
    Flag("--master-addr", "HOST", "host of node 0; default: 127.0.0.1", ("--master_addr",), "PET_MASTER_ADDR"),
    Flag("--master-port", "PORT", "port there; default: a free one, on a single node", ("--master_port",), "PET_MASTER_PORT"),
    Flag("--standalone", "", "a single node, which is the default", (), "PET_STANDALONE"),
    Flag("--rdzv-backend", "NAME", "torch's rendezvous: static, c10d or etcd-v2", ("--rdzv_backend",), "PET_RDZV_BACKEND"),
    Flag("--rdzv-endpoint", "HOST:PORT", "where it is", ("--rdzv_endpoint",), "PET_RDZV_ENDPOINT"),
    Flag("--rdzv-id", "ID", "the job's name there", ("--rdzv_id",), "PET_RDZV_ID"),
    Flag("--rdzv-conf", "K=V,...", "its further options", ("--rdzv_conf",), "PET_RDZV_CONF"),
    Flag("--max-restarts", "N", "start all ranks again after a failure, so often", ("--max_restarts",), "PET_MAX_RESTARTS"),
    Flag("--log-dir", "DIR", "a log for each rank, and scheduler.log", ("--log_dir",), "PET_LOG_DIR"),
    Flag("--log-name", "NAME", "how the ranks' logs begin; {ip} and {hostname} are replaced", ("--worker_log_name",)),
    Flag("--tail", "RANKS", "ranks whose output is printed, as 0,3; default: all", ("--tail_worker_log",)),
    Flag("--join", "BOOL", "wait for the job, which is the default; --no-join leaves it in the background"),
    Flag("--timeout", "SECONDS", "in which nodes and ranks have to come; default: 600", ("--cluster_time_out",)),
    Flag("--grace", "SECONDS", "that ranks have to save and end when the launcher is asked to end; default: 30"),
    Flag("--bind-core", "HOW", 'auto, or JSON: {"device0": ["0-3"], "scheduler": ["8"]}', ("--bind_core",)),
    Flag("--bind-numa", "HOW", 'auto, or JSON: {"device0": 0}, or a file of it', ("--bind_numa",)),
    Flag("--dry-run", "RANK", "print the variables and command of all ranks, or of one; start nothing"),
    Flag("--rank-table-file", "FILE", "take nodes, ranks and addresses from a rank table", ("--rank_table_file",)),
    Flag("--sim_level", "L", "0 or 1: simulate, as without --distributed; -1: do not"),
    Flag("--sim_rank_id", "R", "a rank of those that --sim_level simulates; all of them are, at once"),
)


class Read:
    """The options of a job as given, and the problems found in them."""

    def __init__(self, arguments: argparse.Namespace, variables: Mapping[str, str]):
        self.problems: list[str] = []
        self.given: dict[str, str] = {}
        self.source: dict[str, str] = {}
        for flag in REAL_FLAGS:
            value = getattr(arguments, flag.key)
            if value is not None:
                self.given[flag.key], self.source[flag.key] = value, flag.name
            elif flag.variable and variables.get(flag.variable):
                self.given[flag.key], self.source[flag.key] = variables[flag.variable], flag.variable

    def number(self, key: str, least: int, most: float = math.inf) -> int | None:
        """Reads a whole number; notes a problem where it is none."""
        text = self.given.get(key)
        if text is None:
            return None
        if re.fullmatch(r"-?\d+", text) and least <= int(text) <= most:
            return int(text)
        upto = "" if most == math.inf else f" to {most:.0f}"
        self.problems.append(f"{self.source[key]} {text}: give a whole number from {least}{upto}")
        return None

    def called(self, key: str) -> str:
        """Returns an option as it was given, with its value."""
        return f"{self.source[key]} {self.given[key]}"
