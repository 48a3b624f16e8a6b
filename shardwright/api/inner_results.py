"""Inner results: tensors that a call returns, and that it computes other results of, such as logits beside their loss.

On one device the gradient of such a result is whole, as the others are computed of it. In a parallel program it is a copy
beside the way that gradients take, and would get only what comes through itself. The backward pass refuses whoever asks for it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from shardwright.base.torch_private import current_graph_task, is_captured_alone
from shardwright.errors import CaptureError
from shardwright.ir.graph import Graph
from shardwright.train.outputs.split_output import SplitOutput


def inner_results(graph: Graph) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the places of outputs that are computed of other outputs, and of those others."""
    places: dict[str, list[int]] = {}
    for place, value in enumerate(graph.outputs):
        if isinstance(value, str) and value in graph.needs_grad:
            places.setdefault(value, []).append(place)
    behind: dict[str, frozenset[str]] = {}  # value -> the results that it is computed of
    for node in graph.nodes if len(places) > 1 else ():
        read = [value for value in node.inputs if value in graph.needs_grad]
        found = frozenset().union(*[behind.get(value, frozenset()) for value in read], [v for v in read if v in places])
        behind |= dict.fromkeys(node.outputs if found else (), found)
    outer = [value for value in places if value in behind]
    inner = frozenset().union(*[behind[value] for value in outer])
    return tuple(n for value in outer for n in places[value]), tuple(n for value in sorted(inner) for n in places[value])


def watch_gradients(outputs: Sequence[Any], outer: Sequence[int], inner: Sequence[int], retained: frozenset[int]) -> None:
    """Makes backward passes refuse to give the gradients of inner results, which would not be whole.

    Args:
        outputs: what a call returns.
        outer, inner: places of :func:`inner_results`.
        retained: places of results whose gradients the callable itself retains, which are whole.
    """
    checks = _Checks()
    for n in outer:
        _when_whole(outputs[n], partial(_hook, checks))
    for n in inner:
        _when_whole(outputs[n], partial(checks.watch, n in retained))


def _when_whole(output: Tensor, act: Callable[[Tensor], None]) -> None:
    """Calls ``act`` with a result now, or as soon as it is made whole."""
    if isinstance(output, SplitOutput):
        output.when_whole.append(act)
    else:
        act(output)


def _hook(hook: _Check, output: Tensor) -> None:
    if output.requires_grad and not output.is_leaf:
        output.register_hook(hook)


class _Check:
    """A hook on gradients that only looks at them."""

    def __call__(self, gradient: Tensor) -> None:
        raise NotImplementedError

    __torch_unserializable__ = True  # saving the tensor leaves the hook out without a word


class _Checks(_Check):
    """A hook on gradients that checks all inner results of a call, once in each backward pass."""

    def __init__(self) -> None:
        self.inner: list[tuple[weakref.ref[Tensor], bool, frozenset[int]]] = []
        self.task = -1

    def watch(self, is_retained: bool, output: Tensor) -> None:
        """Adds an inner result to those that are checked.

        Args:
            is_retained: whether the callable itself retains its gradient, which is whole.
            output: the result.
        """
        self.inner.append((weakref.ref(output), is_retained, frozenset(_hooks(output))))
        _hook(_AloneCheck(weakref.ref(output)), output)

    def __call__(self, gradient: Tensor) -> None:
        task = current_graph_task()
        if task == self.task:
            return
        self.task = task
        for reference, is_retained, known in self.inner:
            found = reference()
            if found is None or found.grad_fn is None:
                continue
            if found.retains_grad and not is_retained:
                raise _refused(found, "retain_grad() of", "Call retain_grad() on it in forward")
            if any(number not in known and not isinstance(hook, _Check) for number, hook in _hooks(found).items()):
                raise _refused(found, "a hook on", "Register the hook in forward")


class _AloneCheck(_Check):
    """A hook on the gradient of an inner result that refuses a derivative with respect to it."""

    def __init__(self, reference: weakref.ref[Tensor]):
        self.reference = reference

    def __call__(self, gradient: Tensor) -> None:
        found = self.reference()
        if found is not None and found.grad_fn is not None and is_captured_alone(found.grad_fn):
            raise _refused(found, "the gradient of", "Take the derivative in forward, by torch.autograd.grad")


def _hooks(tensor: Tensor) -> dict[int, Any]:
    """Returns the hooks of a tensor by their numbers; those that the callable registered are there when a call returns."""
    return getattr(tensor, "_backward_hooks", None) or {}


def _refused(tensor: Tensor, what: str, instead: str) -> CaptureError:
    return CaptureError(
        f"{what} a result of {list(tensor.shape)} of a parallel call that computes others of it: it would get the part of "
        f"the gradient that does not come through these\n  {instead}, where it is computed"
    )
