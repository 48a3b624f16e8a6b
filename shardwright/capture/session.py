"""A capture session: puts marks onto the operators that run while a callable is captured.

Outside a session a marked operator is the plain operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from shardwright.base.operators import ALIAS
from shardwright.base.torch_private import annotate, pytree
from shardwright.ir.marks import Mark

CALL, PIN, RECOMPUTE = "shardwright_call", "shardwright_pin", "shardwright_recompute"
CLOCK = "shardwright_clock"  # the number of the torch function of the user's that called an operator
COPY, BATCH = "shardwright_copy", "shardwright_batch"


@dataclass
class Session:
    """Marked calls met during one capture; ``calls[i]`` is the mark of call ``i``.

    ``counts[i]`` and ``results[i]`` are the numbers of tensors that the call takes and returns.
    """

    calls: list[Mark] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    results: list[int] = field(default_factory=list)
    groups: int = 0  # of copies
    impossible: list[str] = field(default_factory=list)  # errors in marks that do not depend on the devices

    def new_group(self) -> int:
        """Returns a number for the copies of one call of a network."""
        self.groups += 1
        return self.groups

    def copy(self, group: int, index: int) -> AbstractContextManager[None]:
        """Puts operators, within the block, into one of the copies of a group."""
        return annotate({COPY: (group, index)})

    def of_batch(self) -> AbstractContextManager[None]:
        """Marks, within the block, dim 0 of operators' results as the batch. Their rules cannot know it."""
        return annotate({BATCH: True})

    def run(self, mark: Mark, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Runs ``function`` with every tensor input and output pinned and every operator tagged.

        Args:
            mark: the strategy of the call.
            function: what is called.
            args, kwargs: its arguments.
        """
        again = mark.attributes.get("recompute")
        if again is None:
            return self._run(mark, function, args, kwargs)
        with annotate({RECOMPUTE: again}):
            return self._run(mark, function, args, kwargs) if mark.asks_for_layouts else function(*args, **kwargs)

    def _run(self, mark: Mark, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        call = len(self.calls)
        self.calls.append(mark)
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.counts.append(len(tensors))
        self.results.append(0)
        args, kwargs = self._pinned(call, "in", (args, kwargs))
        with annotate({CALL: call}):
            result = function(*args, **kwargs)
        self.results[call] = sum(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result))
        return self._pinned(call, "out", result)

    def pin(self, mark: Mark, tensor: Tensor) -> Tensor:
        """Returns the tensor with a layout pinned onto it."""
        self.calls.append(mark)
        self.counts.append(1)
        self.results.append(0)
        with annotate({PIN: (len(self.calls) - 1, "in", 0)}):
            return ALIAS(tensor)

    def _pinned(self, call: int, side: str, value: Any) -> Any:
        position = -1

        def pin(leaf: Any) -> Any:
            nonlocal position
            if not isinstance(leaf, Tensor):
                return leaf
            position += 1
            with annotate({PIN: (call, side, position)}):
                return ALIAS(leaf)

        return pytree.tree_map(pin, value)


_current: list[Session] = []


def current_session() -> Session | None:
    """Returns the session in progress, or ``None``."""
    return _current[-1] if _current else None


@contextmanager
def session() -> Iterator[Session]:
    """Opens the session of a capture for the block."""
    new = Session()
    _current.append(new)
    try:
        yield new
    finally:
        _current.remove(new)


@contextmanager
def marked_modules(root: nn.Module, marks: dict[nn.Module, Mark]) -> Iterator[None]:
    """Makes calls of the marked modules, within the block, run under their marks. The modules are restored afterwards."""
    changed: list[tuple[nn.Module, bool, Any]] = []
    try:
        for module, mark in marks.items():
            had = "forward" in module.__dict__
            plain = module.forward

            def run(*args: Any, _mark: Mark = mark, _plain: Any = plain, **kwargs: Any) -> Any:
                now = current_session()
                return now.run(_mark, _plain, args, kwargs) if now else _plain(*args, **kwargs)

            changed.append((module, had, module.__dict__.get("forward")))
            module.__dict__["forward"] = run
        yield
    finally:
        for module, had, before in reversed(changed):
            if had:
                module.__dict__["forward"] = before
            else:
                del module.__dict__["forward"]
