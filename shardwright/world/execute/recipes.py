"""Recipes compute values again for the backward pass that were not kept for it.

A recipe is one instruction of a program in one run: how it computes, and where its tensors come from: kept, or from other
recipes. Autograd saves a *reader* of a recipe in place of a value. A recipe that is asked for a value computes it, and before
it all recipes it depends on, in the order in which the program ran; it holds its results until every reader has had them
once, at the latest until the backward pass ends.

Invariants:

- Recipes know nothing of the autograd graph: their tensors are detached. So they are freed with what autograd saved.
- The order in which recipes compute follows from the graph alone, so that it is the same on all ranks.
- A value computed again has the bits, strides and offset of the first.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from shardwright.base.torch_private import current_graph_task, queue_callback
from shardwright.world.execute.ambient import Ambient, RandomState

_numbers = itertools.count()


class UnderWay(Protocol):
    """Started computation; :meth:`wait` ends it and returns its result, or its results."""

    def wait(self) -> Any: ...


class Computation:
    """Function from an instruction's tensors to its results, in every run.

    Args:
        run: from its tensors to its results.
        autocast, grad: the settings that the instruction runs under.
        kept: for each result, whether it is kept after all, so that only what is saved within is computed again.
        draws: whether it draws random numbers; ``None``: not known yet.
        again: runs it for the backward pass, where that differs.
        start: begins it, where it may run ahead of its readers.
        overwrites: whether it may write its result into its tensor.
        writes: positions of tensors that it changes besides, such as running statistics; only the first time.
    """

    def __init__(
        self,
        run: Callable[..., Sequence[Tensor]],
        autocast: tuple[Any, ...] | None = None,
        grad: bool = True,
        kept: Sequence[bool] = (),
        draws: bool | None = False,
        start: Callable[[list[Tensor]], UnderWay] | None = None,
        overwrites: bool = False,
        writes: Sequence[int] = (),
    ):
        self.run, self.autocast, self.grad = run, autocast, grad
        self.kept, self.draws, self.start, self.overwrites = tuple(kept), draws, start, overwrites
        self.writes = tuple(writes)


class Task:
    """One backward pass, or one look at saved tensors outside of any. Results are held as long as it lasts."""

    _by_number: ClassVar[weakref.WeakValueDictionary[int, Task]] = weakref.WeakValueDictionary()
    _making = threading.Lock()

    def __init__(self) -> None:
        self.lock = threading.RLock()  # devices have threads of their own in one backward pass
        self.recipes: list[weakref.ref[Recipe]] = []

    @classmethod
    def of(cls, number: int) -> Task:
        """Returns the task of the backward pass in progress."""
        with cls._making:
            task = cls._by_number.get(number)
            if task is None:
                task = cls._by_number[number] = cls()
                queue_callback(task.end)
            return task

    def end(self) -> None:
        """Frees what is still held for readers that did not ask. That happens in a backward pass of a part of the graph."""
        for reference in self.recipes:
            recipe = reference()
            if recipe is not None and recipe.task is self:
                recipe.leave()
        self.recipes = []


class Kept:
    """A kept tensor."""

    __slots__ = ("needs_grad", "tensor", "version")

    def __init__(self, tensor: Tensor, needs_grad: bool = False):
        self.tensor, self.needs_grad = tensor, needs_grad
        self.version = None if tensor.is_inference() else tensor._version

    def read(self, task: Task | None = None) -> Tensor:
        if self.version is not None and self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{self.tensor.dtype} {list(self.tensor.shape)} is at version {self.tensor._version}, expected version "
                f"{self.version} instead; call backward() before tensors of the forward pass are changed"
            )
        return self.tensor


class Part:
    """A tensor that is a view of a recipe's result; a reader of the recipe."""

    __slots__ = ("__weakref__", "dtype", "index", "needs_grad", "offset", "recipe", "size", "stride", "task")

    def __init__(self, recipe: Recipe, index: int, start: int, tensor: Tensor, needs_grad: bool = False):
        self.recipe, self.index, self.needs_grad = recipe, index, needs_grad
        self.dtype, self.size, self.stride = tensor.dtype, tensor.size(), tensor.stride()
        self.offset = tensor.storage_offset() * tensor.element_size() - start  # bytes from where the result begins
        self.task: Task | None = None
        recipe.add_reader(self)

    def read(self, task: Task) -> Tensor:
        recipe = self.recipe
        base = recipe.result(self.index, task)
        recipe.was_read(self, task)
        at = base.storage_offset() * base.element_size() + self.offset
        if base.dtype == self.dtype:
            return base.as_strided(self.size, self.stride, at // base.element_size())
        made = torch.empty(0, dtype=self.dtype, device=base.device)
        return made.set_(base.untyped_storage(), at // made.element_size(), self.size, self.stride)

    def __del__(self) -> None:
        self.recipe.is_gone(self)


class Inner:
    """A tensor that an operator saves and that is neither its input nor its result; a reader of the recipe.

    Attributes:
        instead: what it turned out to be when the operator was done: a part of a result, or a result that is kept.
    """

    __slots__ = ("__weakref__", "instead", "position", "recipe", "task")
    index = -1  # no result

    def __init__(self, recipe: Recipe, position: int):
        self.recipe, self.position = recipe, position
        self.instead: Part | Kept | None = None
        self.task: Task | None = None
        recipe.inner_wanted.add(position)
        recipe.add_reader(self)

    def is_really(self, other: Part | Kept) -> None:
        """Replaces this reader by another value. It then does not read the recipe any more."""
        self.instead = other
        self.recipe.inner_wanted.discard(self.position)
        self.recipe.is_gone(self)

    def read(self, task: Task) -> Tensor:
        if self.instead is not None:
            return self.instead.read(task)
        value = self.recipe.inner(self.position, task)
        self.recipe.was_read(self, task)
        return value

    def __del__(self) -> None:
        if self.instead is None:
            self.recipe.is_gone(self)


Reader = Part | Inner
Source = Part | Kept


class Recipe:
    """One instruction in one run.

    Args:
        computation: what it computes.
        sources: where its tensors come from.
        ambient: the autocast settings of the run.
        ahead: the recipes of the run that may run ahead of their readers, in order; this one appends itself, if it may.

    Attributes:
        results_like: of every result that may be asked for, its size and strides.
        given: results that turned out to be kept.
        random: the state of the generators before it ran, if it draws.
        readers: how many there are, by the index of what they read; ``left`` of them have not read in the task in progress.
        taken: the storages of its tensors.
    """

    def __init__(self, computation: Computation, sources: Sequence[Source], ambient: Ambient, ahead: list[Any]):
        self.number = next(_numbers)
        self.computation, self.sources, self.ambient = computation, sources, ambient
        self.results_like: dict[int, tuple[torch.Size, tuple[int, ...]]] = {}
        self.given: dict[int, Tensor] = {}
        self.random: RandomState | None = None
        self.taken: set[int] = set()
        self.inner_wanted: set[int] = set()
        self.readers: dict[int, int] = {}
        self.ahead, self.place = ahead, len(ahead)
        if computation.start is not None:
            ahead.append(weakref.ref(self))
        self.task: Task | None = None
        self.left: dict[int, int] = {}
        self.is_computed = False
        self.results: dict[int, Tensor] = {}
        self.inners: dict[int, Tensor] = {}
        self.under_way: UnderWay | None = None

    # -- readers ------------------------------------------------------------------------------------------------------

    def result(self, index: int, task: Task) -> Tensor:
        """Returns a result, and computes it first if it is missing."""
        if index in self.given:
            return self.given[index]
        self.be_computed(task)
        if index not in self.results:  # asked for a second time
            self.drop()
            self.be_computed(task, index)
        return self.results[index]

    def inner(self, position: int, task: Task) -> Tensor:
        """Returns a tensor that the operator saves within."""
        self.be_computed(task)
        if position not in self.inners:
            self.drop()
            self.be_computed(task, -1)
        return self.inners[position]

    def add_reader(self, reader: Reader) -> None:
        """Counts one more reader."""
        self.readers[reader.index] = self.readers.get(reader.index, 0) + 1

    def was_read(self, reader: Reader, task: Task) -> None:
        """Records that a reader has had its value. It will not ask in this task again."""
        if self.task is task and reader.task is not task:
            reader.task = task
            self._one_less(self.left, reader.index)

    def is_gone(self, reader: Reader) -> None:
        """Counts one reader less."""
        self._one_less(self.readers, reader.index)
        if self.task is not None and reader.task is not self.task:
            self._one_less(self.left, reader.index)

    def _one_less(self, counts: dict[int, int], index: int) -> None:
        counts[index] = counts.get(index, 1) - 1
        if counts[index] > 0:
            return
        del counts[index]
        if counts is self.left:
            if index < 0:
                self.inners = {}
            else:
                self.results.pop(index, None)
            if not self.left:
                self.drop()

    def end_read(self) -> None:
        """Frees, after a read, what was computed for readers that had it before."""
        if not self.left:
            self.drop()

    # -- computing ----------------------------------------------------------------------------------------------------

    def be_computed(self, task: Task, once_more: int | None = None) -> None:
        """Computes this recipe and the missing ones it depends on, in the program's order.

        Args:
            task: the task in progress.
            once_more: index of a result that all its readers have had, and that is to be held nevertheless.
        """
        if self.is_computed and self.task is task:
            return
        found: dict[int, Recipe] = {}
        pending = [self]
        while pending:
            recipe = pending.pop()
            recipe.enter(task)
            if not recipe.is_computed and recipe.number not in found:
                found[recipe.number] = recipe
                if recipe.under_way is None:
                    pending += [s.recipe for s in recipe.sources if type(s) is Part and s.index not in s.recipe.given]
        for number in sorted(found):
            found[number]._compute(task, once_more if found[number] is self else None)
        for recipe in found.values():  # a result that is asked for a second time has no readers left
            if recipe is not self:
                recipe.end_read()

    def enter(self, task: Task) -> None:
        """Begins a task, unless it has begun before."""
        if self.task is not task:
            self.task, self.left = task, dict(self.readers)
            self.drop()
            task.recipes.append(weakref.ref(self))

    def leave(self) -> None:
        """Ends the task."""
        self.task = None
        self.drop()
        if self.under_way is not None:
            self.under_way.wait()
            self.under_way = None

    def drop(self) -> None:
        """Frees what was computed."""
        self.is_computed = False
        self.results, self.inners = {}, {}

    def _compute(self, task: Task, once_more: int | None) -> None:
        if self.under_way is not None:
            found = self.under_way.wait()
            results: Sequence[Tensor] = found if isinstance(found, (list, tuple)) else (found,)
            self.under_way = None
        else:
            results = self._run([source.read(task) for source in self.sources])
        for index, result in enumerate(results):
            if index in self.left or index == once_more:
                self.results[index] = self._as_before(index, result.detach())
        self.is_computed = True
        if self.computation.start is not None:
            self._start_next(task)

    def _run(self, tensors: list[Tensor]) -> Sequence[Tensor]:
        computation, wanted = self.computation, self.inner_wanted
        for index in computation.writes:
            tensors[index] = tensors[index].clone()
        position = -1

        def save(tensor: Tensor) -> None:
            nonlocal position
            position += 1
            if position in wanted:
                self.inners[position] = tensor

        with ExitStack() as stack:
            self.ambient.enter(stack, computation.autocast)
            if self.random is not None:
                stack.enter_context(self.random)
            stack.enter_context(torch.set_grad_enabled(bool(wanted)))
            if wanted:  # as the first time: what is saved depends on who has a gradient
                tensors = [
                    t.detach().requires_grad_() if s.needs_grad else t for s, t in zip(self.sources, tensors, strict=True)
                ]
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(save, _never))
            return computation.run(*tensors)

    def _as_before(self, index: int, result: Tensor) -> Tensor:
        """Gives a result the strides that it had the first time."""
        size, stride = self.results_like.get(index, (result.size(), result.stride()))
        if result.stride() == stride:
            return result
        return torch.empty_strided(size, stride, dtype=result.dtype, device=result.device).copy_(result)

    def _start_next(self, task: Task) -> None:
        """Starts the nearest earlier recipe that is still needed. The backward goes the other way."""
        for reference in reversed(self.ahead[: self.place]):
            other: Recipe | None = reference()
            if other is None or not other.readers:
                continue
            other.enter(task)
            if not other.left:
                continue
            if not other.is_computed and other.under_way is None:
                assert other.computation.start is not None
                with torch.no_grad():
                    other.under_way = other.computation.start([source.read(task) for source in other.sources])
            return


def _never(packed: Any) -> Tensor:
    raise AssertionError("the backward of an operator that was run again for what it saves")


def unpack(packed: Kept | Reader) -> Tensor:
    """Returns the tensor for ``packed``, which autograd saved in its place."""
    if isinstance(packed, Kept):
        return packed.read()
    number = current_graph_task()
    task = Task.of(number) if number >= 0 else Task()
    with task.lock:
        value = packed.read(task)
        packed.recipe.end_read()
    if number < 0:
        task.end()
    return value


# -- settings of a run ----------------------------------------------------------------------------------------------------
