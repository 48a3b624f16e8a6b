"""Candidates: the ways an operator may run, and which of them fits its decided neighbours.

Candidates are compared by, in this order:

1. bytes that the edges by which it was reached redistribute, forward;
2. bytes that its other decided edges redistribute, forward;
3. the share of its work that the busiest rank does: the more ranks share it the better;
4. bytes of its own sums, and of gradients: on all these edges, and of parameters;
5. split dims of its inputs that it cuts in another way;
6. the order of the table.

Where a criterion leaves one candidate the next ones are not computed, so that most operators price few edges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardwright.ir.choice import Choice, make_choice
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.ir.operator import Operator, TensorMeta
from shardwright.ir.signature import Signature
from shardwright.plan.choose.edges import backward_elements, forward_elements, is_slice, least_elements
from shardwright.plan.choose.tables import (
    PARTIAL,
    REPLICATED,
    ChoiceTable,
    Codes,
    choices_of,
    layout_of,
    local_sizes,
    symbols_of,
)
from shardwright.rules.traits import traits_of

Array = np.ndarray[Any, Any]

# A table of more rows is too slow to look at: the first axes of the mesh vary, the others stay idle.
MOST_ROWS = 20_000
# What differs by rounding errors is the same.
_SAME = 1 + 1e-9


@dataclass(frozen=True)
class Link:
    """An edge between an operator that is to be decided and a decided one.

    Args:
        slot: index among the operator's inputs or outputs.
        is_input: which of the two.
        other: the layout of the value, or that of its reader.
        gradient: of an output, the axes over which the gradient is partial at the reader.
        needs_grad: whether a gradient comes back over the edge.
        reached: whether the operator was reached by it.
        fixed: a parameter whose layout the user gave: read as it is, if the operator can.
    """

    slot: int
    is_input: bool
    other: Layout
    gradient: tuple[str, ...]
    needs_grad: bool
    reached: bool
    fixed: bool = False


@dataclass
class Column:
    """Layouts of one tensor in all candidates: the distinct ones, and for each candidate which of them."""

    meta: TensorMeta
    layouts: list[Layout]
    index: Array

    def add(self, layout: Layout) -> None:
        """Adds the layout of one more candidate."""
        if layout not in self.layouts:
            self.layouts.append(layout)
        self.index = np.append(self.index, self.layouts.index(layout))


class Candidates:
    """Every candidate of an operator on a mesh; ``extra`` are choices that the table may not have."""

    def __init__(
        self, op: Operator, signature: Signature, mesh: Mesh, needs: Sequence[bool], extra: Sequence[Choice] = ()
    ) -> None:
        self.op, self.signature, self.needs, self.extra = op, signature, needs, tuple(extra)
        self.table = table = _reducing(_table(op, signature, mesh))
        self.inputs = [_column(code, meta, mesh) for code, meta in zip(table.inputs, op.inputs)]
        done = [np.where(code == PARTIAL, np.int8(REPLICATED), code) for code in table.outputs]
        self.outputs = [_column(code, meta, mesh) for code, meta in zip(done, op.outputs)]
        computed = [_column(code, meta, mesh) for code, meta in zip(table.computed, op.outputs)]
        self.sums = np.zeros(len(table))
        for column in computed:
            prices = [_sum_bytes(layout, column.meta) for layout in column.layouts]
            self.sums += np.array(prices)[column.index]
        self.share = table.fraction
        if traits_of(op).looks_up:  # how much there is to pick from is no work
            self.share = local_sizes(done[0], op.outputs[0].shape, mesh.sizes) / max(1, op.outputs[0].numel)
        for choice in self.extra:
            self._add(choice)

    def _add(self, choice: Choice) -> None:
        for columns, layouts in ((self.inputs, choice.inputs), (self.outputs, choice.outputs)):
            for column, layout in zip(columns, layouts):
                column.add(layout.without_partial().normal(column.meta.shape))
        sums = sum(_sum_bytes(layout, meta) for layout, meta in zip(choice.computed, self.op.outputs))
        self.sums = np.append(self.sums, sums)
        self.share = np.append(self.share, share_of(choice, self.op, self.signature))

    def __len__(self) -> int:
        return len(self.share)

    def choice(self, row: int) -> Choice:
        """Builds the choice of one candidate, which does its own sums."""
        if row >= len(self.table):
            return self.extra[row - len(self.table)]
        return reducing(self.op, self.signature, self.table.choice(row, self.needs), self.needs)

    def column(self, link: Link) -> Column:
        return self.inputs[link.slot] if link.is_input else self.outputs[link.slot]

    # -- the criteria -----------------------------------------------------------------------------------------------

    def best(self, links: Sequence[Link], parameters: Sequence[int]) -> Choice:
        """Returns the candidate that fits the links best.

        Args:
            links: the decided edges.
            parameters: the inputs that nobody has placed yet and that need a gradient.
        """
        rows = np.arange(len(self))
        for link in links:
            if link.fixed:
                column = self.column(link)
                same = np.array([layout == link.other for layout in column.layouts])[column.index[rows]]
                rows = rows[same] if same.any() else rows
        reached = [link for link in links if link.reached]
        others = [link for link in links if not link.reached]
        rows = self._least_forward(rows, reached)
        rows = self._least_forward(rows, others)
        rows = rows[self.share[rows] <= self.share[rows].min() * _SAME]
        if len(rows) > 1:
            rows = _least(rows, lambda row: self.sums[row] + self._gradient_bytes(row, links, parameters))
        if len(rows) > 1:
            rows = _least(rows, lambda row: self._recut(row, links))
        return self.choice(int(rows[0]))

    def _least_forward(self, rows: Array, links: Sequence[Link]) -> Array:
        """Finds the rows of least forward redistribution; computes exact prices only where bounds do not decide."""
        if len(rows) == 1 or not links:
            return rows
        local = np.ones(len(rows), dtype=bool)
        for link in links:
            column = self.column(link)
            local &= np.array([is_slice(*_ends(link, layout)) for layout in column.layouts])[column.index[rows]]
        if local.any():
            return rows[local]  # type: ignore[no-any-return]
        bound = np.zeros(len(rows))
        for link in links:
            column = self.column(link)
            least = [_bytes(least_elements, link, layout, column.meta) for layout in column.layouts]
            bound += np.array(least)[column.index[rows]]
        exact = np.full(len(rows), math.inf)
        for at in np.argsort(bound, kind="stable"):
            if bound[at] > exact.min() * _SAME:
                break
            exact[at] = sum(self._forward_bytes(int(rows[at]), link) for link in links)
        return rows[exact <= exact.min() * _SAME]  # type: ignore[no-any-return]

    def _forward_bytes(self, row: int, link: Link) -> float:
        column = self.column(link)
        return _bytes(forward_elements, link, column.layouts[column.index[row]], column.meta)

    def _gradient_bytes(self, row: int, links: Sequence[Link], parameters: Sequence[int]) -> float:
        choice = self.choice(row)
        total = 0
        for link in links:
            if not link.needs_grad:
                continue
            column = self.column(link)
            source, target = _ends(link, column.layouts[column.index[row]])
            gradient = choice.partial_gradient[link.slot] if link.is_input else link.gradient
            total += backward_elements(source, target, column.meta.shape, gradient) * column.meta.dtype.itemsize
        for slot in parameters:
            layout, meta = choice.inputs[slot].without_partial(), self.op.inputs[slot]
            total += backward_elements(layout, layout, meta.shape, choice.partial_gradient[slot]) * meta.dtype.itemsize
        return total

    def _recut(self, row: int, links: Sequence[Link]) -> int:
        count = 0
        for link in links:
            if link.is_input:
                column = self.column(link)
                own = column.layouts[column.index[row]]
                count += sum(bool(was) and was != now for was, now in zip(link.other.bound, own.bound))
        return count


def _ends(link: Link, own: Layout) -> tuple[Layout, Layout]:
    return (link.other, own) if link.is_input else (own, link.other)


def _bytes(price: Callable[[Layout, Layout, tuple[int, ...]], float], link: Link, own: Layout, meta: TensorMeta) -> float:
    return price(*_ends(link, own), meta.shape) * meta.dtype.itemsize


def _least(rows: Array, price: Callable[[int], float]) -> Array:
    prices = np.array([price(int(row)) for row in rows], dtype=float)
    return rows[prices <= prices.min() * _SAME]  # type: ignore[no-any-return]


# -- tables ---------------------------------------------------------------------------------------------------------------


def _table(op: Operator, signature: Signature, mesh: Mesh) -> ChoiceTable:
    symbols = symbols_of(op, signature)
    axes, rows = 0, 1
    while axes < len(mesh.axes) and rows * len(symbols) <= MOST_ROWS:
        axes, rows = axes + 1, rows * len(symbols)
    if axes == len(mesh.axes):
        return choices_of(op, signature, mesh)
    return choices_of(op, signature, mesh, (symbols[0],) * len(mesh.axes), range(axes))


def _reducing(table: ChoiceTable) -> ChoiceTable:
    """Removes the rows that scatter a sum or read pending ones: like a configured operator, one does its own sums."""
    others = [i for i, symbol in enumerate(table.symbols) if symbol.scatter is not None or symbol.pending is not None]
    plain = np.asarray(~np.isin(table.rows, others).any(axis=1))
    return table.restricted(plain) if others else table


def _column(codes: Codes, meta: TensorMeta, mesh: Mesh) -> Column:
    radix = 16 ** np.arange(codes.shape[1], dtype=np.int64)
    _, first, index = np.unique((codes.astype(np.int64) + 2) @ radix, return_index=True, return_inverse=True)
    layouts = [layout_of(codes[row].tolist(), len(meta.shape), mesh).normal(meta.shape) for row in first]
    return Column(meta, layouts, index.reshape(-1))


def _sum_bytes(layout: Layout, meta: TensorMeta) -> int:
    """Counts the bytes of the all-reduce of an operator's result."""
    done = layout.without_partial()
    return forward_elements(layout, done, meta.shape) * meta.dtype.itemsize if layout.partial else 0


def reducing(op: Operator, signature: Signature, choice: Choice, needs: Sequence[bool]) -> Choice:
    """Returns the choice with its sums done by the operator itself, by an all-reduce.

    Args:
        op: the operator.
        signature: its rule's factors.
        choice: the choice.
        needs: which inputs need gradients.
    """
    if not any(layout.partial for layout in choice.outputs):
        return choice
    done = tuple(layout.without_partial() for layout in choice.computed)
    return make_choice(op, signature, choice.mesh, choice.split, needs, None, done)


def share_of(choice: Choice, op: Operator, signature: Signature) -> float:
    """Computes the share of an operator's work that the busiest rank does."""
    of_output = {f for dim in signature.outputs[0] for f in dim} if traits_of(op).looks_up else None
    share = 1.0
    for factor, (axes, pieces) in choice.split.items():
        if of_output is None or factor in of_output:
            size = max(1, signature.sizes[factor])
            share *= (max(pieces) if pieces else -(-size // choice.mesh.count(axes))) / size
    return share
