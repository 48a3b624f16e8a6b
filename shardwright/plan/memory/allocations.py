"""Counts what is allocated and freed while operators run on fake tensors.

Fake tensors have the memory of results, not of kernels' temporaries; where those matter the operator's traits have them.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from shardwright.base.torch_private import TorchDispatchMode
from shardwright.cost.saved import storage_key
from shardwright.rules.traits import traits_of

# -- counting ------------------------------------------------------------------------------------------------------------


class AllocationTracker(TorchDispatchMode):
    """Adds up the memory of new tensors, and subtracts that of tensors that are gone.

    Gradients that a backward is given are counted apart, since somebody else may hold them.

    Args:
        on_cpu: whether kernels are those of the CPU.

    Attributes:
        live: bytes in use now, without given gradients.
        peak: the most of these so far.
        peak_with_given: the most so far with given gradients.
        sizes: bytes that count for each storage, by :func:`~shardwright.cost.saved.storage_key`.
        in_backward: whether the backward runs.
        giving: whether the tensors made now are given gradients.
    """

    def __init__(self, on_cpu: bool) -> None:
        super().__init__()
        self.on_cpu = on_cpu
        self.in_backward = self.giving = False
        self.sizes: dict[int, float] = {}
        self.live = self.given = self.peak = self.peak_with_given = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        traits = traits_of(function)
        tensors = [t for t in (result if isinstance(result, (tuple, list)) else (result,)) if isinstance(t, Tensor)]
        if self.in_backward and traits.sums_in_place and self.sizes.get(storage_key(args[0])):
            self.leave_out(args[0])
        is_large_scalar = self.on_cpu and traits.large_mean and not tensors[0].shape
        for tensor in tensors:
            self.track(tensor, args[0].nbytes if is_large_scalar else None)
        if self.on_cpu and traits.workspace is not None:
            self._reach(traits.workspace(args, tensors))
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
        """Stops counting a tensor's storage; returns the bytes that it counted for."""
        key = storage_key(tensor)
        size, self.sizes[key] = self.sizes[key], 0.0
        self.live -= size
        return size

    def begin_backward(self) -> None:
        """Begins the backward, with new peaks."""
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
