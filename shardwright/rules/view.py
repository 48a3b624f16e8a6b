"""Rules of operators that move elements without computing: reshapes, transposes, slices, concatenations, padding.

A dim that is cut, joined, shifted or padded is whole; every other dim is free. Reshapes are compound factors, so that a
split of the more significant part survives: ``(B, S, H*D) -> (B, S, H, D)`` is ``b s (h d) -> b s h d``.

All are linear, so they run on pending sums; only padding with a value other than zero is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shardwright.ir.instructions import Ref
from shardwright.ir.operator import Operator
from shardwright.ir.signature import Signature, TensorFactors
from shardwright.rules.lowering import Local
from shardwright.rules.notation import parse
from shardwright.rules.pieces import (
    guarded_same_call,
    names,
    notation,
    of_sizes,
    some_piece_is_empty,
    start,
    with_dims,
)
from shardwright.rules.registry import rule_for
from shardwright.rules.traits import Traits, lies_in_order, register_traits

ONE = ((0,),)  # linear in the first input alone


# -- reshapes ---------------------------------------------------------------------------------------------------------


@rule_for("aten.view", "aten.reshape", "aten._unsafe_view", "aten._reshape_alias", "aten.flatten", "aten.unflatten")
@rule_for("aten.ravel", "aten.view_as", "aten.reshape_as", "aten.atleast_1d", "aten.atleast_2d", "aten.atleast_3d")
def reshape_rule(op: Operator) -> Signature | None:
    """The rule of a reshape, whatever its arguments: the two shapes say it all."""
    if op.argument("dtype") is not None:
        return _view_as_dtype(op)
    if not op.inputs or len(op.outputs) != 1:
        return None
    source, target, sizes, whole = shared_factors(op.inputs[0].shape, op.outputs[0].shape)
    like = [target] * (len(op.inputs) - 1)  # of view_as and reshape_as only the shape is used
    return Signature((source, *like), (target,), sizes, frozenset(), frozenset(whole), (frozenset({0}),), _reshape)


def _reshape(local: Local) -> Ref:
    """A local piece may have other strides than the whole, so what was a view may have to copy."""
    return local.call(torch.reshape, local.inputs[0], local.local_shape(True, 0))


def shared_factors(
    source: Sequence[int], target: Sequence[int]
) -> tuple[TensorFactors, TensorFactors, dict[str, int], set[str]]:
    """The factors that two shapes of the same number of elements share, in row-major order.

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
        """A new factor, the next of the current dim of each side."""
        name = f"f{len(self.sizes)}"
        self.sizes[name] = size
        if whole:
            self.whole.add(name)
        for side in sides:
            self.factors[side][self.at[side]].append(name)

    def match_leading_dims(self) -> None:
        """For empty tensors: equal leading dims are shared, the rest is whole."""
        source, target = self.shapes
        while min(len(source) - self.at[0], len(target) - self.at[1]) and source[self.at[0]] == target[self.at[1]]:
            self.new(source[self.at[0]], 0, 1)
            self.at = [self.at[0] + 1, self.at[1] + 1]
        for side in (0, 1):
            for position in range(self.at[side], len(self.shapes[side])):
                self.at[side] = position
                self.new(self.shapes[side][position], side, whole=True)

    def group(self) -> bool:
        """The next dims of equal product; whether there were any."""
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
        """Dims of size 1: those that face each other are one factor, the others carry none."""
        while True:
            ones = [self.at[s] < len(self.shapes[s]) and self.shapes[s][self.at[s]] == 1 for s in (0, 1)]
            if not any(ones):
                return
            if all(ones):
                self.new(1, 0, 1)
            self.at = [self.at[side] + ones[side] for side in (0, 1)]

    def _advance(self, side: int) -> int:
        """Goes to the side's next dim above 1, within a group that is not complete; its size."""
        self.at[side] += 1
        while self.shapes[side][self.at[side]] == 1:
            self.at[side] += 1
        return self.shapes[side][self.at[side]]

    def _tangle(self, left: list[int]) -> None:
        """The rest of a group whose dims have no common factor: whole on both sides."""
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
    """``view(dtype)``: elements of the same size keep their dims, others change the last one."""
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
    """The dims of size 1 that a squeeze removes: those of the whole tensor, not those of a local piece."""
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
    """The order is read off a tensor whose dims all have different sizes."""
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
    """A repeated dim is ``(repeats dim)``; the repeats can be split, the dim itself cannot."""
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
    """The input's shape and the repeats, both with a leading 1 for every dim that only the other has."""
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
    """``s -> (s repeats)``, so the repeated dim may be split. Repeats given as a tensor have no rule."""
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


# -- joining ----------------------------------------------------------------------------------------------------------


@rule_for("aten.cat", "aten.concat", "aten.concatenate", "aten.hstack", "aten.vstack", "aten.row_stack", "aten.dstack")
def _cat_rule(op: Operator) -> Signature | None:
    """The joined dim is whole in every input and in the output."""
    ndim = len(op.outputs[0].shape)
    dim = _joined_dim(op)
    out = names(ndim)
    inputs = []
    for n, meta in enumerate(op.inputs):
        own = with_dims(out, {dim: f"i{n}!"})
        if len(meta.shape) < ndim:
            own = _aligned(op, own, len(meta.shape), n)
        inputs.append(own)
    reached = {name for own in inputs for name in own}
    outputs = [name if name in reached else "1" for name in out]
    return parse(notation(inputs, [with_dims(outputs, {dim: "joined!"})]), op, None, _all_inputs(op))


def _all_inputs(op: Operator) -> list[range]:
    """Linear in all inputs together, unless some are cast."""
    return [range(len(op.inputs))] if len({meta.dtype for meta in op.inputs}) == 1 else []


def _joined_dim(op: Operator) -> int:
    ndim = len(op.outputs[0].shape)
    if op.name == "aten.hstack":
        return min(1, ndim - 1)
    if op.name in ("aten.vstack", "aten.row_stack"):
        return 0
    if op.name == "aten.dstack":
        return 2
    return int(op.argument("dim", 0)) % ndim


def _aligned(op: Operator, dims: list[str], ndim: int, index: int) -> list[str]:
    """The dims of an input with fewer dims than the output."""
    if op.name in ("aten.vstack", "aten.row_stack"):
        return dims[1:] if ndim else []
    if op.name == "aten.dstack":
        return [dims[1]] if ndim == 1 else dims[:ndim]
    return [f"i{index}!"] * ndim  # an empty tensor of one dim, which cat skips; a scalar, which hstack makes one


@rule_for("aten.stack")
def _stack_rule(op: Operator) -> Signature | None:
    dims = names(len(op.inputs[0].shape))
    dim = op.argument("dim", 0) % (len(dims) + 1)
    outputs = [[*dims[:dim], "stacked!", *dims[dim:]]]
    return parse(notation([dims] * len(op.inputs), outputs), op, None, _all_inputs(op))


@rule_for("aten.meshgrid")
def _meshgrid_rule(op: Operator) -> Signature | None:
    """Every input is one dim of every output."""
    dims = names(len(op.inputs))
    out = [dims[1], dims[0], *dims[2:]] if op.argument("indexing") == "xy" and len(dims) > 1 else dims
    inputs = [[name] if meta.shape else [] for name, meta in zip(dims, op.inputs)]
    return parse(notation(inputs, [out] * len(op.outputs)), op)


# -- cutting ----------------------------------------------------------------------------------------------------------


@rule_for("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.tensor_split", "aten.hsplit", "aten.vsplit")
@rule_for("aten.dsplit", "aten.unsafe_split", "aten.unsafe_split_with_sizes", "aten.unsafe_chunk")
def _split_rule(op: Operator) -> Signature | None:
    """The dim that is cut is whole in the input and in every part."""
    if len(op.inputs) != 1:
        return None
    dims = names(len(op.inputs[0].shape))
    dim = _cut_dim(op, len(dims))
    parts = [with_dims(dims, {dim: f"part{n}!"}) for n in range(len(op.outputs))]
    return parse(notation([with_dims(dims, {dim: "cut!"})], parts), op, None, ONE)


def _cut_dim(op: Operator, ndim: int) -> int:
    fixed = {"aten.hsplit": min(1, ndim - 1), "aten.vsplit": 0, "aten.dsplit": 2}
    return fixed[op.name] if op.name in fixed else op.argument("dim", 0) % ndim


@rule_for("aten.unbind")
def _unbind_rule(op: Operator) -> Signature | None:
    dims = names(len(op.inputs[0].shape))
    dim = op.argument("dim", 0) % len(dims)
    rest = [d for i, d in enumerate(dims) if i != dim]
    return parse(notation([with_dims(dims, {dim: "cut!"})], [rest] * len(op.outputs)), op, None, ONE)


@rule_for("aten.select")
def _select_rule(op: Operator) -> Signature | None:
    if len(op.inputs) != 1:
        return None
    dims = names(len(op.inputs[0].shape))
    dim = op.argument("dim") % len(dims)
    rest = [d for i, d in enumerate(dims) if i != dim]
    return parse(notation([with_dims(dims, {dim: "cut!"})], [rest]), op, None, ONE)


@rule_for("aten.slice", "aten.narrow")
def _slice_rule(op: Operator) -> Signature | None:
    """A dim that is kept whole is free, one that is cut is whole."""
    if len(op.inputs) != 1:
        return None
    dims = names(len(op.inputs[0].shape))
    dim = op.argument("dim", 0) % len(dims)
    if op.outputs[0].shape == op.inputs[0].shape:
        return parse(notation([dims], [dims]), op, None, ONE, _keep_all)
    inputs, outputs = with_dims(dims, {dim: "cut!"}), with_dims(dims, {dim: "part!"})
    return parse(notation([inputs], [outputs]), op, None, ONE)


def _keep_all(local: Local) -> Ref:
    """Bounds that keep the whole dim would cut, or miss, a local piece of it."""
    return local.call(torch.ops.aten.alias.default, local.inputs[0])


@rule_for("aten.unfold")
def _unfold_rule(op: Operator) -> Signature | None:
    dims = names(len(op.inputs[0].shape))
    if not dims:
        return None
    dim = op.argument("dimension") % len(dims)
    outputs = [*with_dims(dims, {dim: "windows!"}), "window!"]
    return parse(notation([with_dims(dims, {dim: "cut!"})], [outputs]), op, None, ONE)


@rule_for("aten.diagonal", "aten.diagonal_copy")
def _diagonal_rule(op: Operator) -> Signature | None:
    dims = names(len(op.inputs[0].shape))
    first, second = op.argument("dim1", 0) % len(dims), op.argument("dim2", 1) % len(dims)
    inputs = with_dims(dims, {first: "row!", second: "column!"})
    rest = [d for i, d in enumerate(dims) if i not in (first, second)]
    return parse(notation([inputs], [[*rest, "diagonal!"]]), op, None, ONE)


@rule_for("aten.diag_embed")
def _diag_embed_rule(op: Operator) -> Signature | None:
    ndim = len(op.outputs[0].shape)
    first, second = op.argument("dim1", -2) % ndim, op.argument("dim2", -1) % ndim
    rest = names(ndim - 2)
    outputs = list(rest)
    for dim, name in sorted([(first, "row!"), (second, "column!")]):
        outputs.insert(dim, name)
    return parse(notation([[*rest, "diagonal!"]], [outputs]), op, None, ONE)


# -- writing a part back ----------------------------------------------------------------------------------------------


@rule_for("aten.slice_scatter", "aten.select_scatter", "aten.diagonal_scatter")
def _scatter_rule(op: Operator) -> Signature | None:
    """The dims that are written to are whole, in both tensors."""
    if len(op.inputs) != 2:
        return None
    dims = names(len(op.inputs[0].shape))
    if op.name == "aten.diagonal_scatter":
        written = [op.argument("dim1", 0) % len(dims), op.argument("dim2", 1) % len(dims)]
        part = [d for i, d in enumerate(dims) if i not in written] + ["part!"]
    else:
        written = [op.argument("dim", 0) % len(dims)]
        keep = ["part!"] if op.name == "aten.slice_scatter" else []
        part = [*dims[: written[0]], *keep, *dims[written[0] + 1 :]]
    whole = with_dims(dims, {d: f"d{d}!" for d in written})
    return parse(notation([whole, part], [whole]), op, None, _all_inputs(op))


# -- the same shape, elements moved or dropped ------------------------------------------------------------------------


@rule_for("aten.flip", "aten.fliplr", "aten.flipud", "aten.roll", "aten.rot90")
def _moved_rule(op: Operator) -> Signature | None:
    """The dims along which elements move are whole."""
    ndim = len(op.inputs[0].shape)
    moved = _moved_dims(op, ndim)
    inputs = with_dims(names(ndim), {d: f"in{d}!" for d in moved})
    outputs = with_dims(names(ndim), {d: f"out{d}!" for d in moved})
    return parse(notation([inputs], [outputs]), op, None, ONE)


def _moved_dims(op: Operator, ndim: int) -> set[int]:
    fixed: dict[str, Callable[[], Sequence[int]]] = {
        "aten.fliplr": lambda: [1],
        "aten.flipud": lambda: [0],
        "aten.rot90": lambda: op.argument("dims", [0, 1]),
    }
    dims = fixed[op.name]() if op.name in fixed else op.argument("dims")
    return {d % ndim for d in dims or range(ndim)} if ndim else set()  # a roll without dims rolls all as one


@rule_for("aten.tril", "aten.triu")
def _triangle_rule(op: Operator) -> Signature | None:
    """Every dim is free: a local block has its own diagonal."""
    return parse("... -> ...", op, None, ONE, _triangle)


def _triangle(local: Local) -> tuple[Ref, ...]:
    last = len(local.op.outputs[0].shape) - 1
    row, column = start(local, True, 0, last - 1), start(local, True, 0, last)
    if row == 0 and column == 0:
        return local.same_call()
    diagonal = local.op.argument("diagonal", 0)
    return local.same_call(diagonal=of_sizes(lambda r, c: diagonal + r - c, row, column))


@rule_for("aten.pad", "aten.constant_pad_nd")
def _pad_rule(op: Operator) -> Signature | None:
    """Padded dims are whole."""
    ndim, pad = len(op.inputs[0].shape), op.argument("pad")
    mode = op.argument("mode", "constant") if op.name == "aten.pad" else "constant"
    padded = {ndim - 1 - i for i in range(len(pad) // 2) if pad[2 * i] or pad[2 * i + 1]}
    inputs = with_dims(names(ndim), {d: f"in{d}!" for d in padded})
    outputs = with_dims(names(ndim), {d: f"out{d}!" for d in padded})
    linear = ONE if mode != "constant" or not op.argument("value") else ()
    return parse(notation([inputs], [outputs]), op, None, linear, None if mode == "constant" else guarded_same_call)


# -- complex numbers as pairs -----------------------------------------------------------------------------------------


@rule_for("aten.view_as_real", "aten.view_as_complex")
def _complex_rule(op: Operator) -> Signature | None:
    if op.name == "aten.view_as_real":
        return parse("... -> ... pair!", op, None, (), _real_pairs)
    return parse("... pair! -> ...", op)


def _real_pairs(local: Local) -> tuple[Ref, ...]:
    return (local.call(real_pairs, local.inputs[0]),) if some_piece_is_empty(local) else local.same_call()


def real_pairs(x: Tensor) -> Tensor:
    """``view_as_real``, whose backward refuses some gradients of nothing."""
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
    Traits("view", backward="summed", linear=True): "expand_as broadcast_to broadcast_tensors meshgrid",
    Traits("view", backward="summed", linear=True, entry_differs=True): "expand",
    Traits("view", backward="in zeros", linear=True): """
        select narrow split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk hsplit vsplit dsplit unfold
        diagonal
    """,
    Traits("view", backward="in zeros", linear=True, entry_differs=True): "slice split tensor_split unbind",
    Traits("index"): "repeat_interleave",
    Traits("copy", linear=True): """
        cat concat concatenate stack vstack hstack dstack row_stack constant_pad_nd fliplr flipud rot90 tril triu diag_embed
        diagonal_copy diagonal_scatter
    """,
    Traits("copy", linear=True, entry_differs=True): "repeat tile flip roll select_scatter slice_scatter",
    Traits("copy", entry_differs=True): "pad",  # by reflection it is no sum of its input alone
}
register_traits(TRAITS)
