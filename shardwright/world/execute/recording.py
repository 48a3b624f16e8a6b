"""Records one run of a program that does not keep all values for the backward.

While it runs, autograd passes every tensor that it saves to a hook. A tensor that lies in the memory of an instruction that
is to be computed again is replaced by a reader of that instruction's recipe (see :mod:`.recipes`), and so is a tensor that
such an instruction makes and saves within; other tensors are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shardwright.base.operators import may_draw
from shardwright.base.torch_private import StorageWeakRef
from shardwright.ir.instructions import Call
from shardwright.ir.operator import OpOverload
from shardwright.ir.program import LocalProgram
from shardwright.world.execute.ambient import Ambient, RandomState
from shardwright.world.execute.recipes import Computation, Inner, Kept, Part, Reader, Recipe, Source, unpack
from shardwright.world.execute.source import SourceWriter

_SWEEP_EVERY = 8  # registrations


class Recording:
    """Record, while a program runs, of the memory that need not be kept."""

    def __init__(self) -> None:
        # By storage: the recipe that makes it, the index of the result that lies in it, and the byte where that begins.
        # The weak reference keeps the number that a storage is known by from being given to another.
        self._made: dict[int, tuple[StorageWeakRef, Recipe, int, int]] = {}
        self._sweep_at = _SWEEP_EVERY
        self._recipe: Recipe | None = None  # of the call that is running
        self._position = -1
        self._inner: list[tuple[Inner, Tensor]] = []
        self._ambient = Ambient()
        self._ahead: list[Any] = []

    def close(self) -> None:
        """Forgets all; recipes live on in what autograd saved."""
        self._made, self._recipe, self._inner = {}, None, []

    # -- what programs call -------------------------------------------------------------------------------------------

    def call(self, computation: Computation, *tensors: Tensor) -> Sequence[Tensor]:
        """Runs a call whose results, or what it saves within, are computed again."""
        recipe = self.begin(computation, tensors)
        if computation.draws is not False:
            recipe.random = RandomState()
        self._recipe, self._position = recipe, -1
        try:
            results = computation.run(*tensors)
            if computation.draws is None:
                computation.draws = recipe.random is not None and recipe.random.is_past()
            if not computation.draws:
                recipe.random = None
            for index, result in enumerate(results):
                self._made_by_call(recipe, index, result)
        finally:
            self._recipe, self._inner = None, []
        return results

    def moved(self, computation: Computation, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Records a move that has run, whose results are computed again."""
        recipe = self.begin(computation, tensors)
        for index, result in enumerate(results):
            self.made(recipe, index, result)

    def begin(self, computation: Computation, tensors: Sequence[Tensor]) -> Recipe:
        """Makes the recipe of what is about to be computed from these tensors."""
        recipe = Recipe(computation, [self._source(t) for t in tensors], self._ambient, self._ahead)
        recipe.taken = {_storage(t) for t in tensors}
        return recipe

    def made(self, recipe: Recipe, index: int, result: Tensor) -> None:
        """Records a move's result, which is computed again."""
        storage = _storage(result)
        known = self._made.get(storage)
        if (known is not None and known[1] is recipe) or (storage in recipe.taken and not recipe.computation.overwrites):
            return  # shares its tensor's memory, and is kept or computed again with it
        self._register(recipe, index, result)

    def keep_pieces(
        self, computation: Computation, cut: Callable[[Sequence[Tensor]], Sequence[Tensor]], results: Sequence[Tensor]
    ) -> None:
        """Keeps tensors as pieces, from which the computation makes them again."""
        for result in results:
            if _storage(result) in self._made or result.untyped_storage().nbytes() != result.nbytes:
                return  # computed again anyway, or in memory that others are in too
        with torch.no_grad():
            pieces = cut([result.detach() for result in results])
        recipe = Recipe(computation, [Kept(piece) for piece in pieces], self._ambient, self._ahead)
        for index, result in enumerate(results):
            self._register(recipe, index, result)

    def kept(self, *results: Tensor) -> None:
        """Keeps tensors, whatever memory they lie in."""
        for result in results:
            self._made.pop(_storage(result), None)

    # -- what autograd calls ------------------------------------------------------------------------------------------

    def pack(self, tensor: Tensor) -> Kept | Reader:
        """Returns what autograd saves in place of a tensor."""
        self._position += 1
        if tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg():
            return Kept(tensor)
        storage = _storage(tensor)
        found = self._made.get(storage)
        if found is not None:
            _, recipe, index, start = found
            return Part(recipe, index, start, tensor)
        if self._recipe is None or storage in self._recipe.taken:
            return Kept(tensor)
        inner = Inner(self._recipe, self._position)
        self._inner.append((inner, tensor))
        return inner

    # -- recipes ------------------------------------------------------------------------------------------------------

    def _source(self, tensor: Tensor) -> Source:
        found = None
        if tensor.layout is torch.strided and not tensor.is_conj() and not tensor.is_neg():
            found = self._made.get(_storage(tensor))
        if found is None:
            return Kept(tensor.detach(), tensor.requires_grad)
        _, recipe, index, start = found
        return Part(recipe, index, start, tensor, tensor.requires_grad)

    def _made_by_call(self, recipe: Recipe, index: int, result: Tensor) -> None:
        """Records a call's result: it is kept, lies in known memory, or is computed again."""
        if result.layout is not torch.strided:
            return
        storage = _storage(result)
        known, is_kept = self._made.get(storage), bool(recipe.computation.kept) and recipe.computation.kept[index]
        if is_kept and known is not None:
            _, maker, which, _ = self._made.pop(storage)
            if which in maker.results_like:  # a view of a result that is not kept
                maker.given[which] = _whole(result, *maker.results_like[which], known[3])
        if storage in recipe.taken or known is not None:
            return
        if not is_kept:
            self._register(recipe, index, result)
        start = int(result.storage_offset()) * result.element_size()
        for inner, tensor in self._inner:
            if inner.instead is None and _storage(tensor) == storage:
                inner.is_really(Kept(tensor) if is_kept else Part(recipe, index, start, tensor))

    def _register(self, recipe: Recipe, index: int, result: Tensor) -> None:
        if result.layout is not torch.strided:
            return
        if len(self._made) >= self._sweep_at:
            self._made = {key: entry for key, entry in self._made.items() if not entry[0].expired()}
            self._sweep_at = len(self._made) + _SWEEP_EVERY
        reference = StorageWeakRef(result.untyped_storage())
        start = int(result.storage_offset()) * result.element_size()
        self._made[reference.cdata] = (reference, recipe, index, start)
        recipe.results_like[index] = (result.size(), result.stride())


def _storage(tensor: Tensor) -> int:
    """Returns a number that identifies a tensor's storage while that, or a weak reference to it, is alive."""
    return tensor.untyped_storage()._cdata


def _whole(view: Tensor, size: torch.Size, stride: tuple[int, ...], start: int) -> Tensor:
    """Builds the tensor of this size that begins at this byte of a view's memory."""
    view = view.detach()
    return view.as_strided(size, stride, start // view.element_size())


# -- binding --------------------------------------------------------------------------------------------------------------


def needs_recording(program: LocalProgram) -> bool:
    """Tells whether a program computes something again."""
    return any(i.recompute for i in program.instructions)


def recorded(run: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the program a function of its inputs that records where gradients are on.

    Args:
        run: the program as a function of a recording and its inputs.
        plain: the program as it is, for calls without gradients.
    """

    def call(*inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*inputs)
        recording = Recording()
        try:
            with torch.autograd.graph.saved_tensors_hooks(recording.pack, unpack):
                return run(recording, *inputs)
        finally:
            recording.close()

    return call


def computation_of(call: Call, program: LocalProgram, rank: int) -> tuple[Computation, list[str]]:
    """Returns a call as one rank computes it, and the names of its tensors."""
    writer = SourceWriter("again", [])
    names: list[str] = []

    def read(name: str) -> str:
        if name not in names:
            names.append(name)
        return f"t{names.index(name)}"

    text = writer.call(call.function, call.args, call.kwargs, read, lambda leaf: writer.literal(leaf.of(rank)))
    writer.parameters = [f"t{i}" for i in range(len(names))]
    run = writer.function(text if call.sequence else f"({text},)")
    kept = [name in program.kept for name in call.outputs]
    writes = [names.index(name) for name in call.written]
    return Computation(run, call.autocast, call.grad, kept if any(kept) else (), _draws(call), writes=writes), names


def _draws(call: Call) -> bool | None:
    """Tells whether a call draws random numbers; ``None`` where its first run has to tell."""
    if not isinstance(call.function, OpOverload):
        return None
    return None if may_draw(call.function) else False
