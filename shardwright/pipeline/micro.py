"""Splits the plan of a stage into micro-batches: an axis that is run one place after the other instead of side by side.

The micro-batch is the most significant axis of a larger mesh, ``micro x ranks``, that splits the batch as data parallelism
would. So the rules of operators decide what a micro-batch computes: a mean over the batch becomes a sum that is pending
over micro-batches, dropout draws the numbers of the whole batch, the last micro-batch may be smaller. What would have to
wait for all micro-batches, such as the statistics of a batch norm, is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from shardwright.errors import Problems
from shardwright.ir.choice import Choice, make_choice
from shardwright.ir.graph import Node
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.ir.operator import Operator, Slot, TensorMeta
from shardwright.ir.pieces import chunk_pieces
from shardwright.ir.plan import Plan
from shardwright.ir.signature import Signature, Split
from shardwright.pipeline.refusals import SUMMED, TOGETHER, changes_buffer, needs_dim, refusal
from shardwright.pipeline.stages import free_nodes, is_received
from shardwright.pipeline.sums import alias, emit_alias, emit_share, linear_group, share
from shardwright.plan.choose.follow import propose
from shardwright.rules.pointwise import adds_constant

MICRO = "micro"


def micro_mesh(mesh: Mesh, count: int) -> Mesh:
    """Returns the mesh with an axis of micro-batches in front.

    >>> micro_mesh(Mesh(("tp",), (2,)), 3)
    Mesh(axes=('micro', 'tp'), sizes=(3, 2), ranks=(0, 1, 2, 3, 4, 5))
    """
    ranks = tuple(place * mesh.size + rank for place in range(count) for rank in mesh.ranks)
    return Mesh((MICRO, *mesh.axes), (count, *mesh.sizes), ranks)


@dataclass
class Cut:
    """Layouts that say where micro-batches cut the values of a graph, as far as it is known.

    Args:
        layouts: by value, the layout on ``micro x ranks`` that has its pieces, of which only the micro axis counts.
    """

    layouts: dict[str, Layout] = field(default_factory=dict)

    def dim(self, value: str) -> int | None:
        """Returns the dim of a value that micro-batches cut."""
        layout = self.layouts.get(value)
        return None if layout is None else next((d for d, axes in enumerate(layout.bound) if MICRO in axes), None)

    def is_sum(self, value: str) -> bool:
        """Tells whether micro-batches hold summands of a value."""
        layout = self.layouts.get(value)
        return layout is not None and MICRO in layout.partial_axes


def cut_plan(plan: Plan, count: int, cut: Cut, problems: Problems, met: list[str] | None = None) -> Plan:
    """Makes the plan of a stage on ``micro x ranks`` of a plan on its ranks.

    Args:
        plan: the plan.
        count: number of micro-batches.
        cut: where the inputs are cut; afterwards also the values that the stage makes.
        problems: gets the operators that would have to wait for all micro-batches.
        met: gets their names.
    """
    return _Cutter(plan, count, cut, problems, [] if met is None else met).run()


class _Cutter:
    def __init__(self, plan: Plan, count: int, cut: Cut, problems: Problems, met: list[str]):
        self.plan, self.graph, self.count, self.cut, self.problems, self.met = plan, plan.graph, count, cut, problems, met
        self.free = free_nodes(plan.graph)
        self.given = {i.value for i in plan.graph.inputs}
        self.choices: dict[str, Choice] = {}
        self.nodes: list[Node] = []
        self.of_parameters = {i.value for i in self.graph.inputs if i.kind == "parameter"}
        self.signatures = dict(plan.signatures)
        self.where: dict[str, Layout] = {}  # settled layouts of values, on meshes with micro-batches

    def run(self) -> Plan:
        inputs = {}
        for graph_input in self.graph.inputs:
            value = graph_input.value
            layout = self.lifted(self.plan.input_layouts[value], graph_input.meta.shape)
            inputs[value] = self.where[value] = self.split_like(layout, value) if is_received(graph_input) else layout
        for node in self.graph.nodes:
            node = self.with_shares(node)
            self.choices[node.name] = self.choice(node)
            self.nodes.append(node)
        for name, value in self.graph.updates:
            if self.cut.dim(value) is not None or self.cut.is_sum(value):
                maker = next(n for n in self.graph.nodes if value in n.outputs)
                self.met.append(maker.name)
                self.problems.add(changes_buffer(maker, name))
        outputs = tuple(self.returned(output) if isinstance(output, str) else output for output in self.graph.outputs)
        graph = replace(self.graph, nodes=tuple(self.nodes), outputs=outputs, read_later=frozenset(outputs), metas={})
        mesh = micro_mesh(self.plan.mesh, self.count)
        return replace(
            self.plan, graph=graph, mesh=mesh, choices=self.choices, signatures=self.signatures, input_layouts=inputs
        )

    # -- layouts ----------------------------------------------------------------------------------------------------

    def lifted(self, layout: Layout, shape: Sequence[int]) -> Layout:
        """Returns a layout over the ranks of every micro-batch."""
        return Layout.of(micro_mesh(layout.mesh, self.count), layout.bound, layout.partial, layout.sizes)

    def split_like(self, layout: Layout, value: str) -> Layout:
        """Returns a lifted layout, cut into micro-batches as the value is."""
        dim = self.cut.dim(value)
        if dim is None:
            return layout.with_partial((MICRO,)) if self.cut.is_sum(value) else layout
        cut, shape = self.cut.layouts[value], self.graph.metas[value].shape
        own, pieces = _combined(layout, dim, pieces_of_micro_batches(cut, dim, shape[dim]), shape[dim])
        dims = [own if d == dim else axes for d, axes in enumerate(layout.bound)]
        sizes = [pieces if d == dim else s for d, s in enumerate(layout.sizes)]
        return Layout.of(layout.mesh, dims, layout.partial, sizes).normal(shape)

    # -- operators --------------------------------------------------------------------------------------------------

    def choice(self, node: Node) -> Choice:
        choice, signature = self.plan.choices[node.name], self.plan.signatures[node.name]
        mesh = micro_mesh(choice.mesh, self.count)
        cut = {i: self.cut.layouts[v] for i, v in enumerate(node.inputs) if self.cut.dim(v) is not None}
        factors = self.factors(node, signature, cut)
        if node.name in self.free:
            return self.free_choice(node, choice, signature, factors, mesh)
        sums = {i for i, v in enumerate(node.inputs) if self.cut.is_sum(v)}
        split: dict[str, Split] = dict(choice.split)
        for factor, pieces in factors.items():
            split[factor] = self.with_micro(choice, signature, factor, pieces)
        pending = self.pending(node, choice, signature, sums, mesh)
        needs = [v in self.graph.needs_grad for v in node.inputs]
        made = make_choice(node.op, signature, mesh, split, needs, pending)
        outputs = [
            self.settled(before, after, computed)
            for before, after, computed in zip(choice.computed, choice.outputs, made.computed, strict=True)
        ]
        made = make_choice(node.op, signature, mesh, split, needs, pending, outputs)
        self.check(node, made, cut)
        self.cut.layouts.update(
            (v, layout) for v, layout in zip(node.outputs, made.outputs, strict=True) if _knows_micro(layout)
        )
        self.where.update(zip(node.outputs, made.outputs, strict=True))
        return made

    def free_choice(
        self, node: Node, choice: Choice, signature: Signature, factors: Mapping[str, tuple[int, ...] | None], mesh: Mesh
    ) -> Choice:
        """Makes the choice of a free operator: for the whole batch at once, cut where others read it.

        Args:
            node, choice, signature: the operator, the plan's choice, and its rule.
            factors: those that carry the batch. Ranks do not split them: they split each micro-batch later.
            mesh: of micro-batches and ranks.
        """
        self.note_cut(node, signature, factors)
        split: dict[str, Split] = {}
        if self.of_parameters.intersection(node.inputs):  # others may be as long as the batch, and are cheap
            split = {f: own for f, own in choice.split.items() if f not in factors}
            self.of_parameters.update(node.outputs)
        needs = [v in self.graph.needs_grad for v in node.inputs]
        made = make_choice(node.op, signature, mesh, split, needs)
        if made.outputs != made.computed or any(layout.partial for layout in made.computed):
            made = replace(made, outputs=tuple(layout.without_partial() for layout in made.computed))
        self.where.update(zip(node.outputs, made.outputs, strict=True))
        return made

    def factors(self, node: Node, signature: Signature, cut: Mapping[int, Layout]) -> dict[str, tuple[int, ...] | None]:
        """Returns the factors that micro-batches split, with the sizes of their pieces."""
        found: dict[str, Split] = {}
        for index, layout in cut.items():
            shape = node.op.inputs[index].shape
            mesh = Mesh((MICRO,), (self.count,))
            dim = next(d for d, axes in enumerate(layout.bound) if MICRO in axes)
            pieces = pieces_of_micro_batches(layout, dim, shape[dim])
            alone = Layout.of(
                mesh, [(MICRO,) if d == dim else () for d in range(len(shape))], (),
                [pieces if d == dim else None for d in range(len(shape))],
            )  # fmt: skip
            each: dict[str, Split] = {}
            propose(each, signature, signature.inputs[index], alone.normal(shape), shape)
            found.update(each)
        if len(found) > 1 and not set(found) <= signature.tied:
            found = dict(list(found.items())[:1])  # the check finds the inputs that are cut otherwise
        return {factor: pieces for factor, (_, pieces) in found.items()}

    def note_cut(self, node: Node, signature: Signature, factors: Mapping[str, tuple[int, ...] | None]) -> None:
        """Records how the outputs of a free operator are cut where others read them."""
        mesh = Mesh((MICRO,), (self.count,))
        split: dict[str, Split] = {f: ((MICRO,), pieces) for f, pieces in factors.items()}
        _, outputs = signature.layouts(mesh, split)
        self.cut.layouts.update(
            (v, layout) for v, layout in zip(node.outputs, outputs, strict=True) if any(layout.bound) and not layout.partial
        )

    def with_micro(self, choice: Choice, signature: Signature, factor: str, pieces: tuple[int, ...] | None) -> Split:
        """Returns the split of a factor by micro-batches first, then as the plan splits it.

        Args:
            choice, signature: of the operator.
            factor: the factor.
            pieces: the sizes of micro-batches, where they are uneven.
        """
        axes, explicit = choice.split.get(factor, ((), None))
        size = signature.sizes[factor]
        if explicit is not None or (pieces is not None and axes):
            whole = pieces or chunk_pieces(size, (self.count,))
            ways = tuple(choice.mesh.axis_size(a) for a in axes)
            found = tuple(p for piece in whole for p in (chunk_pieces(piece, ways) if axes else (piece,)))
            return (MICRO, *axes), found
        return (MICRO, *axes), pieces

    def pending(self, node: Node, choice: Choice, signature: Signature, sums: set[int], mesh: Mesh) -> dict[int, Layout] | None:
        """Returns the inputs that are read with sums pending, over ranks or over micro-batches.

        Args:
            node, choice, signature: the operator, the plan's choice, and its rule.
            sums: the inputs of which micro-batches hold summands.
            mesh: of micro-batches and ranks.
        """
        over_ranks = {i: layout for i, layout in enumerate(choice.inputs) if layout.partial}
        if not sums:
            return {i: Layout.of(mesh, la.bound, la.partial, la.sizes) for i, la in over_ranks.items()} or None
        group = linear_group(node, signature, sums)
        if group is None or any(self.cut.dim(v) is not None for v in node.inputs):
            self.refuse(node, SUMMED)
            return None
        # ranks settle their sums where the plan says, micro-batches at the end
        partial = {i: over_ranks.get(i, choice.inputs[i]) for i in group}
        return {i: Layout.of(mesh, la.bound, la.partial, la.sizes).with_partial((MICRO,)) for i, la in partial.items()}

    def with_shares(self, node: Node) -> Node:
        """Returns the operator with values that all micro-batches have shared out, where they are added to a sum."""
        sums = {i for i, v in enumerate(node.inputs) if self.cut.is_sum(v)}
        if not sums:
            return node
        if (at := adds_constant(node.op)) is not None:  # a part of it for each micro-batch
            args = [argument / self.count if i == at else argument for i, argument in enumerate(node.op.args)]
            op = Operator(node.op.target, tuple(args), node.op.kwargs, node.op.inputs, node.op.outputs)
            return replace(node, op=op)
        group = linear_group(node, self.plan.signatures[node.name], sums) or frozenset()
        inputs = list(node.inputs)
        for index in group - sums:
            if self.cut.dim(node.inputs[index]) is None:
                ways = self.plan.choices[node.name].inputs[index].partial_axes
                inputs[index] = self.share(node, node.inputs[index], node.op.inputs[index], ways)
        return replace(node, inputs=tuple(inputs))

    def share(self, reader: Node, value: str, meta: TensorMeta, ways: Sequence[str]) -> str:
        """Adds the operator that divides a value among micro-batches, and returns what it makes.

        Args:
            reader: the operator that adds it to a sum.
            value, meta: the value.
            ways: axes of ranks over which the sum is pending where it is read, so that they share the value too.
        """
        name = "_".join((value, "share", *ways))
        if name in self.choices:
            return name
        op = Operator(share, (Slot(0),), {}, (meta,), (meta,))
        dims = tuple((f"d{i}",) for i in range(len(meta.shape)))
        sizes = {f"d{i}": size for i, size in enumerate(meta.shape)}
        parts = self.count * math.prod(self.plan.mesh.axis_size(axis) for axis in ways)
        signature = Signature((dims,), (dims,), sizes, lowering=partial(emit_share, self.plan.mesh.size, parts))
        split: dict[str, Split] = {}
        propose(split, signature, signature.inputs[0], self.where[value].without_partial(), meta.shape)
        made = make_choice(op, signature, self.where[value].mesh, split, [False])
        part = made.outputs[0].with_partial((MICRO, *ways))
        gradient = ((MICRO, *ways) if value in self.graph.needs_grad else (),)
        self.choices[name] = replace(made, computed=(part,), outputs=(part,), partial_gradient=gradient)
        self.signatures[name] = signature
        self.cut.layouts[name] = self.where[name] = part
        self.nodes.append(Node(name, op, (value,), (name,), reader.module, reader.source, grad=reader.grad))
        return name

    def returned(self, value: str) -> str:
        """Adds what cuts an output that is there for the whole batch, as others are made; returns its name."""
        dim = self.cut.dim(value)
        received = any(i.value == value and is_received(i) for i in self.graph.inputs)
        maker = next((n for n in self.graph.nodes if value in n.outputs), None)
        if received or dim is None or (maker is not None and maker.name not in self.free):
            return value
        name, meta = f"{value}_piece", self.graph.metas[value]
        if name in self.choices:
            return name
        op = Operator(alias, (Slot(0),), {}, (meta,), (meta,))
        dims = tuple((f"d{i}",) for i in range(len(meta.shape)))
        signature = Signature((dims,), (dims,), {f"d{i}": n for i, n in enumerate(meta.shape)}, lowering=emit_alias)
        pieces = pieces_of_micro_batches(self.cut.layouts[value], dim, meta.shape[dim])
        made = make_choice(op, signature, micro_mesh(self.plan.mesh, self.count), {f"d{dim}": ((MICRO,), pieces)}, [False])
        self.choices[name], self.signatures[name] = made, signature
        self.cut.layouts[name] = self.where[name] = made.outputs[0]
        like = maker or self.graph.nodes[-1]
        self.nodes.append(Node(name, op, (value,), (name,), like.module, like.source, grad=like.grad))
        return name

    def settled(self, before: Layout, after: Layout, computed: Layout) -> Layout:
        """Returns the layout in which an output leaves its operator: the plan's, cut as it is computed."""
        if before == after:
            return computed
        if before.without_partial() == after:
            return Layout.of(
                computed.mesh, computed.bound, [(a, op) for a, op in computed.partial if a == MICRO], computed.sizes
            )
        dim = next((d for d, axes in enumerate(computed.bound) if MICRO in axes), None)
        layout = Layout.of(computed.mesh, after.bound, after.partial, after.sizes)
        if MICRO in computed.partial_axes:
            layout = layout.with_partial((MICRO,))
        if dim is None:
            return layout
        size = sum(computed.pieces(dim, 0)) if computed.sizes[dim] is not None else None
        axes = (MICRO, *layout.bound[dim])
        dims = [axes if d == dim else own for d, own in enumerate(layout.bound)]
        assert size is None, "uneven micro-batches of a reduced output"
        return Layout.of(layout.mesh, dims, layout.partial, layout.sizes)

    # -- refusing ---------------------------------------------------------------------------------------------------

    def check(self, node: Node, made: Choice, cut: Mapping[int, Layout]) -> None:
        """Refuses an operator that would need the whole batch."""
        for index in cut:
            dim = next((d for d, axes in enumerate(cut[index].bound) if MICRO in axes), None)
            if dim is not None and MICRO not in made.inputs[index].bound[dim]:
                self.refuse(node, needs_dim(index, dim), dim)
                return
        inner = [f for f, (axes, _) in made.split.items() if MICRO in axes and f in self.plan.signatures[node.name].inner]
        if inner:
            self.refuse(node, TOGETHER)

    def refuse(self, node: Node, why: str, dim: int | None = None) -> None:
        self.met.append(node.name)
        self.problems.add(refusal(self.graph, node, why, dim))


def _knows_micro(layout: Layout) -> bool:
    return MICRO in layout.partial_axes or any(MICRO in axes for axes in layout.bound)


def pieces_of_micro_batches(layout: Layout, dim: int, size: int) -> tuple[int, ...]:
    """Returns how many of a dim's entries each micro-batch has."""
    pieces = layout.pieces(dim, size)
    each = len(pieces) // layout.mesh.axis_size(MICRO)
    return tuple(sum(pieces[at : at + each]) for at in range(0, len(pieces), each))


def _combined(layout: Layout, dim: int, micro: tuple[int, ...], size: int) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """Returns axes and pieces of a dim that micro-batches cut first, and the ranks of a layout then."""
    axes = layout.bound[dim]
    ways = tuple(layout.mesh.axis_size(a) for a in axes)
    pieces = tuple(p for piece in micro for p in (chunk_pieces(piece, ways) if axes else (piece,)))
    return (MICRO, *axes), pieces
