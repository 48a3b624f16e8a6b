"""Operators that the plan of units has beside the graph's: shares of sums, and pieces of whole values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from shardwright.errors import Problems
from shardwright.ir.choice import Choice, make_choice
from shardwright.ir.graph import Node
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.ir.operator import Operator, Slot, TensorMeta
from shardwright.ir.plan import Plan
from shardwright.ir.signature import Signature, Split
from shardwright.pipeline.refusals import NO_RULE, SAME_FOR_SLICES, not_followed, refusal
from shardwright.pipeline.slices import ROW, Rows, SlicedInput, rows_operator
from shardwright.pipeline.stages import free_nodes, is_received
from shardwright.pipeline.sums import alias, emit_alias, emit_share, linear_group, share
from shardwright.pipeline.units import (
    NEVER_MEET_SLICES,
    SLICE,
    Cut,
    grid_of_rows,
    unit_axes,
    unit_dims,
    unit_mesh,
    unit_pieces,
    with_units,
)
from shardwright.plan.choose.follow import propose
from shardwright.rules.attention import attends_causally, in_slices
from shardwright.rules.join_and_cut import cut_in_pieces, takes_part
from shardwright.rules.pointwise import adds_constant
from shardwright.rules.registry import signature_of


class Refused(Exception):
    """An operator cannot run slice by slice, so that none that follows can."""


class UnitNodes:
    """Collects the operators of a plan on units and ranks.

    Args:
        plan: on ranks.
        cut: where units cut values.
        problems: gets the operators that would have to wait for all units.
        met: gets their names.
    """

    def __init__(self, plan: Plan, cut: Cut, problems: Problems, met: list[str]):
        self.plan, self.graph, self.cut, self.problems, self.met = plan, plan.graph, cut, problems, met
        self.alone = unit_mesh(Mesh((), ()), cut.micro, cut.slices)
        self.axes = tuple(axis for axis in self.alone.axes if self.alone.axis_size(axis) > 1)  # over which sums are pending
        self.free = free_nodes(plan.graph)
        self.choices: dict[str, Choice] = {}
        self.nodes: list[Node] = []
        self.signatures = dict(plan.signatures)
        self.needs_grad = set(plan.graph.needs_grad)
        self.where: dict[str, Layout] = {}  # settled layouts of values, on meshes with units
        self.parts: dict[str, dict[str, Split]] = {}  # by node, factors that are cut as another one is

    def over_units(self, mesh: Mesh) -> Mesh:
        return unit_mesh(mesh, self.cut.micro, self.cut.slices)

    def lifted(self, layout: Layout) -> Layout:
        """Returns a layout over the ranks of every unit."""
        return Layout.of(self.over_units(layout.mesh), layout.bound, layout.partial, layout.sizes)

    def split_like(self, layout: Layout, value: str, shape: Sequence[int]) -> Layout:
        """Returns a lifted layout, cut into units as a value is.

        Args:
            layout: the layout.
            value: the value.
            shape: of the value.
        """
        cut = self.cut.layouts.get(value)
        return layout if cut is None else with_units(layout.with_partial(self.cut.sums(value)), cut, shape).normal(shape)

    def refuse(self, node: Node, why: str, dim: int | None = None) -> None:
        """Refuses an operator.

        Args:
            node: the operator.
            why: the reason.
            dim: the dim of an input that it needs whole, if that is the reason.

        Raises:
            Refused: slices are cut, so that what follows would be refused too.
        """
        self.met.append(node.name)
        if self.cut.slices > 1:
            for each in self.cut.ends if why == SAME_FOR_SLICES else ():
                self.problems.add(not_followed(each))
            if why != SAME_FOR_SLICES or not self.cut.ends:
                why = NO_RULE if signature_of(node.op) is None else why
                self.problems.add(f"{node.where} {why}; {NEVER_MEET_SLICES}")
            raise Refused
        self.problems.add(refusal(self.graph, node, why, dim))

    def insert(self, like: Node, name: str, op: Operator, value: str, signature: Signature, made: Choice) -> str:
        """Adds an operator of one value, and returns what it makes.

        Args:
            like: the operator that reads or makes it.
            name: of the operator and its result.
            op, value: the operator, and what it reads.
            signature, made: its rule and its choice.
        """
        self.choices[name], self.signatures[name] = made, signature
        self.cut.layouts[name] = self.where[name] = made.outputs[0]
        if value in self.needs_grad:
            self.needs_grad.add(name)
        self.nodes.append(replace(like, name=name, op=op, inputs=(value,), outputs=(name,), mark=None, mark_positions=()))
        return name

    # -- shares of sums -----------------------------------------------------------------------------------------------

    def with_shares(self, node: Node) -> Node:
        """Returns the operator with values that all units have shared out, where they are added to a sum."""
        sums = {i for i, v in enumerate(node.inputs) if self.cut.sums(v)}
        if not sums:
            return node
        if (at := adds_constant(node.op)) is not None:  # a part of it for each summand
            summands = math.prod(self.alone.axis_size(axis) for axis in self.cut.sums(node.inputs[0]))
            args = [argument / summands if i == at else argument for i, argument in enumerate(node.op.args)]
            op = Operator(node.op.target, tuple(args), node.op.kwargs, node.op.inputs, node.op.outputs)
            return replace(node, op=op)
        group = linear_group(node, self.plan.signatures[node.name], sums) or frozenset()
        inputs = list(node.inputs)
        for index in group - sums:
            if not self.cut.dims(node.inputs[index]) and all(self.cut.sums(node.inputs[i]) == self.axes for i in sums):
                ways = self.plan.choices[node.name].inputs[index].partial_axes
                inputs[index] = self.share(node, node.inputs[index], node.op.inputs[index], ways)
        return replace(node, inputs=tuple(inputs))

    def share(self, reader: Node, value: str, meta: TensorMeta, ways: Sequence[str]) -> str:
        """Adds the operator that divides a value among units, and returns what it makes.

        Args:
            reader: the operator that adds it to a sum.
            value, meta: the value.
            ways: axes of ranks over which the sum is pending where it is read, so that they share the value too.
        """
        name = "_".join((value, "share", *ways))
        if name in self.choices:
            return name
        op = Operator(share, (Slot(0),), {}, (meta,), (meta,))
        signature, split = _as_it_is(meta, None), dict[str, Split]()
        parts = self.cut.units * math.prod(self.plan.mesh.axis_size(axis) for axis in ways)
        signature = replace(signature, lowering=partial(emit_share, self.plan.mesh.size, parts))
        propose(split, signature, signature.inputs[0], self.where[value].without_partial(), meta.shape)
        made = make_choice(op, signature, self.where[value].mesh, split, [False])
        part = made.outputs[0].with_partial((*self.axes, *ways))
        gradient = ((*self.axes, *ways) if value in self.needs_grad else (),)
        made = replace(made, computed=(part,), outputs=(part,), partial_gradient=gradient)
        return self.insert(reader, name, op, value, signature, made)

    # -- slices -------------------------------------------------------------------------------------------------------

    def in_slices(self, node: Node) -> None:
        """Gives an operator the rule by which slices run it: causal attention, or a part of a sequence."""
        if self.cut.slices == 1 or node.name in self.free or not node.inputs:
            return
        value, meta = node.inputs[0], node.op.inputs[0]
        dim = self.cut.dims(value).get(SLICE)
        if dim is None or value in self.cut.samples:
            return
        pieces = unit_pieces(self.cut.layouts[value], dim, meta.shape[dim])
        if attends_causally(node.op) and dim == len(meta.shape) - 2:
            self.signatures[node.name] = in_slices(node.op, self.signatures[node.name])
        if takes_part(node.op, dim) and (found := cut_in_pieces(node.op, pieces)) is not None:
            self.signatures[node.name], own = found
            self.parts[node.name] = {"part": ((SLICE,), own)}

    def sliced_inputs(self, node: Node) -> list[SlicedInput]:
        """Lists the inputs of an operator whose sequence is cut."""
        found = []
        for index, (value, meta) in enumerate(zip(node.inputs, node.op.inputs, strict=True)):
            dim, samples = self.cut.dims(value).get(SLICE), self.cut.samples.get(value)
            if dim is not None:
                columns = () if samples is None else self.cut.grid(value, dim, meta.shape[dim])[1]
                found.append(SlicedInput(index, dim, samples, columns))
        return found

    def with_own_rows(self, node: Node, made: Choice, signature: Signature, rows: Rows | None) -> Node:
        """Returns the operator with each unit's rows of what is there for the whole batch.

        Args:
            node: the operator.
            made: its choice.
            signature: its rule.
            rows: the factor of rows.
        """
        if rows is None:
            return node
        inputs = list(node.inputs)
        for index, (value, layout) in enumerate(zip(node.inputs, made.inputs, strict=True)):
            dim = unit_dims(layout).get(SLICE)
            if dim is None or rows.factor not in signature.inputs[index][dim] or SLICE in self.where[value].split_axes:
                continue
            if unit_axes(self.where[value].split_axes) or value in self.needs_grad:
                self.refuse(node, f"reads rows of samples and positions from its input {index}, which has them otherwise")
            inputs[index] = self.rows_of(node, value, layout, node.op.inputs[index], dim, rows.samples)
        return replace(node, inputs=tuple(inputs))

    def rows_of(self, like: Node, value: str, layout: Layout, meta: TensorMeta, dim: int, samples: int) -> str:
        """Adds the operator that gives each unit its rows of a value; returns what it makes.

        Args:
            like: the operator that reads or makes it.
            value, meta: the value, which is there for the whole batch.
            layout: in which it is read.
            dim: of its rows.
            samples: number of samples in the batch.
        """
        pieces = unit_pieces(layout, dim, meta.shape[dim])
        name = f"{value}_rows_{'_'.join(map(str, pieces))}"
        if name in self.choices:
            return name
        grid = grid_of_rows(pieces, self.cut.slices, samples)
        op, signature = rows_operator(meta, dim, samples, grid, self.plan.mesh.size)
        made = make_choice(op, signature, self.over_units(self.plan.mesh), {ROW: (self.axes, pieces)}, [False])
        self.cut.samples[name] = samples
        return self.insert(like, name, op, value, signature, made)

    # -- results ------------------------------------------------------------------------------------------------------

    def returned(self, value: str) -> str:
        """Adds what cuts an output that is there for the whole batch, as others are made; returns its name."""
        dims = self.cut.dims(value)
        received = any(i.value == value and is_received(i) for i in self.graph.inputs)
        maker = next((n for n in self.graph.nodes if value in n.outputs), None)
        if received or not dims or (maker is not None and maker.name not in self.free):
            return value
        meta, layout, like = self.graph.metas[value], self.cut.layouts[value], maker or self.graph.nodes[-1]
        if value in self.cut.samples:
            return self.rows_of(like, value, layout, meta, dims[SLICE], self.cut.samples[value])
        name = f"{value}_piece"
        if name in self.choices:
            return name
        op, signature = Operator(alias, (Slot(0),), {}, (meta,), (meta,)), _as_it_is(meta, emit_alias)
        split: dict[str, Split] = {
            f"d{dim}": ((axis,), unit_pieces(layout, dim, meta.shape[dim])) for axis, dim in dims.items()
        }
        made = make_choice(op, signature, self.over_units(self.plan.mesh), split, [False])
        return self.insert(like, name, op, value, signature, made)


def _as_it_is(meta: TensorMeta, lowering: object) -> Signature:
    """Returns the rule of an operator that gives back what it reads."""
    dims = tuple((f"d{i}",) for i in range(len(meta.shape)))
    sizes = {f"d{i}": size for i, size in enumerate(meta.shape)}
    return Signature((dims,), (dims,), sizes, lowering=lowering)  # type: ignore[arg-type]
