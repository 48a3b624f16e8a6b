"""Rules of operators that give elements another shape or order, or repeat them: reshapes, transposes, expansions.

A dim that is cut or joined is whole; every other dim is free. Reshapes are compound factors, so that a split of the more
significant part survives: ``(B, S, H*D) -> (B, S, H, D)`` is ``b s (h d) -> b s h d``.

All are linear, so they run on pending sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardwright.ir.instructions import Ref
from shardwright.ir.operator import Operator
from shardwright.ir.signature import Signature, TensorFactors
from shardwright.rules.lowering import Local
from shardwright.rules.notation import parse
from shardwright.rules.pieces import (
    names,
    notation,
    of_sizes,
    some_piece_is_empty,
    with_dims,
)
from shardwright.rules.registry import rule_for
from shardwright.rules.traits import Traits, lies_in_order, register_traits

ONE = ((0,),)  # linear in the first input only


# -- reshapes ---------------------------------------------------------------------------------------------------------


@rule_for("aten.view", "aten.reshape", "aten._unsafe_view", "aten._reshape_alias", "aten.flatten", "aten.unflatten")
@rule_for("aten.ravel", "aten.view_as", "aten.reshape_as", "aten.atleast_1d", "aten.atleast_2d", "aten.atleast_3d")
def reshape_rule(op: Operator) -> Signature | None:
    """Builds the rule of a reshape from the two shapes only, whatever its arguments."""
    if op.argument("dtype") is not None:
        return _view_as_dtype(op)
    if not op.inputs or len(op.outputs) != 1:
        return None
    source, target, sizes, whole = shared_factors(op.inputs[0].shape, op.outputs[0].shape)
    like = [target] * (len(op.inputs) - 1)  # view_as and reshape_as only use the shape of their second input
    return Signature((source, *like), (target,), sizes, frozenset(), frozenset(whole), (frozenset({0}),), _reshape)


def _reshape(local: Local) -> Ref:
    """Emits the local reshape. A local piece may have other strides than the whole, so a view may become a copy."""
    return local.call(torch.reshape, local.inputs[0], local.local_shape(True, 0))


def shared_factors(
    source: Sequence[int], target: Sequence[int]
) -> tuple[TensorFactors, TensorFactors, dict[str, int], set[str]]:
    """Finds the factors that two shapes of one number of elements share, in row-major order.

    Walks both shapes from the left and takes the greatest common divisor of what is left of the two current dims as a
    shared factor. Where they have none, what is left of the group of dims with equal products is whole.

    Returns:
        The factors of each dim of either shape, the size of each factor, and the factors that cannot be split: those
        that are not the first of every dim they are in.

    >>> source, target, sizes, whole = shared_factors((2, 6), (2, 3, 2))
    >>> source, target, sorted(whole)
    ((('f0',), ('f1', 'f2')), (('f0',), ('f1',), ('f2',)), ['f2'])
    """
    walk = _Walk(source, target)
    if 0 in source or 0 in target:
        walk.match_leading_dims()
    else:
        while walk.group():
            pass
    inputs, outputs = tuple(map(tuple, walk.factors[0])), tuple(map(tuple, walk.factors[1]))
    minor = {factor for dim in (*inputs, *outputs) for factor in dim[1:]}
    return inputs, outputs, walk.sizes, walk.whole | minor


class _Walk:
    """Two shapes, a position in each, and the factors found so far."""

    def __init__(self, source: Sequence[int], target: Sequence[int]):
        self.shapes = (source, target)
        self.factors: tuple[list[list[str]], list[list[str]]] = ([[] for _ in source], [[] for _ in target])
        self.sizes: dict[str, int] = {}
        self.whole: set[str] = set()
        self.at = [0, 0]

    def new(self, size: int, *sides: int, whole: bool = False) -> None:
        """Adds a factor, the next of the current dim of each side."""
        name = f"f{len(self.sizes)}"
        self.sizes[name] = size
        if whole:
            self.whole.add(name)
        for side in sides:
            self.factors[side][self.at[side]].append(name)

    def match_leading_dims(self) -> None:
        """Shares equal leading dims of empty tensors; the rest is whole."""
        source, target = self.shapes
        while min(len(source) - self.at[0], len(target) - self.at[1]) and source[self.at[0]] == target[self.at[1]]:
            self.new(source[self.at[0]], 0, 1)
            self.at = [self.at[0] + 1, self.at[1] + 1]
        for side in (0, 1):
            for position in range(self.at[side], len(self.shapes[side])):
                self.at[side] = position
                self.new(self.shapes[side][position], side, whole=True)

    def group(self) -> bool:
        """Collects the next dims of equal product. Returns whether there were any."""
        self._skip_ones()
        if all(self.at[side] == len(self.shapes[side]) for side in (0, 1)):
            return False
        left = [self.shapes[side][self.at[side]] for side in (0, 1)]
        while True:
            common = math.gcd(*left)
            if common == 1:
                self._tangle(left)
                return True
            self.new(common, 0, 1)
            left = [size // common for size in left]
            if left == [1, 1]:
                self.at = [self.at[0] + 1, self.at[1] + 1]
                return True
            for side in (0, 1):
                if left[side] == 1:
                    left[side] = self._advance(side)

    def _skip_ones(self) -> None:
        """Skips dims of size 1. Those that face each other become one factor, the others carry none."""
        while True:
            ones = [self.at[s] < len(self.shapes[s]) and self.shapes[s][self.at[s]] == 1 for s in (0, 1)]
            if not any(ones):
                return
            if all(ones):
                self.new(1, 0, 1)
            self.at = [self.at[side] + ones[side] for side in (0, 1)]

    def _advance(self, side: int) -> int:
        """Advances to the side's next dim above 1, within a group that is not complete. Returns its size."""
        self.at[side] += 1
        while self.shapes[side][self.at[side]] == 1:
            self.at[side] += 1
        return self.shapes[side][self.at[side]]

    def _tangle(self, left: list[int]) -> None:
        """Keeps a group's rest whole on both sides. Its dims have no common factor."""
        left = list(left)
        for side in (0, 1):
            self.new(left[side], side, whole=True)
        while left[0] != left[1]:
            side = 0 if left[0] < left[1] else 1
            size = self._advance(side)
            self.new(size, side, whole=True)
            left[side] *= size
        self.at = [self.at[0] + 1, self.at[1] + 1]


def _view_as_dtype(op: Operator) -> Signature | None:
    """Builds the rule of ``view(dtype)``. Elements of the same size keep their dims, others change the last one."""
    dims = names(len(op.inputs[0].shape))
    if op.inputs[0].dtype.itemsize == op.argument("dtype").itemsize:
        return parse(notation([dims], [dims]), op)
    if not dims:
        return None
    return parse(notation([[*dims[:-1], "in!"]], [[*dims[:-1], "out!"]]), op)


# -- one dim more or less ---------------------------------------------------------------------------------------------


@rule_for("aten.squeeze")
def _squeeze_rule(op: Operator) -> Signature | None:
    gone = set(_squeezed(op))
    dims = names(len(op.inputs[0].shape))
    inputs = [with_dims(dims, {d: "1" for d in gone})]
    return parse(notation(inputs, [[d for i, d in enumerate(dims) if i not in gone]]), op, None, ONE, _squeeze)


def _squeezed(op: Operator) -> tuple[int, ...]:
    """Returns the dims of size 1 that a squeeze removes: those of the whole tensor, not those of a local piece."""
    shape = op.inputs[0].shape
    asked = op.argument("dim")
    dims = range(len(shape)) if asked is None else [asked] if isinstance(asked, int) else asked
    return tuple(sorted({d % len(shape) for d in dims if shape and shape[d] == 1}))


def _squeeze(local: Local) -> Ref:
    return local.call(torch.squeeze, local.inputs[0], _squeezed(local.op))


@rule_for("aten.unsqueeze")
def _unsqueeze_rule(op: Operator) -> Signature | None:
    dims = names(len(op.inputs[0].shape))
    dim = op.argument("dim") % (len(dims) + 1)
    return parse(notation([dims], [[*dims[:dim], "1", *dims[dim:]]]), op, None, ONE)


# -- the same dims in another order -----------------------------------------------------------------------------------


@rule_for("aten.transpose", "aten.t", "aten.permute", "aten.movedim", "aten.moveaxis", "aten.swapaxes", "aten.swapdims")
@rule_for("aten.numpy_T", "aten.mT", "aten.matrix_H", "aten.mH", "aten.adjoint")
def _permutation_rule(op: Operator) -> Signature | None:
    """Derives the order from a tensor whose dims all have different sizes."""
    dims = names(len(op.inputs[0].shape))
    probe = torch.empty([i + 2 for i in range(len(dims))], device="meta")
    moved = op.target(probe, *op.args[1:], **op.kwargs)
    return parse(notation([dims], [[dims[size - 2] for size in moved.shape]]), op, None, ONE)


# -- the same elements several times ----------------------------------------------------------------------------------


@rule_for("aten.expand", "aten.expand_as", "aten.broadcast_to", "aten.broadcast_tensors")
def _expand_rule(op: Operator) -> Signature | None:
    if not op.inputs:
        return None
    several = op.name == "aten.broadcast_tensors"
    linear = [range(len(op.inputs))] if several else ONE  # expand_as only looks at its second input's shape
    dots = [["..."]] * len(op.inputs)
    return parse(notation(dots, dots[: len(op.outputs)]), op, None, linear, _expand)


def _expand(local: Local) -> list[Ref]:
    values = local.inputs[: len(local.op.outputs)]
    return [local.call(torch.broadcast_to, v, local.local_shape(True, i)) for i, v in enumerate(values)]


@rule_for("aten.repeat", "aten.tile")
def _repeat_rule(op: Operator) -> Signature | None:
    """Builds the rule of a repeat: a repeated dim is ``(repeats dim)``. The repeats can be split, the dim itself cannot."""
    shape, counts = _repeats(op)
    inputs: list[str] = []
    outputs: list[str] = []
    sizes: dict[str, int] = {}
    own = len(shape) - len(op.inputs[0].shape)
    for i, (size, count) in enumerate(zip(shape, counts)):
        name, many = f"d{i}", f"r{i}"
        if count == 1:
            inputs.append(name)
            outputs.append(name if i >= own else "1")  # a new dim of size 1 has nothing to split
        elif size == 1 or count == 0:
            inputs.append("1" if size == 1 else f"{name}!")
            outputs.append(many)
        else:
            sizes |= {name: size, many: count}
            inputs.append(f"{name}!")
            outputs.append(f"({many} {name})")
    return parse(notation([inputs[own:]], [outputs]), op, sizes, ONE, _tile)


def _repeats(op: Operator) -> tuple[list[int], list[int]]:
    """Returns the input's shape and the repeats. Both get a leading 1 for every dim that only the other has."""
    shape = list(op.inputs[0].shape)
    counts = list(op.argument("repeats" if op.name == "aten.repeat" else "dims"))
    ndim = max(len(shape), len(counts))
    return [1] * (ndim - len(shape)) + shape, [1] * (ndim - len(counts)) + counts


def _tile(local: Local) -> Ref:
    shape, counts = _repeats(local.op)
    own: list[Any] = [
        1 if count == 1 else of_sizes(lambda now, size=size: now // size, local.local_size(True, 0, dim)) if size else 0
        for dim, (size, count) in enumerate(zip(shape, counts))
    ]
    return local.call(torch.tile, local.inputs[0], own)


@rule_for("aten.repeat_interleave")
def _repeat_interleave_rule(op: Operator) -> Signature | None:
    """Builds ``s -> (s repeats)``, so the repeated dim may be split. Repeats given as a tensor have no rule."""
    count = op.argument("repeats")
    if not isinstance(count, int) or len(op.inputs) != 1:
        return None
    shape, dim = op.inputs[0].shape, op.argument("dim")
    dims = names(len(shape))
    sizes = {"r": count} | {name: size for name, size in zip(dims, shape)}
    if dim is not None:
        dim %= max(len(dims), 1)
        inputs, outputs = dims, with_dims(dims, {dim: f"(d{dim} r!)"})
    else:
        first = next((i for i, size in enumerate(shape) if size > 1), 0)
        inputs = [name if i == first else f"{name}!" for i, name in enumerate(dims)]
        outputs = [f"({' '.join(dims)} r!)"]
    if not dims or math.prod(op.outputs[0].shape) == 0:
        return None
    if dim is not None and shape[dim] == 1:
        inputs, outputs = with_dims(dims, {dim: "1"}), with_dims(dims, {dim: "r!"})
    return parse(notation([inputs], [outputs]), op, sizes, ONE, _repeat_interleave)


def _repeat_interleave(local: Local) -> Ref:
    return local.call(torch.repeat_interleave, local.inputs[0], local.op.argument("repeats"), local.op.argument("dim"))


# -- complex numbers as pairs -----------------------------------------------------------------------------------------


@rule_for("aten.view_as_real", "aten.view_as_complex")
def _complex_rule(op: Operator) -> Signature | None:
    if op.name == "aten.view_as_real":
        return parse("... -> ... pair!", op, None, (), _real_pairs)
    return parse("... pair! -> ...", op)


def _real_pairs(local: Local) -> tuple[Ref, ...]:
    return (local.call(real_pairs, local.inputs[0]),) if some_piece_is_empty(local) else local.same_call()


def real_pairs(x: Tensor) -> Tensor:
    """Computes ``view_as_real``, whose backward refuses some gradients of empty tensors."""
    return torch.view_as_real(x) if x.numel() else torch.stack((x.real, x.imag), -1)


# -- traits ------------------------------------------------------------------------------------------------------------------

TRAITS = {
    Traits("view", linear=True, reshapes=True): "view _unsafe_view view_as",
    Traits("view", linear=True, reshapes=True, entry_differs=True): "unflatten",
    Traits("copy", lies_in_order, linear=True, reshapes=True): "reshape reshape_as ravel",
    Traits("copy", lies_in_order, linear=True, reshapes=True, entry_differs=True): "flatten",
    Traits("view", linear=True): "_reshape_alias unsqueeze atleast_1d atleast_2d atleast_3d view_as_real view_as_complex",
    Traits("view", linear=True, entry_differs=True): "squeeze",
    Traits("view", linear=True, reorders=True): "transpose t adjoint mT mH numpy_T matrix_H moveaxis swapaxes swapdims",
    Traits("view", linear=True, reorders=True, entry_differs=True): "permute movedim",
    Traits("view", backward="summed", linear=True): "expand_as broadcast_to broadcast_tensors",
    Traits("view", backward="summed", linear=True, entry_differs=True): "expand",
    Traits("copy", linear=True, entry_differs=True): "repeat tile",
    Traits("index"): "repeat_interleave",
}
register_traits(TRAITS)
