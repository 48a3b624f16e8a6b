"""Job that a launcher starts: its command, ranks and nodes, and what becomes of its output."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PATIENCE = 600.0  # seconds in which nodes have to come
GRACE = 30.0  # seconds that ranks have to save and end
TIMEOUT = "SHARDWRIGHT_TIMEOUT"  # the variable by which ranks learn how long to wait for others to join
ATTEMPT = "SHARDWRIGHT_ATTEMPT"  # the variable by which ranks know the keys of their attempt; all nodes count alike


@dataclass(frozen=True)
class Launch:
    """One node's part of a job of processes.

    Args:
        command: what every rank runs.
        ranks: number of ranks on this node.
        nodes: number of nodes; the least number where ``most_nodes`` is given.
        most_nodes: the greatest number of nodes, which torch's own rendezvous then counts.
        node: rank of this node; ``None``: in the order of arrival.
        address: host of node 0, where all meet.
        port: port there; 0: a free one, on a single node only.
        backend: one of torch's rendezvous backends; empty: nodes meet by ``address`` and ``port``.
        run_id: name of the job, by which torch's rendezvous tells jobs apart.
        options: further options of torch's rendezvous.
        restarts: how often all ranks are started again after a failure.
        folder: directory of logs; ``None``: errors go to a temporary one.
        log_name: how names of the ranks' logs begin.
        shown: ranks whose output is printed; ``None``: all.
        patience: seconds in which nodes have to come.
        timeout: seconds in which ranks have to join the job, as handed on to them; ``None``: the ranks' own default.
        grace: seconds that ranks have to save and end when the launcher is asked to end.
        cores: cores by local rank; empty: not bound.
        launcher_cores: cores of the launcher; empty: not bound.
        memory_nodes: NUMA node by local rank; empty: not bound.
        in_background: whether nobody reads what the launcher prints.
    """

    command: tuple[str, ...]
    ranks: int
    nodes: int = 1
    most_nodes: int | None = None
    node: int | None = None
    address: str = "127.0.0.1"
    port: int = 0
    backend: str = ""
    run_id: str = ""
    options: dict[str, str] = field(default_factory=dict)
    restarts: int = 0
    folder: str | None = None
    log_name: str = "worker"
    shown: tuple[int, ...] | None = None
    patience: float = PATIENCE
    timeout: float | None = None
    grace: float = GRACE
    cores: dict[int, tuple[int, ...]] = field(default_factory=dict)
    launcher_cores: tuple[int, ...] = ()
    memory_nodes: dict[int, int] = field(default_factory=dict)
    in_background: bool = False

    @property
    def launcher_log(self) -> str:
        """Returns the name of the launcher's own log."""
        return f"scheduler_{self.node}.log" if self.node else "scheduler.log"

    def to_json(self) -> str:
        """Writes the job as JSON, for another process.

        >>> job = Launch(("train.py",), 2, cores={0: (0,), 1: (1, 2)})
        >>> Launch.from_json(job.to_json()) == job
        True
        """
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Launch:
        """Reads what :meth:`to_json` wrote."""
        found: dict[str, Any] = json.loads(text)
        for name in ("command", "launcher_cores"):
            found[name] = tuple(found[name])
        if found["shown"] is not None:
            found["shown"] = tuple(found["shown"])
        found["cores"] = {int(rank): tuple(cores) for rank, cores in found["cores"].items()}
        found["memory_nodes"] = {int(rank): node for rank, node in found["memory_nodes"].items()}
        return cls(**found)


def worker_variables(job: Launch, interface: str | None) -> dict[str, str]:
    """Returns the variables that all ranks of a node get besides torchrun's.

    Args:
        job: the job.
        interface: the network interface by which ranks reach each other; ``None``: gloo finds one.
    """
    found = {}
    # torchrun warns where this is unset; processes with more threads than cores stand in each other's way
    if "OMP_NUM_THREADS" not in os.environ:
        found["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // job.ranks))
    if interface and "GLOO_SOCKET_IFNAME" not in os.environ:
        found["GLOO_SOCKET_IFNAME"] = interface
    if job.timeout is not None:
        found[TIMEOUT] = f"{job.timeout:g}"
    if "PYTHONFAULTHANDLER" not in os.environ:  # a rank that a signal ends, as gloo's abort does, says where it was
        found["PYTHONFAULTHANDLER"] = "1"
    add_package(found, os.environ.get("PYTHONPATH"))
    return found


def add_package(variables: dict[str, str], path: str | None) -> None:
    """Makes the package one that processes find, where it may not be installed.

    Args:
        variables: of their environment.
        path: the ``PYTHONPATH`` that they would have.
    """
    root = checkout()
    if root is not None:
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), path]))


def checkout() -> Path | None:
    """Returns the folder of the package where it may not be installed; ``None`` among installed packages."""
    root = Path(__file__).resolve().parents[2]
    return None if root.name in ("site-packages", "dist-packages") else root


def python_command(script: str, arguments: list[str], is_module: bool = False) -> tuple[str, ...]:
    """Returns the command line of one rank.

    Args:
        script: a script, a module, or one of the programs ``python``, ``python3`` and ``pytest``.
        arguments: its arguments.
        is_module: whether ``script`` names a module.

    >>> python_command("pytest", ["-q"])[1:]
    ('-u', '-m', 'pytest', '-q')
    """
    start = (sys.executable, "-u")  # unbuffered, so that the last words of a rank that is killed are there
    if is_module or script == "pytest":
        return (*start, "-m", script, *arguments)
    if script in ("python", "python3"):
        return (*start, *arguments)
    return (*start, script, *arguments)
