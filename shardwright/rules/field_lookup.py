"""Lookup by field: an embedding in which each column of indices reads its own range of rows (``manual_split``).

The table is cut by rows and the indices by their last dim, both by the same axes, so that a rank reads its own rows only:
no rank needs another's, and nothing is summed. It is exact as long as the indices stay within the ranges; one that does not
is an error, on the CPU with a message, elsewhere the device's own.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from shardwright.errors import ShardwrightError
from shardwright.ir.instructions import Ref
from shardwright.ir.operator import Operator
from shardwright.ir.signature import Signature
from shardwright.rules.in_range import check_in_range
from shardwright.rules.index import embedding_of_rows, local_row
from shardwright.rules.lowering import Local
from shardwright.rules.notation import parse
from shardwright.rules.pieces import of_sizes, start
from shardwright.rules.registry import rule_for


def lookup_by_field(table: Tensor, indices: Tensor, padding: int = -1) -> Tensor:
    """Looks up rows of a table, as ``torch.embedding`` does.

    >>> lookup_by_field(torch.tensor([[1.0], [2.0]]), torch.tensor([1, 0])).flatten()
    tensor([2., 1.])
    """
    return torch.embedding(table, indices, padding)


@rule_for("lookup_by_field")
def _rule(op: Operator) -> Signature:
    """Splits rows and fields together. Otherwise a split of rows gives zeros for rows of other ranks, which are then summed."""
    return replace(parse("rows~ e, ... f -> ... f e", op, None, (), _lookup), tied=frozenset({"rows", "f"}))


def _lookup(local: Local) -> tuple[Ref, ...]:
    rows, fields = local.axes_of("rows"), local.axes_of("f")
    if not rows:
        return local.same_call()
    table, indices = local.inputs
    first, count = start(local, False, 0, 0), local.local_size(False, 0, 0)
    padding = of_sizes(local_row, local.op.args[2] if len(local.op.args) > 2 else -1, first, count)
    if rows == fields:
        return (local.call(rows_of_piece, table, indices, first, padding, local.op.inputs[0].shape[0]),)
    assert not set(rows) & set(fields), "rows and fields share axes but are not split alike"
    meta, whole = local.op.outputs[0], local.output_layouts[0]
    found = local.call(embedding_of_rows, table, indices, first, padding, local.op.inputs[0].shape[0])
    return (local.move(found, meta.shape, whole.with_partial(rows), whole, (), meta.dtype),)


def rows_of_piece(table: Tensor, indices: Tensor, first: int, padding: int = -1, size: int | None = None) -> Tensor:
    """Looks up rows in a piece of a table, by indices into the whole table.

    Args:
        table: local rows ``first, first + 1, ...``.
        indices: row numbers of the whole table.
        first: number of the piece's first row.
        padding: the local row that gets no gradient, or -1.
        size: number of rows of the whole table.

    Raises:
        IndexRangeError: an index of no row.
        ShardwrightError: an index into another piece.

    >>> rows_of_piece(torch.tensor([[1.0], [2.0]]), torch.tensor([8, 7]), 7).flatten()
    tensor([2., 1.])
    """
    rows, own = table.shape[0], indices - first if first else indices
    if table.device.type == "cpu" and own.numel():
        low, high = (int(i) + first for i in own.aminmax())
        if size is not None and (low < 0 or high >= size):
            check_in_range(indices, size, "row")
        if low < first or high >= first + rows:
            raise ShardwrightError(
                f"manual_split: these fields read rows {first} to {first + rows - 1}, but the indices have {low} to {high}; "
                "give each slice the rows of its fields, or split the rows only: indices (1, ..., 1)"
            )
    return torch.embedding(table, own, padding)
