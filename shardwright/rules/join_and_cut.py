"""Rules of operators that join, cut, pad or partly write tensors, or move elements.

A dim that is cut, joined, shifted or padded is whole; every other dim is free. All are linear, so they run on pending sums;
only padding with a value other than zero is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shardwright.ir.instructions import Ref
from shardwright.ir.operator import Operator
from shardwright.ir.signature import Signature
from shardwright.rules.lowering import Local
from shardwright.rules.notation import parse
from shardwright.rules.pieces import (
    guarded_same_call,
    names,
    notation,
    of_sizes,
    start,
    with_dims,
)
from shardwright.rules.registry import rule_for
from shardwright.rules.traits import Traits, register_traits
from shardwright.rules.view import ONE

# -- joining ----------------------------------------------------------------------------------------------------------


@rule_for("aten.cat", "aten.concat", "aten.concatenate", "aten.hstack", "aten.vstack", "aten.row_stack", "aten.dstack")
def _cat_rule(op: Operator) -> Signature | None:
    """Keeps the joined dim whole in every input and in the output."""
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
    """Returns all inputs as jointly linear, unless some are cast."""
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
    """Aligns the dims of an input that has fewer than the output."""
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
    """Makes every input one dim of every output."""
    dims = names(len(op.inputs))
    out = [dims[1], dims[0], *dims[2:]] if op.argument("indexing") == "xy" and len(dims) > 1 else dims
    inputs = [[name] if meta.shape else [] for name, meta in zip(dims, op.inputs)]
    return parse(notation(inputs, [out] * len(op.outputs)), op)


# -- cutting ----------------------------------------------------------------------------------------------------------


@rule_for("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.tensor_split", "aten.hsplit", "aten.vsplit")
@rule_for("aten.dsplit", "aten.unsafe_split", "aten.unsafe_split_with_sizes", "aten.unsafe_chunk")
def _split_rule(op: Operator) -> Signature | None:
    """Keeps the dim that is cut whole in the input and in every part."""
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
    """Keeps dims that are cut whole; dims that are taken whole are free."""
    if len(op.inputs) != 1:
        return None
    dims = names(len(op.inputs[0].shape))
    dim = op.argument("dim", 0) % len(dims)
    if op.outputs[0].shape == op.inputs[0].shape:
        return parse(notation([dims], [dims]), op, None, ONE, _keep_all)
    inputs, outputs = with_dims(dims, {dim: "cut!"}), with_dims(dims, {dim: "part!"})
    return parse(notation([inputs], [outputs]), op, None, ONE)


def takes_part(op: Operator, dim: int) -> bool:
    """Tells whether a call takes a part of a dim."""
    is_slice = op.name in ("aten.slice", "aten.narrow") and len(op.inputs) == 1
    return is_slice and op.argument("dim", 0) % len(op.inputs[0].shape) == dim and op.outputs[0].shape != op.inputs[0].shape


def cut_in_pieces(op: Operator, pieces: Sequence[int]) -> tuple[Signature, tuple[int, ...]] | None:
    """Makes the rule of a slice whose dim is cut into pieces, which give what they have of it.

    The cut dim is the factor ``cut`` of the input and ``part`` of the output, which the same axes split.

    Args:
        op: a slice or a narrow.
        pieces: sizes of the pieces.

    Returns:
        The rule, and what each piece gives; ``None`` for a slice with steps.
    """
    dims = names(len(op.inputs[0].shape))
    dim = op.argument("dim", 0) % len(dims)
    size, length = op.inputs[0].shape[dim], op.outputs[0].shape[dim]
    first = op.argument("start") or 0
    if op.argument("step", 1) != 1:
        return None
    first = min(max(first + size if first < 0 else first, 0), size)
    ends = [sum(pieces[: at + 1]) for at in range(len(pieces))]
    own = tuple(max(0, min(end, first + length) - max(end - n, first)) for end, n in zip(ends, pieces, strict=True))

    def narrowed(local: Local) -> Ref:
        at, count = start(local, False, 0, dim), local.local_size(False, 0, dim)
        begin = of_sizes(lambda a, n: min(max(first - a, 0), n), at, count)
        return local.call(torch.narrow, local.inputs[0], dim, begin, local.local_size(True, 0, dim))

    inputs, outputs = with_dims(dims, {dim: "cut~"}), with_dims(dims, {dim: "part"})
    made = parse(notation([inputs], [outputs]), op, None, ONE, narrowed)
    return replace(made, tied=frozenset({"cut", "part"})), own


def _keep_all(local: Local) -> Ref:
    """Replaces bounds that keep the whole dim. They would cut, or miss, a local piece of it."""
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
    """Keeps the dims that are written to whole, in both tensors."""
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
    is_complex = op.outputs[0].dtype.is_complex and op.name != "aten.diagonal_scatter"
    lower = _scatter_of_reals if is_complex else None
    return parse(notation([whole, part], [whole]), op, None, _all_inputs(op), lower)


def _scatter_of_reals(local: Local) -> tuple[Ref, ...]:
    """Emits a scatter of complex numbers as one of pairs, as torch cannot differentiate the first."""
    op = local.op
    rest = [op.argument("dim", 0) % len(op.inputs[0].shape)]
    for name, default in (("start", None), ("end", None), ("step", 1)) if op.name == "aten.slice_scatter" else (("index", 0),):
        rest.append(op.argument(name, default))
    return (local.call(scatter_pairs, op.target, *local.inputs, *rest),)


def scatter_pairs(function: Callable[..., Tensor], whole: Tensor, part: Tensor, *where: Any) -> Tensor:
    """Runs a scatter along one dim on complex tensors, by their real and imaginary parts.

    >>> whole, part = torch.zeros(3, dtype=torch.complex64), torch.ones(1, dtype=torch.complex64)
    >>> scatter_pairs(torch.slice_scatter, whole, part, 0, 1, 2, 1)
    tensor([0.+0.j, 1.+0.j, 0.+0.j])
    """
    real = [torch.view_as_real(x.to(whole.dtype).resolve_conj()) for x in (whole, part)]
    return torch.view_as_complex(function(*real, *where))


# -- the same shape, elements moved or dropped ------------------------------------------------------------------------


@rule_for("aten.flip", "aten.fliplr", "aten.flipud", "aten.roll", "aten.rot90")
def _moved_rule(op: Operator) -> Signature | None:
    """Keeps the dims along which elements move whole."""
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
    """Splits every dim: a local block has its own diagonal."""
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
    """Keeps padded dims whole."""
    ndim, pad = len(op.inputs[0].shape), op.argument("pad")
    mode = op.argument("mode", "constant") if op.name == "aten.pad" else "constant"
    padded = {ndim - 1 - i for i in range(len(pad) // 2) if pad[2 * i] or pad[2 * i + 1]}
    inputs = with_dims(names(ndim), {d: f"in{d}!" for d in padded})
    outputs = with_dims(names(ndim), {d: f"out{d}!" for d in padded})
    linear = ONE if mode != "constant" or not op.argument("value") else ()
    return parse(notation([inputs], [outputs]), op, None, linear, None if mode == "constant" else guarded_same_call)


# -- traits ------------------------------------------------------------------------------------------------------------------

TRAITS = {
    Traits("view", backward="in zeros", linear=True): """
        select narrow split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk hsplit vsplit dsplit unfold
        diagonal
    """,
    Traits("view", backward="in zeros", linear=True, entry_differs=True): "slice split tensor_split unbind",
    Traits("view", backward="summed", linear=True): "meshgrid",
    Traits("copy", linear=True): """
        cat concat concatenate stack vstack hstack dstack row_stack constant_pad_nd fliplr flipud rot90 tril triu diag_embed
        diagonal_copy diagonal_scatter
    """,
    Traits("copy", linear=True, entry_differs=True): "flip roll select_scatter slice_scatter",
    Traits("copy", entry_differs=True): "pad",  # padding by reflection reads its input more than once
}
register_traits(TRAITS)
