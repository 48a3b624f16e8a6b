"""Rules of operators that read or write at indices.

A dim that is indexed is whole in the tensor that is read, and free in the indices: each rank looks its own indices up
in the whole dim. An embedding's table may be split along its rows too: each rank answers for the rows it holds.

Embeddings whose gradient is sparse or scaled by frequency, and ``put``, have no rule, so they run whole. Operators whose output
size depends on values (``nonzero``, boolean masks as indices) are refused when they are captured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shardwright.ir.instructions import PerRank, Ref
from shardwright.ir.operator import Operator, Slot
from shardwright.ir.signature import Signature
from shardwright.rules.in_range import check_in_range
from shardwright.rules.lowering import Local
from shardwright.rules.notation import parse
from shardwright.rules.pieces import local_arguments, names, notation, of_sizes, start, with_dims
from shardwright.rules.registry import rule_for
from shardwright.rules.traits import Traits, register_traits

# -- embedding --------------------------------------------------------------------------------------------------------


@rule_for("aten.embedding")
def _embedding_rule(op: Operator) -> Signature | None:
    """Splits rows: the output is then a partial sum, to which each rank adds the rows it holds."""
    if op.argument("scale_grad_by_freq") or op.argument("sparse") or op.inputs[0].numel == 0:
        return None
    return parse("rows+ e, ... -> ... e", op, None, (), _embedding)


def _embedding(local: Local) -> tuple[Ref, ...]:
    if "rows" not in local.split:
        return local.same_call()
    weight, indices = local.inputs
    first, rows = start(local, False, 0, 0), local.local_size(False, 0, 0)
    padding = of_sizes(local_row, local.op.argument("padding_idx", -1), first, rows)
    return (local.call(embedding_of_rows, weight, indices, first, padding, local.op.inputs[0].shape[0]),)


def local_row(row: int, first: int, rows: int) -> int:
    """Returns the local number of a global row, -1 for a row of another rank."""
    return row - first if first <= row < first + rows else -1


def embedding_of_rows(weight: Tensor, indices: Tensor, first: int, padding: int = -1, size: int | None = None) -> Tensor:
    """Looks up rows in a piece of a table. Indices of other rows give zeros.

    Args:
        weight: rows ``first, first + 1, ...`` of the table; possibly none.
        indices: row numbers of the whole table.
        first: number of the piece's first row.
        padding: the local row that gets no gradient, or -1.
        size: number of rows of the whole table, for the check of the indices.

    Raises:
        IndexRangeError: an index of no row.

    >>> embedding_of_rows(torch.ones(2, 1), torch.tensor([0, 1, 2, 3]), 2).flatten()
    tensor([0., 0., 1., 1.])
    """
    if size is not None:
        check_in_range(indices, size, "row")
    rows = weight.shape[0]
    if rows == 0:  # zeros that depend on the weight, so that its gradient is zeros and not nothing
        return weight.new_zeros(*indices.shape, 0) @ weight
    own = indices - first if first else indices
    elsewhere = (own < 0) | (own >= rows)
    found = torch.embedding(weight, own.masked_fill(elsewhere, 0), padding)
    return found.masked_fill_(elsewhere.unsqueeze(-1), 0)


# -- along one dim ----------------------------------------------------------------------------------------------------


@rule_for("aten.gather", "aten.take_along_dim")
def _gather_rule(op: Operator) -> Signature | None:
    """Builds the rule of ``out[i][j] = x[i][index[i][j]]``: the dim is whole in ``x`` and free in ``index``."""
    source, index = op.inputs[0].shape, op.inputs[1].shape
    if op.argument("dim") is None:
        return _take_rule(op)
    if not source or len(source) != len(index) or op.argument("sparse_grad"):
        return None
    dim = op.argument("dim") % len(source)
    out = names(len(index), "i")
    along = [_line(out[d], s, i, op.name) for d, (s, i) in enumerate(zip(source, index))]
    along[dim] = ("x!", out[dim], out[dim])
    reads, indices, outputs = zip(*along)
    return parse(notation([reads, indices], [outputs]), op)


def _line(name: str, source: int, index: int, operator: str) -> tuple[str, str, str]:
    """Returns the factors of a dim that is not gathered along: in the source, the indices and the output."""
    if source == index:
        return name, name, name
    if operator == "aten.gather":  # reads only the first positions of the source
        return f"{name}x!", f"{name}!", f"{name}!"
    return ("1" if source == 1 else name), ("1" if index == 1 else name), name


@rule_for("aten.take")
def _take_rule(op: Operator) -> Signature | None:
    """Keeps the tensor whole, since the indices count in the flattened tensor."""
    whole = [f"x{i}!" for i in range(len(op.inputs[0].shape))]
    index, out = op.inputs[1].shape, op.outputs[0].shape
    if index == out:
        return parse(notation([whole, ["..."]], [["..."]]), op)
    return parse(notation([whole, [f"i{d}!" for d in range(len(index))]], [["flat!"]]), op)


@rule_for("aten.index_select")
def _index_select_rule(op: Operator) -> Signature | None:
    dims = names(len(op.inputs[0].shape))
    if not dims or not op.inputs[1].shape:
        return None
    dim = op.argument("dim") % len(dims)
    return parse(notation([with_dims(dims, {dim: "x!"}), ["i"]], [with_dims(dims, {dim: "i"})]), op)


@rule_for("aten.scatter", "aten.scatter_reduce")
def _scatter_rule(op: Operator) -> Signature | None:
    """Keeps the dim that is written along whole, and dims in which the sizes differ."""
    return _scattered(op, "!")


@rule_for("aten.scatter_add")
def _scatter_add_rule(op: Operator) -> Signature | None:
    """Splits what is added: each rank adds its part, which leaves a partial sum."""
    same = op.inputs[1].shape == op.inputs[2].shape
    return _scattered(op, "+" if same else "!", ((0, 2),), _added)


def _scattered(op: Operator, mark: str, linear: Any = (), lowering: Any = None) -> Signature | None:
    """Builds the rule of a scatter. ``mark`` is the mark of the dim along which is written, in index and source."""
    shapes = [meta.shape for meta in op.inputs]
    ndim = len(shapes[0])
    if not ndim or any(len(shape) != ndim for shape in shapes):
        return None
    dim = op.argument("dim") % ndim
    free = [d != dim and len({shape[d] for shape in shapes}) == 1 for d in range(ndim)]
    inputs = [[f"d{d}" if free[d] else f"t{n}_{d}!" for d in range(ndim)] for n in range(len(shapes))]
    if mark == "+":
        inputs[1][dim] = inputs[2][dim] = "written+"
    return parse(notation(inputs, [inputs[0]]), op, None, linear, lowering)


def _added(local: Local) -> tuple[Ref, ...]:
    """Emits the sum. Of the ranks that add different parts, the first adds to the tensor itself, the others to zeros."""
    axes = local.axes_of("written")
    if not axes:
        return local.same_call()
    inputs = list(local.inputs)
    elsewhere = PerRank(lambda rank: local.mesh.group_of(rank, axes)[0] != rank)
    inputs[0] = local.call(zeros_if, inputs[0], elsewhere)
    args, kwargs = local_arguments(local, inputs)
    return (local.call(local.op.target, *args, **kwargs),)


def zeros_if(x: Tensor, condition: bool) -> Tensor:
    """Returns ``x``, or zeros through which it gets a gradient of zeros.

    >>> zeros_if(torch.ones(2), True)
    tensor([0., 0.])
    """
    return x.masked_fill(torch.ones((), dtype=torch.bool, device=x.device), 0) if condition else x


@rule_for("aten.index_add")
def _index_add_rule(op: Operator) -> Signature | None:
    """Splits what is added: each rank adds its part, which leaves a partial sum."""
    one = not op.inputs[1].shape or len(op.inputs[2].shape) != len(op.inputs[0].shape)
    return _written_at(op, "!") if one else _written_at(op, "+", ((0, 2),), _added)


@rule_for("aten.index_copy", "aten.index_reduce", "aten.index_fill")
def _index_write_rule(op: Operator) -> Signature | None:
    """Keeps the dim that is written along whole everywhere."""
    return _written_at(op, "!")


def _written_at(op: Operator, mark: str, linear: Any = (), lowering: Any = None) -> Signature | None:
    """Builds the rule of a write at indices of one dim. ``mark`` is the mark of that dim in index and source."""
    dims = names(len(op.inputs[0].shape))
    if not dims:
        return None
    dim = op.argument("dim") % len(dims)
    summed = mark == "+"
    whole, written = with_dims(dims, {dim: "x!"}), with_dims(dims, {dim: f"written{mark}"})
    inputs = [whole, ["written+" if summed else "index!"] * len(op.inputs[1].shape)]
    for meta in op.inputs[2:]:
        if len(meta.shape) not in (0, len(dims)):
            return None
        inputs.append(written if meta.shape else [])
    return parse(notation(inputs, [whole]), op, None, linear, lowering)


# -- several index tensors --------------------------------------------------------------------------------------------


@rule_for("aten.index", "aten._unsafe_index")
def _index_rule(op: Operator) -> Signature | None:
    """Builds the rule of ``x[:, i, j]``: indexed dims are whole; those of the indices, and all others, are free."""
    plan = _IndexPlan.of(op)
    if plan is None:
        return None
    return parse(notation([plan.source, *plan.indices], [plan.result]), op)


@rule_for("aten.index_put", "aten._unsafe_index_put")
def _index_put_rule(op: Operator) -> Signature | None:
    """Builds the rule of ``x[:, i, j] = v``: indexed dims are whole, all others are free."""
    plan = _IndexPlan.of(op)
    if plan is None:
        return None
    wide = [f"{name}!" if name in plan.looked_up else name for name in plan.result]
    values = op.inputs[-1].shape
    if len(values) > len(wide):
        return None
    given = wide[len(wide) - len(values) :]
    sizes = plan.sizes(op)
    lined = [name if size == sizes[name.rstrip("!")] else "1" for name, size in zip(given, values)]
    indices = [
        [f"{name}!" if size == sizes[name] else "1" for name, size in zip(index, meta.shape)]
        for index, meta in zip(plan.indices, op.inputs[1:])
    ]
    return parse(notation([plan.source, *indices, lined], [plan.source]), op)


class _IndexPlan:
    """Factors of ``x[indices]``.

    Args:
        source: factors of ``x``: the indexed dims whole.
        indices: factors of each index tensor; they broadcast against each other.
        looked_up: factors of all index tensors together.
        result: factors of ``x[indices]``. The looked-up dims stand where the indexed ones stood, or first if those are apart.
    """

    def __init__(self, source: list[str], indices: list[list[str]], looked_up: list[str], result: list[str]):
        self.source, self.indices, self.looked_up, self.result = source, indices, looked_up, result

    @staticmethod
    def of(op: Operator) -> _IndexPlan | None:
        """Returns the factors of a call; ``None`` for masks."""
        given = list(op.argument("indices"))
        slots = [item.index for item in given if isinstance(item, Slot)]
        if not slots or any(op.inputs[i].dtype in (torch.bool, torch.uint8) for i in slots):
            return None
        dims = names(len(op.inputs[0].shape))
        indexed = [d for d, item in enumerate(given) if isinstance(item, Slot)]
        looked_up = names(max(len(op.inputs[i].shape) for i in slots), "i")
        indices = [looked_up[len(looked_up) - len(op.inputs[i].shape) :] for i in slots]
        together = indexed == list(range(indexed[0], indexed[-1] + 1))
        rest = [name for d, name in enumerate(dims) if d not in indexed]
        at = indexed[0] if together else 0
        result = [*rest[:at], *looked_up, *rest[at:]]
        return _IndexPlan(with_dims(dims, {d: f"x{d}!" for d in indexed}), indices, looked_up, result)

    def sizes(self, op: Operator) -> dict[str, int]:
        """Returns the sizes of the result's factors, for operators that do not return it."""
        sizes = dict(zip(self.source, op.inputs[0].shape))
        for names_, meta in zip(self.indices, op.inputs[1:]):
            for name, size in zip(names_, meta.shape):
                sizes[name] = size if sizes.get(name, 1) == 1 else sizes[name]
        return sizes


# -- looking up values ------------------------------------------------------------------------------------------------


@rule_for("aten.one_hot")
def _one_hot_rule(op: Operator) -> Signature | None:
    if op.argument("num_classes", -1) < 1:  # its size is found from the values
        return None
    return parse("... -> ... classes!", op)


@rule_for("aten.bucketize", "aten.searchsorted")
def _search_rule(op: Operator) -> Signature | None:
    """Splits the values; what they are looked up in is whole along the search."""
    if isinstance(op.argument("self"), Slot):
        at = op.argument("self").index
        values = names(len(op.inputs[at].shape))
    else:
        at, values = None, []
    inputs: list[Any] = []
    for position, meta in enumerate(op.inputs):
        if position == at:
            inputs.append(values)
        elif len(meta.shape) == 1:
            inputs.append(["sorted!"])
        else:
            inputs.append([*values[:-1], "sorted!"])
    return parse(notation(inputs, [values]), op, None, (), _search)


def _search(local: Local) -> tuple[Ref, ...]:
    """Emits the search on contiguous pieces, since the operator warns about others."""
    if not local.split or not isinstance(local.op.argument("self"), Slot):
        return local.same_call()
    at, inputs = local.op.argument("self").index, list(local.inputs)
    inputs[at] = local.call(torch.ops.aten.contiguous.default, inputs[at])
    args, kwargs = local_arguments(local, inputs)
    return (local.call(local.op.target, *args, **kwargs),)


@rule_for("aten.isin")
def _isin_rule(op: Operator) -> Signature | None:
    """Splits the elements; each is looked up in all the test elements."""
    if not isinstance(op.args[0], Slot):
        return None
    inputs = [["..."], *([f"t{d}!" for d in range(len(meta.shape))] for meta in op.inputs[1:])]
    return parse(notation(inputs, [["..."]]), op)


# -- traits ------------------------------------------------------------------------------------------------------------------

TRAITS = {
    Traits("index", looks_up=True, embeds=True, new_gradients=True, user_order=(1, 0)): "embedding",
    Traits("index", looks_up=True): "index_select",
    Traits("index", looks_up=True, entry_differs=True): "gather index",
    Traits("index", entry_differs=True): "index_put scatter",
    Traits("index", sums_in_place=True): "index_add scatter_add",
    Traits("index"): """
        _unsafe_index _unsafe_index_put index_copy index_fill index_reduce scatter_reduce take take_along_dim
    """,
    Traits("index", has_gradient=False): "one_hot bucketize searchsorted isin",
}
register_traits(TRAITS)
