"""Meeting of a job's nodes: names those that do not come, and tells all when ranks of one have failed."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from shardwright.base.text import numbers_text
from shardwright.errors import WorldError
from shardwright.launch.job import ATTEMPT

_LOOK = 0.5  # seconds between two looks at what other nodes say
_GRACE = 5.0  # seconds that this node's ranks have to notice by themselves that another node's start again
_FAREWELL = 3.0  # seconds that node 0, which keeps the store, waits for the others to read how the job ends
_ANSWER = timedelta(seconds=60)  # in which the store has to answer
_SILENCE = 30.0  # seconds without a sign of life after which node 0 gives up another node


class NodeFailed(Exception):
    """Ranks of another node have failed, or its launcher has gone."""


class Meeting(RendezvousHandler):
    """Rendezvous of a fixed number of nodes at the launcher of node 0.

    Args:
        nodes: number of nodes.
        node: rank of this one; ``None``: node 0 where the address is one of this machine's, else in order of arrival.
        address: host of node 0.
        port: port there; 0: a free one.
        patience: seconds in which all nodes have to come.
        facts: what must be the same on all nodes, by name.
    """

    def __init__(self, nodes: int, node: int | None, address: str, port: int, patience: float, facts: dict[str, Any]):
        self.nodes, self.node, self.address, self.port = nodes, node, address, port
        self.patience, self.facts = patience, facts
        self.round = -1
        self._store: dist.Store | None = None
        self._looked = self._others_began = 0.0
        self._beats = 0
        self._heard: dict[int, tuple[bytes, float]] = {}  # by node, its latest sign of life, and when it was new

    # -- what torch's launcher calls ---------------------------------------------------------------------------------

    def get_backend(self) -> str:
        return "shardwright"

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_run_id(self) -> str:
        return f"{self.address}:{self.port}"

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        return

    def shutdown(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Waits for all nodes, at the beginning and before ranks start again.

        Raises:
            WorldError: nodes are missing, or come with another job.
            NodeFailed: another node's ranks have failed.
        """
        until = time.monotonic() + self.patience
        if self._store is None:
            self._store = self._open(until)
        self.round += 1
        self._others_began = 0.0
        self._come(self._store, until)
        os.environ[ATTEMPT] = str(self.round)
        shared = _SharedStore(f"launch/{self.round}", self._store, self._look)
        place = RendezvousStoreInfo(self.address, self.port)
        assert self.node is not None
        return RendezvousInfo(shared, self.node, self.nodes, place)

    def num_nodes_waiting(self) -> int:
        """Returns 1 where other nodes start their ranks again and this one's have not noticed.

        Raises:
            NodeFailed: another node's ranks have failed for good.
        """
        now = time.monotonic()
        if not self._look():
            return 0
        if self._asks(lambda store: store.add(f"came/{self.round + 1}", 0)):
            self._others_began = self._others_began or now
            return int(now - self._others_began > _GRACE)
        return 0

    # -- failures ----------------------------------------------------------------------------------------------------

    def tell_failure(self, text: str) -> None:
        """Tells the other nodes why the job ends; node 0 waits a little until they have read it."""
        if self.nodes == 1 or self._store is None:
            return
        with contextlib.suppress(Exception):
            told = f"node {self.node} ({socket.gethostname()}): {text}"
            if self._store.compare_set("failed", "", told).decode() == told and self.node:
                self._store.add("told", 1)
            self._await_others("told")

    def leave(self) -> None:
        """Ends a job that has gone well; node 0 waits a little until the others have seen that it has."""
        if self.nodes == 1 or self._store is None:
            return
        with contextlib.suppress(Exception):
            if self.node:
                self._store.add("left", 1)
            self._await_others("left")

    def _await_others(self, key: str) -> None:
        assert self._store is not None
        until = time.monotonic() + _FAREWELL
        while self.node == 0 and time.monotonic() < until and self._store.add(key, 0) < self.nodes - 1:
            time.sleep(0.05)

    def tell_end(self, rank: int) -> None:
        """Tells the ranks that one has ended, in case they wait for it to join."""
        if self._store is not None:
            place = dist.PrefixStore(f"attempt_{self.round}", self._store)
            with contextlib.suppress(RuntimeError):
                place.set(f"ended/{rank}", "1")
                place.add("ended", 1)

    def failure(self) -> str:
        """Returns what another node says about why the job ends, empty where none does."""
        if self.nodes == 1 or self._store is None:
            return ""
        try:
            return self._store.get("failed").decode() if self._store.check(["failed"]) else ""
        except Exception:  # the job is over, and node 0's launcher may be gone
            return ""

    def _look(self) -> bool:
        """Looks at the other nodes now and then; tells whether it has looked.

        Raises:
            NodeFailed: another node's ranks have failed, or it gives no sign of life.
        """
        now = time.monotonic()
        if self.nodes == 1 or self._store is None or now - self._looked < _LOOK:
            return False
        self._looked = now
        self._raise_if_failed()
        self._beats += 1
        self._asks(lambda store: store.set(f"beat/{self.node}", str(self._beats)))
        if self.node == 0 and self._heard:
            beats = self._asks(lambda store: store.multi_get([f"beat/{node}" for node in self._heard]))
            for node, beat in zip(list(self._heard), beats, strict=True):
                if beat != self._heard[node][0]:
                    self._heard[node] = beat, now
                elif now - self._heard[node][1] > _SILENCE:
                    raise NodeFailed(f"node {node} has given no sign of life for {_SILENCE:.0f} s")
        return True

    def _raise_if_failed(self) -> None:
        said = self._asks(lambda store: store.get("failed").decode() if store.check(["failed"]) else "")
        if said:
            with contextlib.suppress(Exception):
                assert self._store is not None
                self._store.add("told", 1)
            raise NodeFailed(said)

    def _asks(self, question: Callable[[dist.Store], Any]) -> Any:
        assert self._store is not None
        try:
            return question(self._store)
        except RuntimeError as error:
            raise NodeFailed(f"node 0's launcher at {self.address}:{self.port} has ended without a word") from error

    # -- meeting -----------------------------------------------------------------------------------------------------

    def _open(self, until: float) -> dist.Store:
        """Opens the store at node 0, or connects to it."""
        if self.node == 0 or (self.node is None and is_own_address(self.address)):
            try:
                listener = _listen(self.address, self.port)
            except WorldError:
                if self.node == 0:
                    raise
            else:  # of several launchers on this machine the first to come is node 0
                self.node, self.port = 0, listener.getsockname()[1]
                return dist.TCPStore(
                    self.address,
                    self.port,
                    is_master=True,
                    wait_for_workers=False,
                    timeout=_ANSWER,
                    master_listen_fd=listener.detach(),
                    multi_tenant=True,
                )
        self._wait_for_listener(until)
        try:
            return dist.TCPStore(self.address, self.port, is_master=False, wait_for_workers=False, timeout=_ANSWER)
        except RuntimeError:
            raise WorldError(
                f"who listens at {self.address}:{self.port} is no launcher: give another --master-port on all nodes"
            ) from None

    def _wait_for_listener(self, until: float) -> None:
        """Waits until somebody listens at node 0: in short steps, between which signals are heeded."""
        while True:
            try:
                socket.create_connection((self.address, self.port), timeout=1).close()
                return
            except OSError as error:
                if time.monotonic() > until:
                    raise WorldError(
                        f"node {'?' if self.node is None else self.node} has waited {self.patience:g} s for node 0 at "
                        f"{self.address}:{self.port}, and nobody listens there ({error.strerror or error}): start node 0 with "
                        "the same --master-addr and --master-port, on the machine that has this address, or give --timeout"
                    ) from None
            time.sleep(0.1)

    def _come(self, store: dist.Store, until: float) -> None:
        if self.round == 0:
            self._register(store, until)
        store.set(f"beat/{self.node}", str(self._beats))
        store.set(f"there/{self.round}/{self.node}", socket.gethostname())
        store.add(f"came/{self.round}", 1)
        while self._asks(lambda store: store.add(f"came/{self.round}", 0)) < self.nodes:
            self._look()
            if time.monotonic() > until:
                missing = [n for n in range(self.nodes) if not store.check([f"there/{self.round}/{n}"])]
                raise WorldError(
                    f"{self.nodes - len(missing)} of {self.nodes} nodes came within {self.patience:g} s: "
                    f"{numbers_text('node', missing)} missing; start there the same command with its own --node-rank, or "
                    "give a longer --timeout"
                )
            time.sleep(0.05)
        if self.node == 0 and not self._heard:
            self._heard = {node: (b"", time.monotonic()) for node in range(1, self.nodes)}

    def _register(self, store: dist.Store, until: float) -> None:
        """Takes this node's rank, and compares what must be the same on all nodes."""
        if self.node == 0:
            store.set("facts", json.dumps(self.facts))
        while not self._asks(lambda store: store.check(["facts"])):
            if time.monotonic() > until:
                raise WorldError(
                    f"who listens at {self.address}:{self.port} is no node of this job: give another --master-port"
                )
            time.sleep(0.05)
        theirs = json.loads(store.get("facts"))
        differing = [name for name, value in self.facts.items() if theirs.get(name) != value]
        if differing:
            said = "; ".join(f"{name} is {self.facts[name]!r} here and {theirs.get(name)!r} on node 0" for name in differing)
            raise WorldError(f"the nodes were started for different jobs: {said}: start all with the same")
        if self.node is None:
            self.node = store.add("arrived", 1)
            if self.node >= self.nodes:
                raise WorldError(f"all {self.nodes} nodes of the job at {self.address}:{self.port} are there already")
        elif store.add(f"taken/{self.node}", 1) > 1:
            host = store.get(f"there/0/{self.node}").decode()
            raise WorldError(f"node {self.node} is there already, on {host}: give each node a --node-rank of its own")


class _SharedStore(dist.PrefixStore):
    """Store of the launchers, which waits for a key in short steps: between them signals and failures are heeded."""

    def __init__(self, prefix: str, store: dist.Store, look: Callable[[], object]):
        super().__init__(prefix, store)
        self.look = look

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:  # type: ignore[override]
        until = time.monotonic() + (timeout or self.timeout).total_seconds()  # type: ignore[attr-defined]
        while not self.check(list(keys)):
            self.look()
            if time.monotonic() > until:
                raise dist.DistStoreError(f"waited in vain for {', '.join(keys)}")
            time.sleep(0.1)


def _listen(address: str, port: int) -> socket.socket:
    """Listens at an address only, where that is one of this machine's; else at all of them."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    where = address if is_own_address(address) else ""
    try:
        return socket.create_server((where, port), family=family)
    except OSError as error:
        raise WorldError(
            f"port {port} of {address} cannot be used: {os.strerror(error.errno or 0)}; give another --master-port"
            + (", or none: a free one is found" if where == "127.0.0.1" else " on all nodes")
        ) from None


def is_own_address(address: str) -> bool:
    """Tells whether an address or a host's name is one of this machine's.

    >>> is_own_address("localhost"), is_own_address("192.0.2.1")
    (True, False)
    """
    try:
        family, *_, place = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(place)
    except OSError:
        return False
    return True


def interface_toward(address: str, port: int) -> tuple[str, str | None]:
    """Returns this machine's address on the way to another, and the network interface that has it.

    The interface is ``None`` where the system does not say. Nothing is sent.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, port or 9))
            own = str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1", None
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
            for _, name in socket.if_nameindex():
                with contextlib.suppress(OSError):
                    reply = fcntl.ioctl(asked.fileno(), 0x8915, name.encode()[:15].ljust(256, b"\0"))  # SIOCGIFADDR
                    if socket.inet_ntoa(reply[20:24]) == own or (own.startswith("127.") and name == "lo"):
                        return own, name
    except (ImportError, OSError):
        pass
    return own, None
