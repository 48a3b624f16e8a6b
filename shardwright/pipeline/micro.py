"""Splits the plan of a stage into units: axes that are run one place after the other instead of side by side.

The micro-batch is the most significant axis of a larger mesh, ``micro x ranks``, that splits the batch as data parallelism
would. So the rules of operators decide what a micro-batch computes: a mean over the batch becomes a sum that is pending
over micro-batches, dropout draws the numbers of the whole batch, the last micro-batch may be smaller. What would have to
wait for all micro-batches, such as the statistics of a batch norm, is refused.

Where micro-batches are cut into slices of the sequence, there is a second such axis, ``micro x slice x ranks``, that splits the
sequence. But for the operators in :mod:`.slices`, rules decide what a slice computes too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from shardwright.errors import Problems
from shardwright.ir.choice import Choice, make_choice
from shardwright.ir.graph import Node
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.ir.operator import TensorMeta
from shardwright.ir.pieces import chunk_pieces
from shardwright.ir.plan import Plan
from shardwright.ir.signature import Signature, Split
from shardwright.pipeline.refusals import SAME_FOR_SLICES, SUMMED, TOGETHER, changes_buffer, needs_dim
from shardwright.pipeline.slices import NotInSlices, Rows, counts_no_rows, with_rows
from shardwright.pipeline.stages import is_received
from shardwright.pipeline.sums import linear_group
from shardwright.pipeline.unit_nodes import Refused, UnitNodes
from shardwright.pipeline.units import (
    MICRO,
    SLICE,
    WORDS,
    Cut,
    grid_of_rows,
    start_slices,
    unit_axes,
    unit_dims,
    unit_pieces,
    with_units,
)
from shardwright.plan.choose.follow import propose


def cut_plan(plan: Plan, cut: Cut, problems: Problems, met: list[str] | None = None) -> Plan:
    """Makes the plan of a stage on units and ranks of a plan on its ranks.

    Args:
        plan: the plan.
        cut: where the inputs are cut; afterwards also the values that the stage makes.
        problems: gets the operators that would have to wait for all units.
        met: gets their names.
    """
    return _Cutter(plan, cut, problems, [] if met is None else met).run()


class _Cutter(UnitNodes):
    def __init__(self, plan: Plan, cut: Cut, problems: Problems, met: list[str]):
        super().__init__(plan, cut, problems, met)
        self.of_parameters = {i.value for i in self.graph.inputs if i.kind == "parameter"}

    def run(self) -> Plan:
        inputs = {}
        for graph_input in self.graph.inputs:
            value = graph_input.value
            layout = self.lifted(self.plan.input_layouts[value])
            inputs[value] = self.where[value] = (
                self.split_like(layout, value, graph_input.meta.shape) if is_received(graph_input) else layout
            )
        try:
            for node in self.graph.nodes:
                self.in_slices(node)
                self.add(self.with_shares(node))
        except Refused:
            return self.plan
        for name, value in self.graph.updates:
            if self.cut.dims(value) or self.cut.sums(value):
                maker = next(n for n in self.graph.nodes if value in n.outputs)
                self.met.append(maker.name)
                self.problems.add(changes_buffer(maker, name))
        outputs = tuple(self.returned(output) if isinstance(output, str) else output for output in self.graph.outputs)
        graph = replace(self.graph, nodes=tuple(self.nodes), outputs=outputs, read_later=frozenset(outputs), metas={})
        mesh = self.over_units(self.plan.mesh)
        return replace(
            self.plan, graph=graph, mesh=mesh, choices=self.choices, signatures=self.signatures, input_layouts=inputs
        )

    # -- operators --------------------------------------------------------------------------------------------------

    def add(self, node: Node) -> None:
        """Adds an operator with its choice."""
        choice, signature = self.plan.choices[node.name], self.signatures[node.name]
        rows, factors = None, dict[str, Split]()
        try:
            if self.cut.slices > 1:
                signature, rows = with_rows(signature, self.sliced_inputs(node))
            factors = self.factors(node, signature, rows)
        except NotInSlices as error:
            if node.name not in self.free:
                self.refuse(node, str(error))
        if node.name in self.free:
            self.note_cut(node, signature, factors, rows)
            made = self.free_choice(node, choice, factors)
        else:
            made = self.choice(node, choice, signature, factors, rows)
            self.signatures[node.name] = signature if rows is None else counts_no_rows(signature, rows, node.where)
            node = self.with_own_rows(node, made, signature, rows)
        self.choices[node.name] = made
        self.where.update(zip(node.outputs, made.outputs, strict=True))
        self.nodes.append(node)

    def choice(
        self, node: Node, choice: Choice, signature: Signature, factors: Mapping[str, Split], rows: Rows | None
    ) -> Choice:
        """Makes the choice of an operator that each unit runs.

        Args:
            node, choice, signature: the operator, the plan's choice, and its rule.
            factors: those that units split.
            rows: the factor of rows.
        """
        mesh = self.over_units(choice.mesh)
        sums = {i for i, v in enumerate(node.inputs) if self.cut.sums(v)}
        split: dict[str, Split] = {factor: own for factor, own in choice.split.items() if factor in signature.sizes}
        for factor, own in factors.items():
            split[factor] = self.with_units(choice, signature, factor, own, rows)
        pending = self.pending(node, choice, signature, sums, mesh)
        needs = [v in self.needs_grad for v in node.inputs]
        made = make_choice(node.op, signature, mesh, split, needs, pending)
        outputs = [
            self.settled(before, after, computed, meta)
            for before, after, computed, meta in zip(choice.computed, choice.outputs, made.computed, node.op.outputs)
        ]
        made = make_choice(node.op, signature, mesh, split, needs, pending, outputs)
        self.check(node, made)
        self.note(node, signature, made.outputs, rows)
        return made

    def free_choice(self, node: Node, choice: Choice, factors: Mapping[str, Split]) -> Choice:
        """Makes the choice of a free operator: for the whole batch at once, cut where others read it.

        Args:
            node, choice: the operator, and the plan's choice.
            factors: those that carry the batch. Ranks do not split them: they split each unit later.
        """
        signature, mesh = self.signatures[node.name], self.over_units(choice.mesh)
        split: dict[str, Split] = {}
        if self.of_parameters.intersection(node.inputs):  # others may be as long as the batch, and are cheap
            split = {f: own for f, own in choice.split.items() if f not in factors}
            self.of_parameters.update(node.outputs)
        needs = [v in self.needs_grad for v in node.inputs]
        made = make_choice(node.op, signature, mesh, split, needs)
        if made.outputs != made.computed or any(layout.partial for layout in made.computed):
            made = replace(made, outputs=tuple(layout.without_partial() for layout in made.computed))
        return made

    def factors(self, node: Node, signature: Signature, rows: Rows | None) -> dict[str, Split]:
        """Returns the factors that units split, with the sizes of their pieces.

        Args:
            node, signature: the operator, and its rule.
            rows: the factor of rows.
        """
        found: dict[str, Split] = {}
        cut = [i for i, v in enumerate(node.inputs) if self.cut.dims(v)]
        if self.cut.slices > 1:  # what is there whole is cut as others are
            cut.sort(key=lambda i: not unit_axes(self.where[node.inputs[i]].split_axes))
        for index in cut:
            shape, layout = node.op.inputs[index].shape, self.cut.layouts[node.inputs[index]]
            whole = Layout.replicated(self.alone, len(shape))
            each: dict[str, Split] = {}
            propose(each, signature, signature.inputs[index], with_units(whole, layout, shape).normal(shape), shape)
            for factor, own in each.items():
                others = (f for f, (axes, _) in found.items() if f != factor and set(axes) & set(own[0]))
                if factor not in found and all({f, factor} <= signature.tied for f in others):
                    found[factor] = own  # else the check finds the input that is cut otherwise
        found.update(self.parts.get(node.name, {}) if found else {})
        if rows is not None and rows.pair is not None:
            self.pair_up(signature, found, rows)
        return found

    def pieces(self, signature: Signature, found: Mapping[str, Split], factor: str) -> tuple[int, ...]:
        axes, pieces = found.get(factor, ((), None))
        return pieces or chunk_pieces(signature.sizes[factor], tuple(self.alone.axis_size(axis) for axis in axes))

    def pair_up(self, signature: Signature, found: dict[str, Split], rows: Rows) -> None:
        """Cuts rows as their samples and positions are, and the other way round.

        Raises:
            NotInSlices: what is joined to the positions are not the samples.
        """
        assert rows.pair is not None
        sample, position = rows.pair
        if rows.factor in found:
            pieces = self.pieces(signature, found, rows.factor)
            own, columns = grid_of_rows(pieces, self.cut.slices, rows.samples)
            found.update({position: ((SLICE,), columns)} | ({sample: ((MICRO,), own)} if self.cut.micro > 1 else {}))
        elif position in found:
            if (sample in found) != (self.cut.micro > 1):
                raise NotInSlices("joins the sequence to a dim that is not the batch")
            samples, positions = (self.pieces(signature, found, factor) for factor in rows.pair)
            found[rows.factor] = (self.axes, rows.pieces(samples, positions))

    def note_cut(self, node: Node, signature: Signature, factors: Mapping[str, Split], rows: Rows | None) -> None:
        """Records how the outputs of a free operator are cut where others read them.

        Args:
            node, signature: the operator, and its rule.
            factors: those that units would split.
            rows: the factor of rows.
        """
        _, outputs = signature.layouts(self.alone, factors)
        known = [Layout.replicated(self.alone, la.ndim) if la.partial else la for la in outputs]
        self.note(node, signature, known, rows)
        for value, meta in zip(node.outputs, node.op.outputs, strict=True):
            if value in self.cut.starts and SLICE not in self.cut.dims(value):
                start_slices(self.cut, value, meta.shape)

    def note(self, node: Node, signature: Signature, layouts: Sequence[Layout], rows: Rows | None) -> None:
        """Records how units cut what an operator makes.

        Args:
            node, signature: the operator, and its rule.
            layouts: of its outputs.
            rows: the factor of rows.
        """
        for value, layout, factors in zip(node.outputs, layouts, signature.outputs, strict=True):
            if unit_axes((*layout.split_axes, *layout.partial_axes)):
                self.cut.layouts[value] = layout
                dim = unit_dims(layout).get(SLICE)
                if rows is not None and dim is not None and rows.factor in factors[dim]:
                    self.cut.samples[value] = rows.samples

    def with_units(self, choice: Choice, signature: Signature, factor: str, own: Split, rows: Rows | None) -> Split:
        """Returns the split of a factor by units first, then as the plan splits it.

        Args:
            choice, signature: of the operator.
            factor: the factor.
            own: its split by units.
            rows: the factor of rows.
        """
        units, pieces = own
        of_rows = rows is not None and factor == rows.factor and rows.pair is not None
        axes, explicit = choice.split.get(rows.pair[0] if of_rows else factor, ((), None))  # type: ignore[index,union-attr]
        if (explicit is None and not axes) or (explicit is None and pieces is None and not of_rows):
            return (*units, *axes), pieces
        ways = tuple(choice.mesh.axis_size(axis) for axis in axes)
        counts = tuple(self.alone.axis_size(axis) for axis in units)
        whole = pieces or chunk_pieces(signature.sizes[factor], counts)
        if of_rows:  # ranks split the samples of a unit
            assert rows is not None
            samples, columns = grid_of_rows(whole, self.cut.slices, rows.samples)
            return (*units, *axes), tuple(n * c for own in samples for c in columns for n in chunk_pieces(own, ways))
        return (*units, *axes), tuple(p for piece in whole for p in (chunk_pieces(piece, ways) if axes else (piece,)))

    def pending(self, node: Node, choice: Choice, signature: Signature, sums: set[int], mesh: Mesh) -> dict[int, Layout] | None:
        """Returns the inputs that are read with sums pending, over ranks or over units.

        Args:
            node, choice, signature: the operator, the plan's choice, and its rule.
            sums: the inputs of which units hold summands.
            mesh: of units and ranks.
        """
        over_ranks = {i: layout for i, layout in enumerate(choice.inputs) if layout.partial}
        if not sums:
            return {i: Layout.of(mesh, la.bound, la.partial, la.sizes) for i, la in over_ranks.items()} or None
        group = linear_group(node, signature, sums)
        axes = {self.cut.sums(node.inputs[i]) for i in group or ()}
        own = next(iter(axes), ())
        if group is None or len(axes) != 1 or any(set(own) & set(self.cut.dims(v)) for v in node.inputs):
            self.refuse(node, SUMMED if len(self.axes) == 1 else f"{SUMMED} or sequence")
            return None
        # ranks settle their sums where the plan says, units at the end
        partial = {i: over_ranks.get(i, choice.inputs[i]) for i in group}
        return {i: Layout.of(mesh, la.bound, la.partial, la.sizes).with_partial(own) for i, la in partial.items()}

    def settled(self, before: Layout, after: Layout, computed: Layout, meta: TensorMeta) -> Layout:
        """Returns the layout in which an output leaves its operator: the plan's, cut as it is computed.

        Args:
            before, after: the plan's layouts, as computed and as it leaves.
            computed: as computed by units.
            meta: of the output.
        """
        if before == after:
            return computed
        sums = unit_axes(computed.partial_axes)
        if before.without_partial() == after:
            return Layout.of(
                computed.mesh, computed.bound, [(a, op) for a, op in computed.partial if a in sums], computed.sizes
            )
        layout = Layout.of(computed.mesh, after.bound, after.partial, after.sizes).with_partial(sums)
        return with_units(layout, computed, meta.shape)

    # -- refusing ---------------------------------------------------------------------------------------------------

    def check(self, node: Node, made: Choice) -> None:
        """Refuses an operator that would need the whole batch, or other slices."""
        for index, value in enumerate(node.inputs):
            for axis, dim in self.cut.dims(value).items():
                if axis not in made.inputs[index].bound[dim] and self.alone.axis_size(axis) > 1:
                    self.refuse(node, needs_dim(index, dim, WORDS[axis]), dim)
                    return
                layouts, size = (made.inputs[index], self.cut.layouts[value]), node.op.inputs[index].shape[dim]
                wanted, there = (unit_pieces(layout, dim, size) for layout in layouts)
                if wanted != there and unit_axes(self.where[value].split_axes):
                    texts = f"cut into {there} along dim {dim}, where others are cut into {wanted}"
                    self.refuse(node, f"reads its input {index} {texts}, which is the {WORDS[axis]}")
                    return
        original = self.plan.signatures[node.name]
        inner = [f for f, (axes, _) in made.split.items() if unit_axes(axes) and f in original.inner]
        if inner:
            self.refuse(node, TOGETHER)
        for layout in made.outputs:
            cut = unit_axes((*layout.split_axes, *layout.partial_axes))
            if MICRO in cut and SLICE in self.axes and SLICE not in cut:
                self.refuse(node, SAME_FOR_SLICES)
