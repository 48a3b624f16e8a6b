"""Train steps: functions that run as they are, while what they call is parallel."""

from __future__ import annotations

import itertools
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shardwright.base.torch_private import pytree
from shardwright.capture.capture import StepFound
from shardwright.capture.closure import reaches
from shardwright.capture.session import current_session
from shardwright.errors import ArgumentTypeError, ShardwrightError
from shardwright.parameters.handles import current


class StepContext:
    """Parallel forms of everything that one train step calls; ``make`` makes that of one callable."""

    def __init__(self, make: Callable[[Callable[..., Any]], Any]):
        self.make = make
        self._by_id: dict[Any, tuple[Any, Any]] = {}

    @property
    def children(self) -> list[Any]:
        return [child for _, child in self._by_id.values()]

    def parallel(self, target: Callable[..., Any]) -> Any:
        key = _identity(target)
        if key not in self._by_id:
            self._by_id[key] = (target, self.make(target))
        return self._by_id[key][1]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Makes module calls and :class:`GradFunction` calls of this thread, within the block, run parallel."""
        plain = nn.Module.__call__
        depth = threading.local()
        contexts = _contexts()

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            inside = getattr(depth, "value", 0)
            if "__wrapped_function__" in module.__dict__:  # parallel already
                return plain(module, *args, **kwargs)
            if inside or not _contexts() or _contexts()[-1] is not self or current_session() is not None:
                return plain(module, *args, **kwargs)
            if not any(True for _ in itertools.chain(module.parameters(), module.buffers())):
                return plain(module, *args, **kwargs)  # a loss on global values: nothing to shard
            depth.value = 1
            try:
                return self.parallel(module)(*args, **kwargs)
            finally:
                depth.value = 0

        contexts.append(self)
        nn.Module.__call__ = call  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            nn.Module.__call__ = plain  # type: ignore[method-assign]
            contexts.pop()


def _identity(target: Callable[..., Any]) -> Any:
    """Returns a key of a function that is equal for all functions of the same code and closure."""
    if not isinstance(target, types.FunctionType):
        return id(target)
    try:
        cells = tuple(id(cell.cell_contents) for cell in target.__closure__ or ())
    except ValueError:  # a cell that is not filled yet
        return id(target)
    return (target.__code__, cells, tuple(map(id, target.__defaults__ or ())))


_local = threading.local()


def _contexts() -> list[StepContext]:
    if not hasattr(_local, "contexts"):
        _local.contexts = []
    found: list[StepContext] = _local.contexts
    return found


class GradFunction:
    """See :func:`shardwright.value_and_grad`."""

    def __init__(self, function: Callable[..., Any], position: Any, weights: Iterable[nn.Parameter] | None, aux: bool):
        if not callable(function):
            raise ArgumentTypeError(f"value_and_grad({function!r}): give a function")
        if position is None and weights is None:
            raise ShardwrightError("value_and_grad: neither grad_position nor weights is given; give one of them")
        self.__wrapped_function__ = function
        self.function, self.has_aux = function, aux
        self.single = isinstance(position, int)
        self.positions = () if position is None else (position,) if isinstance(position, int) else tuple(position)
        self.weights = None if weights is None else list(weights)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        contexts = _contexts()
        run = contexts[-1].parallel(self.function) if contexts else self.function
        arguments = list(args)
        for p in self.positions:
            arguments[p] = arguments[p].detach().requires_grad_()
        with torch.enable_grad():
            value = run(*arguments, **kwargs)
        loss = value[0] if self.has_aux else value
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ShardwrightError(f"value_and_grad: the function returned {loss!r} as its loss; return a scalar tensor")
        inputs = [arguments[p] for p in self.positions]
        weights = [current(w) for w in self.weights or ()]
        gradients = torch.autograd.grad(loss, [*inputs, *weights], allow_unused=True)
        return _detached(value), self._arranged(list(gradients))

    def _arranged(self, gradients: list[Any]) -> Any:
        of_inputs: Any = gradients[: len(self.positions)]
        of_weights = gradients[len(self.positions) :]
        of_inputs = of_inputs[0] if self.single else tuple(of_inputs)
        if not self.positions:
            return of_weights
        return of_inputs if self.weights is None else (of_inputs, of_weights)


def _detached(value: Any) -> Any:
    return pytree.tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, value)


def looks_like_step(function: Callable[..., Any]) -> bool | None:
    """Tells whether a function can reach an optimizer or gradient function; ``None`` if only running it tells."""
    return True if reaches(function, (torch.optim.Optimizer, GradFunction)) else None


@contextmanager
def backward_is_a_step(watch: bool) -> Iterator[None]:
    """Makes a backward pass within the block raise :class:`StepFound`: the callable is a train step."""
    if not watch:
        yield
        return
    with _BackwardWatch():
        yield


class _BackwardWatch(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.backward, torch.autograd.backward, torch.autograd.grad):
            raise StepFound()
        return function(*args, **(kwargs or {}))
