"""Becomes a rank's program: bound to its cores, its two streams joined, and ended together with its launcher.

The launcher runs this file itself, with the standard library only and without site-packages, so that it costs no time.
"""

from __future__ import annotations

import json
import os
import signal
import sys

ORDERS = "SHARDWRIGHT_WORKER"  # the variable that holds the launcher's orders, as JSON
_PR_SET_PDEATHSIG = 1
_MPOL_BIND = 2
_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}  # number of the system call
_MOST_NODES = 1024


def end_with_launcher(launcher: int) -> None:
    """Makes the system kill this process when its launcher has ended, however that ended. Linux only.

    Args:
        launcher: number of its process.
    """
    if sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)  # outlives exec
    if os.getppid() != launcher:  # it has ended before
        raise SystemExit("the launcher has ended")


def bind_memory(node: int) -> None:
    """Makes this process, and what it becomes, take memory of one NUMA node only.

    Raises:
        OSError: the system refuses.
    """
    import ctypes

    mask = (ctypes.c_ulong * (_MOST_NODES // 64))()
    mask[node // 64] = 1 << (node % 64)
    library = ctypes.CDLL(None, use_errno=True)
    if library.syscall(_SET_MEMPOLICY[os.uname().machine], _MPOL_BIND, mask, _MOST_NODES):
        number = ctypes.get_errno()
        raise OSError(number, f"memory cannot be bound to NUMA node {node}: {os.strerror(number)}")


def become(command: list[str]) -> None:
    """Follows the launcher's orders, and replaces this process by a command."""
    orders = json.loads(os.environ.pop(ORDERS))
    rank = os.environ["LOCAL_RANK"]
    if orders["joins_streams"]:
        os.dup2(1, 2)
    end_with_launcher(orders["launcher"])
    os.environ["ROLE_NAME"] = "default"
    try:
        if rank in orders["cores"]:
            os.sched_setaffinity(0, orders["cores"][rank])
        if rank in orders["memory_nodes"]:
            bind_memory(orders["memory_nodes"][rank])
        os.execvp(command[0], command)
    except OSError as error:
        raise SystemExit(f"rank {os.environ['RANK']} could not be started: {error}") from None


if __name__ == "__main__":
    become(sys.argv[1:])
