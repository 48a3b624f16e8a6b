"""Allocations: what is allocated and freed while operators run on fake tensors.

Fake tensors tell the memory of results, not what kernels need meanwhile; where that matters a table has it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from shardwright.base.torch_private import TorchDispatchMode
from shardwright.cost.saved import storage_key

# -- what kernels of the CPU need meanwhile, found by profiling single calls ---------------------------------------------


def _convolution(args: Sequence[Any], results: Sequence[Tensor]) -> float:
    transposed = args[6]
    return _bytes(*args[:2], results[0]) if transposed else float(results[0].nbytes)


def _convolution_backward(args: Sequence[Any], results: Sequence[Tensor]) -> float:
    return _bytes(*args[:3])


def _batch_norm_backward(args: Sequence[Any], results: Sequence[Tensor]) -> float:
    """A second tensor like the input, where gradient and input lie in memory alike."""
    gradient, given = args[:2]
    return float(given.nbytes) if gradient.stride() == given.stride() else 0.0


def _logsumexp(args: Sequence[Any], results: Sequence[Tensor]) -> float:
    return float(args[0].nbytes)


def _bytes(*tensors: Tensor) -> float:
    return float(sum(t.nbytes for t in tensors))


# By operator: bytes that its kernel needs, from arguments and results.
_WORKSPACE: dict[str, Callable[[Sequence[Any], Sequence[Tensor]], float]] = {
    "aten.convolution.default": _convolution,
    "aten.convolution_backward.default": _convolution_backward,
    "aten.native_batch_norm_backward.default": _batch_norm_backward,
    "aten.logsumexp.default": _logsumexp,
}

# Losses whose mean lies in memory as large as the first argument.
_LARGE_SCALAR = frozenset({"aten.mse_loss.default", "aten.smooth_l1_loss.default", "aten.huber_loss.default"})

# Fake tensors take these out of place in backward formulas, real ones in place.
_IN_PLACE_BACKWARD = frozenset({"aten.index_add.default", "aten.scatter_add.default"})


# -- counting ------------------------------------------------------------------------------------------------------------


class AllocationTracker(TorchDispatchMode):
    """Adds up the memory of tensors that are made, and takes off that of those that are gone.

    Gradients that are handed to a backward are counted apart, since somebody else may hold them.

    Args:
        on_cpu: whether kernels are those of the CPU.

    Attributes:
        live: bytes in use now, without gradients handed in.
        peak: the most of these so far.
        peak_with_given: the most so far with gradients handed in.
        sizes: bytes that count for each storage, by :func:`~shardwright.cost.saved.storage_key`.
        in_backward: whether what runs is the backward.
        giving: whether what is made now is a gradient that is handed in.
    """

    def __init__(self, on_cpu: bool) -> None:
        super().__init__()
        self.on_cpu = on_cpu
        self.in_backward = self.giving = False
        self.sizes: dict[int, float] = {}
        self.live = self.given = self.peak = self.peak_with_given = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = str(function)
        tensors = [t for t in (result if isinstance(result, (tuple, list)) else (result,)) if isinstance(t, Tensor)]
        if self.in_backward and name in _IN_PLACE_BACKWARD and self.sizes.get(storage_key(args[0])):
            self.leave_out(args[0])
        is_large_scalar = self.on_cpu and name in _LARGE_SCALAR and not tensors[0].shape
        for tensor in tensors:
            self.track(tensor, args[0].nbytes if is_large_scalar else None)
        if self.on_cpu and name in _WORKSPACE:
            self._reach(_WORKSPACE[name](args, tensors))
        return result

    def track(self, tensor: Tensor, size: float | None = None) -> None:
        """Counts a tensor's storage if it is new, as so many bytes; by default, those it has."""
        storage, key = tensor.untyped_storage(), storage_key(tensor)
        if key in self.sizes:
            return
        size = float(storage.nbytes()) if size is None else size
        self.sizes[key] = size
        if self.giving:
            self.given += size
        else:
            self.live += size
        self._reach()
        weakref.finalize(storage, self._gone, key, self.giving)

    def leave_out(self, tensor: Tensor) -> float:
        """Counts a tensor's storage no more; returns the bytes that it counted for."""
        key = storage_key(tensor)
        size, self.sizes[key] = self.sizes[key], 0.0
        self.live -= size
        return size

    def begin_backward(self) -> None:
        """What counts from now on is the backward; peaks begin anew."""
        self.peak = self.peak_with_given = self.live
        self.in_backward = True

    def _reach(self, workspace: float = 0.0) -> None:
        self.peak = max(self.peak, self.live + workspace)
        self.peak_with_given = max(self.peak_with_given, self.live + self.given + workspace)

    def _gone(self, key: int, given: bool) -> None:
        size = self.sizes.pop(key)
        if given:
            self.given -= size
        else:
            self.live -= size
