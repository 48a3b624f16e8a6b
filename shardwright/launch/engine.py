"""Runs the ranks of one node by torch's elastic agent, and reports a failure at once: which rank, how, and its last words."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server import WorkerSpec
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from shardwright.base.torch_private import end_workers, worker_processes
from shardwright.errors import WorldError
from shardwright.launch import worker
from shardwright.launch.job import ATTEMPT, Launch, worker_variables
from shardwright.launch.logs import LauncherLog, Logs, last_lines, make_folder
from shardwright.launch.meeting import Meeting, NodeFailed, interface_toward
from shardwright.launch.report import blames_another, exit_code, failure_report

_GRACE = 4  # seconds that ranks have to end by themselves after a failure, before they are killed
# Torch's rendezvous counts nodes that may come and go: how soon it believes that one is gone, and that no other comes.
_ELASTIC = {"last_call_timeout": "3", "keep_alive_interval": "1", "keep_alive_max_attempt": "3"}
_CAUSE = 3.0  # seconds to wait for the rank that the ones which ended blame
_LONG = 1e7  # seconds that a node whose ranks have ended waits for the others; it hears of failures meanwhile
_CAUSE_ELSEWHERE = 8.0  # and to hear of one on another node
_SIGNALS = ("SIGTERM", "SIGHUP", "SIGINT", "SIGQUIT")


def run_job(job: Launch) -> int:
    """Runs this node's ranks until they end; returns the exit code, that of the rank that failed first.

    Raises:
        OSError: the directory of logs cannot be made.
    """
    with contextlib.ExitStack() as stack:
        if job.folder is not None:
            folder = Path(job.folder).resolve()
            make_folder(folder)
        else:
            folder = Path(tempfile.mkdtemp(prefix="shardwright_"))
        log = LauncherLog(folder / job.launcher_log if job.folder is not None else None, job.in_background)
        stack.callback(log.close)
        stack.enter_context(log.listening())
        own, interface = interface_toward(job.address, job.port)
        logs = Logs(folder, job.log_name.replace("{ip}", own), job.shown, job.folder is not None)
        stack.enter_context(_variables(job, interface))
        stack.enter_context(_signals())
        if job.launcher_cores:
            os.sched_setaffinity(0, job.launcher_cores)
        log.note(f"pid {os.getpid()}, {job}")
        code = _run(job, logs, log)
        log.note(f"ended with exit code {code}")
        if job.folder is None and not log.names_files:
            shutil.rmtree(folder, ignore_errors=True)
    return code


def _run(job: Launch, logs: Logs, log: LauncherLog) -> int:
    """Runs the agent, and puts into words how it ended."""
    handler = _handler(job)
    worker_file = str(Path(worker.__file__).resolve())
    spec = WorkerSpec(
        role="",
        local_world_size=job.ranks,
        rdzv_handler=handler,
        entrypoint=sys.executable,
        args=("-I", "-S", worker_file, *job.command),
        max_restarts=job.restarts,
    )
    agent = _Agent(spec, logs, log, "[rank ${rank}]: " if logs.joins_streams else "${role_name}", job.grace)
    said = ""
    try:
        result = agent.run()
        if result is None:  # torch's rendezvous was closed by another node
            raise NodeFailed("another node has closed the job")
        if not result.is_failed():
            if isinstance(handler, Meeting):
                said = handler.failure()
                if said:
                    raise NodeFailed(said)
                handler.leave()
            return 0
        lines = agent.report()
        said = "; ".join(line for line in lines if not line.startswith("its last"))
        log.names_files = True
        log.say("\n  ".join(lines))
        return exit_code(agent.codes[agent.first] or 1)
    except SignalException as stopped:
        said = f"the launcher was ended by {signal.Signals(stopped.sigval).name}"
        log.say(f"{said}; so were all ranks of this machine")
        return 128 + stopped.sigval
    except NodeFailed as error:
        said = str(error)
        log.say(f"the job has failed elsewhere: {error}")
        return 1
    except (WorldError, RendezvousError) as error:
        said = str(error)
        if isinstance(error, RendezvousError):
            said = _rendezvous_failure(job, error)
        log.say(said)
        return 1
    finally:
        if said:
            agent.kill()
            if isinstance(handler, Meeting):
                handler.tell_failure(said)


def _handler(job: Launch) -> RendezvousHandler:
    if not job.backend:
        facts = {"--nnodes": job.nodes, "--max-restarts": job.restarts}
        return Meeting(job.nodes, job.node, job.address, job.port, job.patience, facts)
    seconds = str(max(1, min(int(job.patience), 10**8)))
    elastic = _ELASTIC if job.backend == "c10d" else {}
    options = {"join_timeout": seconds, "timeout": seconds, **elastic, **job.options}
    parameters = RendezvousParameters(
        backend=job.backend,
        endpoint=f"{job.address}:{job.port}",
        run_id=job.run_id,
        min_nodes=job.nodes,
        max_nodes=job.most_nodes or job.nodes,
        **options,
    )
    return get_rendezvous_handler(parameters)


def _rendezvous_failure(job: Launch, error: RendezvousError) -> str:
    at = f"{job.address}:{job.port}"
    if type(error).__name__ == "RendezvousTimeoutError":
        return f"fewer than {job.nodes} nodes came to {at} within {job.patience:g} s: start more, or give a longer --timeout"
    return f"this node could not join the others at {at} by torch's backend {job.backend!r}: {error}"


class _Agent(LocalElasticAgent):
    """Torch's agent, which notes the rank that failed first, and leaves no process behind.

    Args:
        spec: the ranks of this node.
        logs: where their output goes.
        log: the launcher's own.
        prefix: what stands before each line of a rank that is shown.
        grace: seconds that ranks have to end when the launcher is asked to.
    """

    def __init__(self, spec: WorkerSpec, logs: Logs, log: LauncherLog, prefix: str, grace: float):
        super().__init__(spec, logs_specs=logs, log_line_prefix_template=prefix, exit_barrier_timeout=_LONG)
        self.logs, self.log, self.grace = logs, log, grace
        self.failures = 0
        self.first = -1
        self.codes: dict[int, int | None] = {}
        self.size = 0
        self.ended: set[int] = set()  # ranks that have ended well

    def report(self) -> list[str]:
        """Describes the latest failure."""
        path = self.logs.path(self.first)
        others = {rank: last_lines(self.logs.path(rank)) for rank, code in self.codes.items() if code and rank != self.first}
        where = str(path) if path.exists() else ""
        return failure_report(self.first, self.codes, self.size, last_lines(path), where, others)

    def kill(self) -> None:
        """Kills what is left of the ranks and of the processes that they started."""
        for process in worker_processes(self).values():
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        ranks = {w.local_rank: w.global_rank for w in worker_group.workers}
        codes = {ranks[local]: process.poll() for local, process in worker_processes(self).items()}
        ended = {rank for rank, code in codes.items() if code == 0}
        for rank in ended - self.ended:
            if isinstance(worker_group.spec.rdzv_handler, Meeting):
                worker_group.spec.rdzv_handler.tell_end(rank)
        self.ended = ended
        if any(codes.values()):
            self.size = worker_group.workers[0].world_size
            self._note_failure(codes, ranks)
            end_workers(self, _GRACE)  # before torch's own, which waits for half a minute
            self.kill()
        return super()._monitor_workers(worker_group)

    def _note_failure(self, codes: dict[int, int | None], ranks: dict[int, int]) -> None:
        """Notes which ranks have failed by themselves.

        Waits a little where they only blame another. Where a signal ended one, the others have time to say where they wait.
        """
        handler, first = self._worker_group.spec.rdzv_handler, -1
        meeting = handler if isinstance(handler, Meeting) and handler.nodes > 1 else None
        until = time.monotonic() + (_CAUSE if meeting is None else _CAUSE_ELSEWHERE)
        while True:
            failed = [rank for rank, code in codes.items() if code]
            causes = [rank for rank in failed if not blames_another(last_lines(self.logs.path(rank)))]
            first = first if first >= 0 or not causes else causes[0]
            said = meeting.failure() if meeting is not None and first < 0 else ""
            if said:
                raise NodeFailed(said)
            have_ended = all(code is not None for code in codes.values()) and (first >= 0 or meeting is None)
            if have_ended or (first >= 0 and (codes[first] or 0) > 0) or time.monotonic() > until:
                break
            time.sleep(0.05)
            codes = {ranks[local]: process.poll() for local, process in worker_processes(self).items()}
        self.first, self.codes = first if first >= 0 else failed[0], codes
        self.failures += 1
        spec = self._worker_group.spec
        if self.failures <= spec.max_restarts:
            self.log.say(
                "\n  ".join([*self.report(), f"all ranks start again: restart {self.failures} of {spec.max_restarts}"])
            )

    def _shutdown(self, *args: Any, **options: Any) -> None:
        number = next((a for a in (*args, *options.values()) if isinstance(a, signal.Signals)), signal.SIGTERM)
        end_workers(self, self.grace if number == signal.SIGTERM else _GRACE, number)
        super()._shutdown(*args, **options)


@contextlib.contextmanager
def _variables(job: Launch, interface: str | None) -> Iterator[None]:
    """Sets the variables that ranks inherit, and the orders for their start."""
    before = dict(os.environ)
    os.environ.update(worker_variables(job, interface))
    orders = {
        "launcher": os.getpid(),
        "joins_streams": job.folder is not None,
        "cores": job.cores,
        "memory_nodes": job.memory_nodes,
    }
    os.environ[worker.ORDERS] = json.dumps(orders)
    os.environ.pop(ATTEMPT, None)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(_heeded_signals())
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _heeded_signals() -> list[str]:
    """Names the signals that end the job; under nohup a closed terminal does not."""
    known = [name for name in _SIGNALS if hasattr(signal, name)]
    return [name for name in known if name != "SIGHUP" or signal.getsignal(signal.SIGHUP) != signal.SIG_IGN]


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Turns signals into an exception from the beginning, while nodes meet too."""

    def stop(number: int, frame: Any) -> None:
        raise SignalException(f"got signal {number}", signal.Signals(number))

    known = [getattr(signal, name) for name in _heeded_signals()]
    before = {number: signal.signal(number, stop) for number in known}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
