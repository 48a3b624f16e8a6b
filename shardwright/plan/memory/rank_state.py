"""State of a rank while a step is simulated: values, their gradients, and the tape that the backward follows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from shardwright.ir.instructions import Move
from shardwright.ir.largest_piece import local_shape
from shardwright.plan.memory.local_tensor import LocalTensor, Strides, contiguous_strides
from shardwright.plan.memory.recipes import Kept, Reader, Recipe
from shardwright.plan.memory.usage import Storage, Usage


class Value(NamedTuple):
    """A local tensor and the memory it lies in."""

    storage: Storage
    tensor: LocalTensor


class Gradient(NamedTuple):
    """Gradient of a value, so far."""

    storage: Storage
    shape: tuple[int, ...]
    stride: Strides

    @property
    def is_contiguous(self) -> bool:
        """Tells whether it lies in memory in the order of its dims."""
        return self.stride == contiguous_strides(self.shape)


class RankState:
    """State of the rank with the largest pieces.

    Attributes:
        usage: what is in use.
        values: the values that the program still has, by local name.
        all_values: those that it ever had.
        saved: what autograd ever kept, in order.
        tape: the functions of the backward, to be called in reverse order.
        gradients: of values, by local name.
        parameters: bytes of each parameter that is trained.
        guessed: operators that could not be simulated, in order.
        makers: recipes of the storages that are not kept but made again.
        ahead: recipes that may run ahead of their readers, in order.
    """

    def __init__(self) -> None:
        self.usage = Usage()
        self.values: dict[str, Value] = {}
        self.all_values: dict[str, Value] = {}
        self.saved: dict[Storage, None] = {}
        self.tape: list[Callable[[], None]] = []
        self.gradients: dict[str, Gradient] = {}
        self.parameters: dict[str, float] = {}
        self.guessed: dict[str, None] = {}
        self.makers: dict[Storage, Recipe] = {}
        self.ahead: list[Recipe] = []

    def define(self, name: str, storage: Storage, tensor: LocalTensor) -> None:
        """Adds a value to the program, in this memory."""
        self.values[name] = self.all_values[name] = Value(self.usage.hold(storage), tensor)

    def forget(self, name: str) -> None:
        """Removes a value that nothing reads any more."""
        value = self.values.pop(name, None)
        if value is not None:
            self.usage.drop(value.storage)

    def save(self, storages: Iterable[Storage]) -> list[Kept | Reader]:
        """Holds what autograd keeps for one operator.

        Returns:
            Each storage once, to be released after the operator's backward.
        """
        found: list[Kept | Reader] = []
        for storage in dict.fromkeys(storages):
            if storage in self.makers:
                found.append(Reader(self.makers[storage], storage))
            else:
                found.append(Kept(self.usage, storage))
                self.saved.setdefault(storage)
        return found

    def add_gradient(self, name: str, storage: Storage, shape: tuple[int, ...], stride: Strides, cause: str) -> None:
        """Gives a value its gradient, or adds to the one it has: in place where nobody else holds that.

        Args:
            name: of the value.
            storage: memory of the gradient.
            shape, stride: of the gradient.
            cause: the operator, for messages.
        """
        usage = self.usage
        usage.hold(storage)
        before = self.gradients.get(name)
        if before is not None:
            contiguous = contiguous_strides(shape)
            if before.storage.users == 1 and before.stride == contiguous:
                usage.drop(storage)
                return
            total = Storage(float(math.prod(shape)) * self.all_values[name].tensor.dtype.itemsize, "transient", name)
            usage.point(cause, total.size)
            usage.hold(total)
            usage.drop(storage)
            usage.drop(before.storage)
            storage, stride = total, contiguous
        self.gradients[name] = Gradient(storage, shape, stride)
        if name in self.parameters:
            usage.reassign(storage, "gradients")

    def give_source(self, move: Move, storage: Storage, stride: Strides | None = None) -> None:
        """Gives the source of a move its gradient, which the caller held; contiguous, unless it has a stride."""
        shape = local_shape(move.redistribution.source, move.redistribution.shape)
        self.add_gradient(move.source, storage, shape, stride or contiguous_strides(shape), move.cause)
        self.usage.drop(storage)

    def hand_over_gradients(self) -> None:
        """Makes gradients the parameters' own at the end of the backward: contiguous, and nobody else's."""
        usage = self.usage
        for name, size in self.parameters.items():
            gradient = self.gradients.pop(name, None)
            if gradient is None:
                continue
            if gradient.storage.users > 1 or not gradient.is_contiguous:
                copy = Storage(size, "gradients", name)
                usage.point(name, copy.size)
                usage.hold(copy)
                usage.drop(gradient.storage)
            else:
                usage.reassign(gradient.storage, "gradients")
        for gradient in self.gradients.values():
            usage.drop(gradient.storage)
        usage.point("gradients", 0.0)
