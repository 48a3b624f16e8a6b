"""Fails in a way that its first argument names: run by tests, as every rank of a job. It imports nothing that takes time."""

import os
import signal
import subprocess
import sys
import time

KIND = sys.argv[1]
RANK = int(os.environ["RANK"])


def be_there(number=None):
    """Writes this process's number, or another's, where the test looks."""
    name = "pid" if number is None else "child"
    with open(f"{name}{RANK}.new", "w") as file:
        file.write(str(number or os.getpid()))
    os.rename(f"{name}{RANK}.new", f"{name}{RANK}")


def wait_for_others():
    """Waits until all ranks of the test have written theirs."""
    while not all(os.path.exists(f"pid{rank}") for rank in range(int(os.environ["WORLD_SIZE"]))):
        time.sleep(0.02)


if KIND == "stubborn" and RANK == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if KIND in ("child", "signal"):
    be_there(subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(100)"]).pid)
be_there()
wait_for_others()
if KIND == "stopped" and RANK == 0:
    os.kill(os.getpid(), signal.SIGSTOP)
if RANK == 1 or (KIND == "blames" and RANK == 0):
    if KIND == "blames" and RANK == 0:
        raise RuntimeError("Connection closed by peer [127.0.0.1]:4711")
    if KIND == "blames":
        time.sleep(0.8)
    if KIND == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if KIND == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if KIND == "exit":
        sys.exit(7)
    if KIND == "restart" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.unlink("pid1")
        sys.exit("the first attempt fails")
    if KIND not in ("signal", "restart"):
        raise ValueError(f"{KIND} is what rank 1 does")
if KIND == "restart":
    sys.exit(0)
time.sleep(100)
