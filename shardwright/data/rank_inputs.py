"""Finds the global shapes and layouts of inputs of which each rank has a slice.

- :func:`global_inputs` serves a call of a net: from local tensors it finds the global shapes and the strategy to plan with.
  In a real job the ranks compare the shapes of their slices at each call, since a rank cannot tell from its own slice
  that another one's is shorter, as in an uneven last batch. They do not where every rank gives the whole.
- :func:`step_inputs` serves a train step, which runs as it is: its tensors become :class:`Slice`, which the nets it calls
  read as slices and any other code reads as the whole tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from shardwright.base.torch_private import pytree
from shardwright.data.strategy import layouts_of
from shardwright.errors import Problems, StrategyError
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.ir.pieces import chunk_pieces
from shardwright.world.current import World

Shape = tuple[int, ...]


@dataclass(frozen=True)
class GlobalInputs:
    """Global shapes and layouts of a call's tensors, and the strategy that plans follow."""

    shapes: tuple[Shape, ...]
    layouts: tuple[Layout, ...]
    strategy: Any


def global_inputs(leaves: Sequence[Any], strategy: Any, world: World, of_step: bool) -> tuple[list[Any], GlobalInputs]:
    """Returns the tensors to run on, and the global tensors that they are slices of.

    Args:
        leaves: the flat inputs of a call, tensors and others.
        strategy: the dataset strategy, not ``"full_batch"``.
        world: the world whose ranks give them.
        of_step: whether a train step makes the call: then only the step's inputs are slices.

    Raises:
        StrategyError: the strategy does not fit the inputs, or the ranks' slices do not fit together.
    """
    if not of_step:
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return list(leaves), _describe(tensors, strategy, world)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    slices = [t if isinstance(t, Slice) and not t.changed else None for t in tensors]
    mesh = next((t.laid_out.mesh for t in slices if t is not None), Mesh(("batch",), (world.size,)))
    layouts = [Layout.replicated(mesh, t.ndim) if s is None else s.laid_out for s, t in zip(slices, tensors)]
    entries = [(1,) * t.ndim if s is None else s.entry for s, t in zip(slices, tensors)]
    followed: Any = tuple(layouts)
    if not any(s is not None for s in slices):
        followed = "full_batch"
    elif all(entry == "data_parallel" for entry in entries):
        followed = "data_parallel"
    elif all(isinstance(entry, tuple) for entry in entries):
        followed = tuple(entries)
    described = GlobalInputs(tuple(tuple(t.shape) for t in tensors), tuple(layouts), followed)
    return [leaf.run_on() if isinstance(leaf, Slice) else leaf for leaf in leaves], described


def whole_samples(leaves: Sequence[Any], given: GlobalInputs, world: World) -> tuple[list[Any], GlobalInputs]:
    """Gathers slices of dim 0, for nets that process their batch in parts.

    A part of a rank's slice is not the rank's slice of a part: other samples would meet in a batch norm, and get other dropout
    masks, than on a single device.
    """
    if not any(layout.ndim and layout.bound[0] for layout in given.layouts):
        return list(leaves), given
    known = iter(zip(given.shapes, given.layouts))
    found, layouts = [], []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            shape, layout = next(known)
            if layout.ndim and layout.bound[0]:
                target = Layout.of(layout.mesh, [(), *layout.bound[1:]], (), [None, *layout.sizes[1:]])
                leaf = world.gather(leaf, layout, shape, target)
                layout = target
            layouts.append(layout)
        found.append(leaf)
    strategy = "full_batch" if all(layout.is_replicated for layout in layouts) else tuple(layouts)
    return found, GlobalInputs(given.shapes, tuple(layouts), strategy)


def step_inputs(args: Any, kwargs: Any, strategy: Any, world: World) -> tuple[Any, Any]:
    """Turns the tensor inputs of a train step into :class:`Slice` of the global ones.

    Args:
        args, kwargs: the inputs.
        strategy: the dataset strategy.
        world: the world whose ranks give them.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    given = _describe([leaf for leaf in leaves if isinstance(leaf, Tensor)], strategy, world)
    told = given.strategy
    entries = told if isinstance(told, tuple) else [told] * len(given.shapes)
    known = iter(zip(given.shapes, given.layouts, entries))
    marked = [Slice.of(leaf, *next(known), world) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return pytree.tree_unflatten(marked, spec)  # type: ignore[no-any-return]


class Slice(Tensor):
    """A rank's slice of a tensor that was given to a train step; to any code but a net, the whole tensor.

    The first operator that reads it gathers it, so that the step computes what the single device computes. A net reads the
    slice itself. After a change in place it is the whole tensor for nets too.
    """

    piece: Tensor
    laid_out: Layout
    entry: Any  # its entry in the strategy
    _world: World
    _shape: Shape
    _whole: Tensor | None
    _version_then: int

    @staticmethod
    def of(piece: Tensor, shape: Shape, layout: Layout, entry: Any, world: World) -> Slice:
        made = piece.detach().as_subclass(Slice)
        made.__dict__.update(piece=piece, laid_out=layout, entry=entry, _world=world, _shape=shape, _whole=None)
        return made

    def whole(self) -> Tensor:
        """Returns the global tensor. The first call gathers it; all ranks make that call."""
        own = self.__dict__
        whole: Tensor | None = own["_whole"]
        if whole is None:
            piece, world, layout = own["piece"], own["_world"], own["laid_out"]
            whole = world.gather(piece, layout, own["_shape"])
            own.update(_whole=whole, _version_then=whole._version)
        return whole

    @property
    def changed(self) -> bool:
        """Tells whether the whole tensor was changed in place since it was gathered."""
        whole = self.__dict__["_whole"]
        if whole is None:
            return False
        return whole._version != self.__dict__["_version_then"] or whole.requires_grad != self.piece.requires_grad

    def run_on(self) -> Tensor:
        """Returns the tensor that a net reads: the slice, or the whole tensor where that was changed."""
        return self.whole() if self.changed else self.piece

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args else None
        if func in _ABOUT_SHAPE and isinstance(first, Slice):
            return func(torch.empty(first.__dict__["_shape"], device="meta"), *args[1:], **(kwargs or {}))
        if func in _ABOUT_PIECE and isinstance(first, Slice):
            return func(first.run_on(), *args[1:], **(kwargs or {}))
        args, kwargs = pytree.tree_map(lambda a: a.whole() if isinstance(a, Slice) else a, (args, kwargs or {}))
        return func(*args, **kwargs)


# Properties of the whole tensor that need no gathering.
_ABOUT_SHAPE: set[Any] = {Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__}
_ABOUT_SHAPE |= {getattr(Tensor, name).__get__ for name in ("shape", "ndim")}
_ABOUT_PIECE: set[Any] = {getattr(Tensor, name).__get__ for name in ("dtype", "device", "requires_grad")}


# -- from local shapes to global ones ------------------------------------------------------------------------------------


def _describe(tensors: Sequence[Tensor], strategy: Any, world: World) -> GlobalInputs:
    """Finds the global tensors of these: joined from the ranks' slices, or the caller's own where they are whole."""
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if world.inputs_are_whole or world.size == 1 or _asks_for_whole(strategy):
        return _of_whole(tuple(shapes), strategy, world.size)
    numbers = [n for t in tensors for n in (t.ndim | _dtypes().index(t.dtype) << _DIMS, *t.shape)]
    everyone = tuple(map(tuple, world.gather_numbers(numbers)))
    return _of_slices(everyone, strategy, world.size)


def _asks_for_whole(strategy: Any) -> bool:
    """Tells whether every rank gives whole tensors, so that local shapes are the global ones."""
    if not isinstance(strategy, tuple):
        return False
    return all(e.is_replicated if isinstance(e, Layout) else all(count == 1 for count in e) for e in strategy)


@lru_cache(maxsize=1024)
def _of_whole(shapes: tuple[Shape, ...], strategy: Any, size: int) -> GlobalInputs:
    first = next((shape[0] for shape in shapes if shape), 0)
    carries = [bool(shape) and shape[0] == first for shape in shapes]
    layouts = tuple(layouts_of(strategy, list(map(len, shapes)), carries, size))
    uneven = strategy == "data_parallel" and first % size
    return GlobalInputs(shapes, layouts, layouts if uneven else strategy)


@lru_cache(maxsize=1024)
def _of_slices(everyone: tuple[tuple[int, ...], ...], strategy: Any, size: int) -> GlobalInputs:
    read = [_tensors(numbers) for numbers in everyone]
    by_rank = [shapes for shapes, _ in read]
    here, its_dtypes = read[0]
    for rank, (shapes, dtypes) in enumerate(read):
        if list(map(len, shapes)) != list(map(len, here)):
            raise StrategyError(
                f"rank 0 hands in tensors {_text(here)} and rank {rank} {_text(shapes)}; hand in as many on all ranks, of as "
                "many dims"
            )
        if dtypes != its_dtypes:
            raise StrategyError(
                f"rank 0 hands in tensors of {_names(its_dtypes)} and rank {rank} of {_names(dtypes)}; hand in the same dtypes "
                "on all ranks"
            )
    lead = next((i for i, shape in enumerate(here) if shape), None)
    carries = [lead is not None and bool(s) and all(r[i][0] == r[lead][0] for r in by_rank) for i, s in enumerate(here)]
    layouts = layouts_of(strategy, list(map(len, here)), carries, size)
    problems = Problems()
    joined = [_joined(i, layout, [r[i] for r in by_rank], problems) for i, layout in enumerate(layouts)]
    problems.raise_if_any("the slices that ranks hand in do not fit together")
    whole, exact = tuple(shape for shape, _ in joined), tuple(layout for _, layout in joined)
    as_told = exact == tuple(layouts)
    if strategy == "data_parallel":
        as_told = as_told and all(shape[0] % size == 0 for shape, carried in zip(whole, carries) if carried)
    return GlobalInputs(whole, exact, strategy if as_told else exact)


def _joined(position: int, layout: Layout, given: Sequence[Shape], problems: Problems) -> tuple[Shape, Layout]:
    """Joins the slices of one input: returns its global shape, and its layout, with explicit piece sizes if needed."""
    mesh, sizes, shape = layout.mesh, list(layout.sizes), []
    for dim, axes in enumerate(layout.bound):
        found: dict[int, tuple[int, int]] = {}  # piece -> its size, and the rank that said so
        for rank in mesh.ranks:
            coordinates, piece = mesh.coordinates(rank), 0
            for axis in axes:
                piece = piece * mesh.axis_size(axis) + coordinates[axis]
            size, other = found.setdefault(piece, (given[rank][dim], rank))
            if size != given[rank][dim]:
                problems.add(
                    f"input {position}: rank {other} hands in {list(given[other])}, rank {rank} {list(given[rank])}, but by "
                    f"the dataset strategy {layout.short()} they have the same slice of dim {dim}; give them the same size"
                )
        pieces = tuple(size for _, (size, _) in sorted(found.items()))
        shape.append(sum(pieces))
        if axes and sizes[dim] is None and pieces != chunk_pieces(sum(pieces), tuple(mesh.axis_size(a) for a in axes)):
            sizes[dim] = pieces
        elif sizes[dim] is not None and pieces != sizes[dim]:
            problems.add(
                f"input {position}: ranks hand in {list(pieces)} of dim {dim}, by the dataset strategy it is "
                f"{list(sizes[dim] or ())}"
            )
    return tuple(shape), Layout.of(mesh, layout.bound, (), sizes)


_DIMS = 8  # bits for the number of dims, before those of the dtype


@lru_cache(maxsize=1)
def _dtypes() -> list[torch.dtype]:
    """Lists all dtypes, in an order that is the same on every rank."""
    return sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str)


def _tensors(numbers: Sequence[int]) -> tuple[list[Shape], list[torch.dtype]]:
    """Decodes shapes and dtypes from one row of numbers: per tensor the number of dims, their sizes, and the dtype."""
    shapes, dtypes, at = [], [], 0
    while at < len(numbers):
        ndim = numbers[at] & (1 << _DIMS) - 1
        dtypes.append(_dtypes()[numbers[at] >> _DIMS])
        shapes.append(tuple(numbers[at + 1 : at + 1 + ndim]))
        at += 1 + ndim
    return shapes, dtypes


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _text(shapes: Sequence[Shape]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes) or "none"
