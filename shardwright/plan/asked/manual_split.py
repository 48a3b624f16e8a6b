"""Attributes that take an operator's layouts as the user gives them.

``manual_split``: the rows of a table are cut as given; ``self_define_shard``: an operator runs on pieces as given;
``skip_redistribution``: nothing moves before or after a reshape.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from shardwright.base.operators import ALIAS
from shardwright.errors import Problems
from shardwright.ir.graph import Node, where_of
from shardwright.ir.layout import Layout
from shardwright.ir.operator import Operator, Slot
from shardwright.ir.plan import Plan
from shardwright.ir.step import any_communicates
from shardwright.plan.asked.strategies import check_layout
from shardwright.redistribute.steps import redistribution
from shardwright.rules.field_lookup import lookup_by_field
from shardwright.rules.self_defined import SelfDefined
from shardwright.rules.traits import traits_of

# -- manual_split -----------------------------------------------------------------------------------------------------


def split_by_hand(node: Node, rows: tuple[int, ...], table: Any, indices: Any, devices: int, problems: Problems) -> Node:
    """Makes a lookup whose table has slices of these rows.

    Where the last dim of the indices is cut into as many slices, each reads its own rows and nothing is summed.

    Args:
        node: the lookup.
        rows: of each slice.
        table, indices: positions of these inputs.
        devices: number of ranks.
        problems: collects what is wrong.
    """
    what, before = f"{where_of(node)}: manual_split {rows}", len(problems.lines)
    if not traits_of(node.op).embeds or node.op.argument("sparse") or node.op.argument("scale_grad_by_freq"):
        problems.add(f"{what} is for plain lookups of rows (Gather along dim 0, Embedding); remove it")
        return node
    whole = node.op.inputs[0].shape[0]
    if sum(rows) != whole:
        problems.add(f"{what} has {sum(rows)} rows in all, but the table has {whole}; make them add up to {whole}")
    entries = _lookup_layouts(node, len(rows), table, indices, devices, what, problems)
    if len(problems.lines) > before or entries is None:
        return node
    table, indices = entries
    table = Layout.of(table.mesh, table.bound, (), [rows, *table.sizes[1:]])
    mark = node.mark or node.region
    assert mark is not None
    told = replace(mark, in_strategy=(table, indices), parameter_plan=None)
    node = replace(node, mark=told, mark_positions=(0, 1), mark_count=2)
    if not indices.bound[-1]:
        return node
    padding = node.op.argument("padding_idx", -1)
    args = (Slot(0), Slot(1), padding)
    return replace(node, op=Operator(lookup_by_field, args, {}, node.op.inputs, node.op.outputs))


def _lookup_layouts(
    node: Node, slices: int, table: Any, indices: Any, devices: int, what: str, problems: Problems
) -> tuple[Layout, Layout] | None:
    """Returns the layouts of table and indices, given as Layouts or as slice counts."""
    ndim = len(node.op.inputs[1].shape)
    if isinstance(table, tuple) and isinstance(indices, tuple):
        return _lookup_counts(slices, table, indices, ndim, devices, what, problems)
    if table is None and isinstance(indices, Layout) and indices.dims is not None and indices.ndim and indices.bound[-1]:
        table = Layout.of(indices.mesh, [indices.bound[-1], ()])  # of a module: the rows as the fields
    for name, entry, dims in (("table", table, 2), ("indices", indices, ndim)):
        if not isinstance(entry, Layout):
            problems.add(f"{what}: the {name} has no strategy ({entry!r}); give table and indices one, (({slices}, 1), "
                         f"({', '.join(['1'] * (ndim - 1) + [str(slices)])}))")  # fmt: skip
            return None
        if not check_layout(entry, dims, devices, f"{what} {name}", problems):
            return None
    count = table.mesh.count(table.bound[0])
    if count != slices:
        problems.add(f"{what} has {slices} slices, but the strategy cuts the rows into {count}; give {count} numbers")
    if not ndim:
        problems.add(f"{what}: the indices are a single number; use the uniform split, without the attribute")
    elif indices.bound[-1] not in ((), table.bound[0]):
        problems.add(f"{what}: the last dim of the indices is {indices.short()} and the rows are {table.short()}; split both "
                     "by the same axes, or the indices' last dim by none")  # fmt: skip
    return table, indices


def _lookup_counts(
    slices: int, table: Sequence[int], indices: Sequence[int], ndim: int, devices: int, what: str, problems: Problems
) -> tuple[Layout, Layout] | None:
    good = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in (*table, *indices))
    if not good or len(table) != 2 or len(indices) != ndim or not ndim:
        problems.add(f"{what}: the strategy {(table, indices)} does not fit a table of 2 dims and indices of {ndim}; give one "
                     "positive count a dim")  # fmt: skip
        return None
    if table[0] != slices:
        problems.add(f"{what} has {slices} slices, but the strategy cuts the rows into {table[0]}; give {table[0]} numbers")
        return None
    if indices[-1] not in (1, slices):
        problems.add(f"{what}: the last dim of the indices is cut into {indices[-1]}; cut it into {slices}, or into 1")
        return None
    sizes = (*indices[:-1], *table)
    used = math.prod(sizes)
    if devices % used:
        problems.add(f"{what}: {(table, indices)} needs {used} devices, which does not divide {devices}; use fewer slices")
        return None
    names = (*(f"batch{i}" for i in range(ndim - 1)), "rows", "columns", "spare")
    layout = Layout((*sizes, devices // used), names)
    fields = "rows" if indices[-1] > 1 else "None"
    return layout("rows", "columns"), layout(*names[: ndim - 1], fields)


# -- self_define_shard ------------------------------------------------------------------------------------------------


def self_defined(node: Node, devices: int, problems: Problems) -> Node:
    """Makes an operator that runs on local pieces in the given layouts; the user answers for its results."""
    mark, op, before = node.mark, node.op, len(problems.lines)
    what = f"{where_of(node)}: self_define_shard"
    if mark is None:
        problems.add(f"{what} is for one operator, but this function has several; mark the one that is meant")
        return node
    told = mark.in_strategy if isinstance(mark.in_strategy, tuple) else ()
    inputs: list[Any] = [told[p] if p is not None and p < len(told) else None for p in node.mark_positions]
    outputs: list[Any] = list(mark.out_strategy or ())
    if len(outputs) != len(op.outputs) or not all(isinstance(e, Layout) for e in (*inputs, *outputs)):
        problems.add(f"{what} needs a Layout for each of its {len(inputs)} inputs and {len(op.outputs)} outputs; give them to "
                     "shard(in_strategy, out_strategy)")  # fmt: skip
        return node
    metas = (*op.inputs, *op.outputs)
    for entry, meta in zip((*inputs, *outputs), metas):
        check_layout(entry, len(meta.shape), devices, what, problems)
    if len(problems.lines) > before:
        return node
    working = {a for layout in inputs for a in layout.split_axes}
    for i, layout in enumerate(outputs):
        if {*layout.split_axes} != working:
            odd = ", ".join(sorted(working ^ {*layout.split_axes}))
            problems.add(f"{what}: {odd} splits inputs or output {i} but not both, so that ranks would hold sums or copies "
                         "that nobody can tell apart; split both, or neither")  # fmt: skip
            return node
    op = Operator(SelfDefined(op.target), op.args, op.kwargs, op.inputs, op.outputs, op.returns_sequence)
    return replace(node, op=op, mark=replace(mark, in_strategy=tuple(inputs), out_strategy=tuple(outputs), exact=True),
                   mark_positions=tuple(range(len(inputs))), mark_count=len(inputs))  # fmt: skip


# -- skip_redistribution ----------------------------------------------------------------------------------------------


def check_in_place(plan: Plan) -> None:
    """Refuses a plan that moves something before or after a reshape with ``skip_redistribution``.

    Raises:
        StrategyError: names the moves.
    """
    asked = [n for n in plan.graph.nodes if _skips(n)] if plan.mode != "data_parallel" else []
    if not asked:
        return
    problems = Problems()
    for node in asked:
        if not traits_of(node.op).reshapes:
            problems.add(f"{where_of(node)}: skip_redistribution is for reshapes; remove it")
            continue
        for side, steps in _moves_at(plan, node):
            problems.add(f"{where_of(node)}: skip_redistribution, but {side} it stands {steps}; lay the neighbours out alike, "
                         "in a way that the reshape keeps (split its outer dims), or remove the attribute")  # fmt: skip
    problems.raise_if_any("the operator attributes cannot be followed")


def _skips(node: Node) -> bool:
    mark = node.mark or node.region
    return mark is not None and mark.attributes.get("skip_redistribution") is True and node.op.target is not ALIAS


def _moves_at(plan: Plan, node: Node) -> Iterator[tuple[str, str]]:
    """Yields the redistributions next to an operator, other than slices."""
    made = {v: layout for n in plan.graph.nodes for v, layout in zip(n.outputs, plan.choices[n.name].outputs)}
    made = {**plan.input_layouts, **made}
    choice = plan.choices[node.name]
    edges = [("before", v, layout, axes) for v, layout, axes in zip(node.inputs, choice.inputs, choice.partial_gradient)]
    for reader in plan.graph.nodes:
        read = plan.choices[reader.name]
        edges += [("after", v, layout, axes) for v, layout, axes in zip(reader.inputs, read.inputs, read.partial_gradient)
                  if v in node.outputs]  # fmt: skip
    for side, value, layout, axes in edges:
        shape = plan.graph.metas[value].shape
        steps = redistribution(made[value].normal(shape), layout.normal(shape), shape, axes).forward
        if any_communicates(steps):
            yield side, " + ".join(map(str, steps))
