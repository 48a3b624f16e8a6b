"""Simulates the local calls of a program, and their backward.

Calls that are alike, in this program or another, are run on fake tensors once.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence
from functools import partial
from typing import Any

from shardwright.base.torch_private import pytree
from shardwright.cost.saved import frozen
from shardwright.ir.instructions import Call, PerRank, Ref
from shardwright.ir.operator import Slot
from shardwright.plan.memory.local_call import BackwardMemory, ForwardMemory, LocalCall, Place
from shardwright.plan.memory.rank_state import Gradient, RankState
from shardwright.plan.memory.recipes import Kept, Reader, Recipe
from shardwright.plan.memory.usage import Storage

_forwards: dict[Hashable, tuple[LocalCall, ForwardMemory]] = {}
_backwards: dict[Hashable, BackwardMemory] = {}
_MOST_REMEMBERED = 20_000


class CallPlayer:
    """Simulates calls on the state of a rank.

    Args:
        state: the rank's state.
        device: kind of device, which decides what kernels keep.
        kept: local names of results that are kept, though their calls are repeated.
    """

    def __init__(self, state: RankState, device: str, kept: Collection[str] = ()):
        self.state, self.usage, self.device, self.kept = state, state.usage, device, kept

    def play(self, call: Call) -> None:
        """Makes the outputs of a call, and keeps what its backward needs."""
        arguments, names = _with_slots(call)
        inputs = [self.state.values[name].storage for name in names]
        tensors = tuple(self.state.values[name].tensor for name in names)
        key = (call.function, frozen(arguments), tensors, call.autocast, call.grad, call.sequence, self.device)
        local, made = _forward_memory(key, LocalCall(call, tensors, arguments, self.device))
        self.usage.point(call.cause, made.peak, "activations")
        new = [Storage(size, "activations", call.cause) for size in made.sizes]
        for name, (tensor, place) in zip(call.outputs, made.outputs):
            self.state.define(name, _storage_at(place, inputs, new), tensor)
        if made.guessed:
            self.state.guessed.setdefault(call.cause)
        recipe = self._recipe(call, inputs, new, made) if call.recompute else None
        if any(tensor.needs_grad for tensor, _ in made.outputs):
            self._save(key, local, call, names, made, inputs, new, recipe)
        if recipe is not None:
            recipe.end_if_unused()

    def _save(
        self, key: Hashable, local: LocalCall, call: Call, names: Sequence[str], made: ForwardMemory,
        inputs: Sequence[Storage], new: Sequence[Storage], recipe: Recipe | None,
    ) -> None:  # fmt: skip
        """Keeps what the backward of a call needs, or a reader where it is recomputed."""
        saved = self.state.save(_storage_at(place, inputs, new) for place in made.kept)
        if made.kept_besides and recipe is not None:
            saved.append(Reader(recipe, None))
        elif made.kept_besides:
            saved += self.state.save([Storage(made.kept_besides, "activations", call.cause)])
        self.state.tape.append(partial(self._play_backward, key, local, call, names, made, saved))

    def _recipe(self, call: Call, inputs: Sequence[Storage], new: Sequence[Storage], made: ForwardMemory) -> Recipe:
        """Makes the recipe of a call's results, without those that are kept nevertheless."""
        results: dict[Storage, None] = {}
        for name, (_, place) in zip(call.outputs, made.outputs):
            storage = _storage_at(place, inputs, new)
            if name in self.kept:
                self.state.makers.pop(storage, None)
            elif place.kind == "new":
                results[storage] = None
        return Recipe(
            self.usage, self.state.makers, call.cause, inputs, list(results), made.peak, made.kept_besides
        )  # fmt: skip

    def _play_backward(
        self, key: Hashable, local: LocalCall, call: Call, names: Sequence[str], made: ForwardMemory,
        saved: Sequence[Kept | Reader],
    ) -> None:  # fmt: skip
        given = [self.state.gradients.pop(name, None) for name in call.outputs]
        if not any(given):
            self._drop(saved, given)
            return
        for item in saved:
            item.take()
        back = self._backward_memory(key, local, tuple(g.stride if g is not None else None for g in given), made)
        if back.guessed:
            self.state.guessed.setdefault(call.cause)
        storages = {id(g.storage): g.storage for g in given if g is not None}.values()
        if all(s.users == 1 for s in storages):  # the backward may free what it is given, which is in use already
            more = back.peak_with_given - sum(s.size for s in storages)
        else:
            more = back.peak
        self.usage.point(call.cause, more - made.kept_besides)
        inputs = [self.state.all_values[name].storage for name in names]
        new = [Storage(size, "transient", call.cause) for size in back.sizes]
        found = []
        for name, gradient in zip(names, back.gradients):
            if gradient is not None:
                stride, place = gradient
                found.append((name, self.usage.hold(_storage_at(place, inputs, new, given)), stride))
        self._drop(saved, given)
        for name, storage, stride in found:
            self.state.add_gradient(name, storage, self.state.all_values[name].tensor.shape, stride, call.cause)
            self.usage.drop(storage)

    def _drop(self, saved: Iterable[Kept | Reader], given: Iterable[Gradient | None]) -> None:
        for gradient in given:
            if gradient is not None:
                self.usage.drop(gradient.storage)
        for item in saved:
            item.let_go()

    def _backward_memory(
        self, key: Hashable, local: LocalCall, strides: tuple[Any, ...], made: ForwardMemory
    ) -> BackwardMemory:
        full_key = (key, strides)
        if full_key not in _backwards:
            try:
                back = None if made.guessed else local.backward(strides)
            except Exception:  # whatever the backward of an operator may raise on fake tensors
                back = None
            _backwards[full_key] = back or local.guess_backward(strides, made)
        return _backwards[full_key]


def _forward_memory(key: Hashable, local: LocalCall) -> tuple[LocalCall, ForwardMemory]:
    """Returns the memory that a call makes, and the first call that was like it."""
    if key not in _forwards:
        if len(_forwards) > _MOST_REMEMBERED:
            _forwards.clear()
            _backwards.clear()
        _forwards[key] = local, local.forward()
    return _forwards[key]


def _storage_at(
    place: Place, inputs: Sequence[Storage], new: Sequence[Storage], given: Sequence[Gradient | None] = ()
) -> Storage:
    if place.kind == "input":
        return inputs[place.position]
    if place.kind == "new":
        return new[place.position]
    gradient = given[place.position]
    assert gradient is not None, "a gradient that the backward was not given"
    return gradient.storage


def _with_slots(call: Call) -> tuple[Any, list[str]]:
    """Returns a call's arguments on the first rank, with slots for tensors, and the tensors' names."""
    names: list[str] = []

    def replace(leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            names.append(leaf.name)
            return Slot(len(names) - 1)
        return leaf.of(0) if isinstance(leaf, PerRank) else leaf

    return pytree.tree_map(replace, (call.args, call.kwargs)), names
