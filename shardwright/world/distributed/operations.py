"""Communication that is under way, finished in the order in which it began."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from shardwright.errors import WorldError
from shardwright.world.distributed.messages import Algorithm

_CLOSED = "this distributed world was closed: bind the program again in a new one"


class Handle:
    """Operation under way. It keeps its tensors alive; drop it only after :meth:`wait`."""

    __slots__ = ("_finish", "_result", "_state")

    def __init__(self, finish: Callable[[Any], Tensor] | None, state: Any):
        self._finish, self._state = finish, state
        self._result: Tensor | None = None if finish else state

    def wait(self) -> Tensor:
        """Waits until the operation is done; every call returns the same result.

        Raises:
            RuntimeError: another rank is gone, or did not do its part within the group's timeout.
        """
        if self._finish is not None:
            self._result = self._finish(self._state)
            self._finish = self._state = None
        return self._result  # type: ignore[return-value]


class _Continued(Handle):
    """Operation under way whose later rounds a thread of the link does. A thread that waits for it does them itself."""

    __slots__ = ("_claim", "_done", "_error")

    def __init__(self, finish: Callable[[Any], Tensor], state: Any):
        super().__init__(finish, state)
        self._claim, self._done = threading.Lock(), threading.Event()
        self._error: BaseException | None = None

    def advance(self) -> None:
        """Does the remaining rounds, unless another thread does already."""
        if not self._claim.acquire(blocking=False):
            return
        try:
            super().wait()
        except BaseException as error:  # for those who wait
            self._error = error
        finally:
            self._done.set()

    def wait(self) -> Tensor:
        self.advance()
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]


class _Later:
    """Thread that does the later rounds of started operations, in the order of their start; made when first needed."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[_Continued | None] | None = None

    def put(self, handle: _Continued) -> None:
        if self._queue is None:
            self._queue = SimpleQueue()
            threading.Thread(target=_serve, args=(self._queue,), name="shardwright-link", daemon=True).start()
        self._queue.put(handle)

    def close(self) -> None:
        if self._queue is not None:
            self._queue.put(None)
            self._queue = None


def _serve(queue: SimpleQueue[_Continued | None]) -> None:
    # tensors made in inference mode may be written in it only; others may be written in it too
    with torch.inference_mode():
        while (handle := queue.get()) is not None:
            handle.advance()
            del handle  # with its tensors, which get() would else keep until the next one comes


class Operation:
    """A collective of a fixed size, as a function of this rank's tensor; every member has to call it.

    It is prepared for a dtype when it is first used with it.
    """

    __slots__ = ("_algorithms", "_later", "_prepare", "_runs")

    def __init__(self, prepare: Callable[[torch.dtype], tuple[str, Algorithm]], later: _Later):
        self._prepare, self._later = prepare, later
        self._algorithms: dict[torch.dtype, tuple[str, Algorithm]] = {}
        self._runs: dict[torch.dtype, Callable[[Tensor], Tensor]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        run = self._runs.get(x.dtype)
        return run(x) if run is not None else self._of(x.dtype)[1].run(x)

    def start(self, x: Tensor) -> Handle:
        """Starts it. On gloo it continues without this thread; on NCCL it has its place in the stream's order."""
        algorithm = self._of(x.dtype)[1]
        state = algorithm.begin(x)
        if not algorithm.continues:
            return Handle(algorithm.finish, state)
        handle = _Continued(algorithm.finish, state)
        self._later.put(handle)
        return handle

    def algorithm(self, dtype: torch.dtype = torch.float32) -> str:
        """Returns the name of the algorithm for tensors of a dtype."""
        return self._of(dtype)[0]

    def is_possible(self, dtype: torch.dtype) -> bool:
        """Tells whether the prepared algorithm works for a dtype, and for its size."""
        try:
            self._of(dtype)
        except WorldError:
            return False
        return True

    def _of(self, dtype: torch.dtype) -> tuple[str, Algorithm]:
        if dtype not in self._algorithms:
            self._algorithms[dtype] = self._prepare(dtype)
            self._runs[dtype] = self._algorithms[dtype][1].run
        return self._algorithms[dtype]


class _Closed:
    """Stands for a process group once its world is closed."""

    def __getattr__(self, name: str) -> Any:
        raise WorldError(_CLOSED)
