"""Makes the local program of a graph and its plan.

Each operator becomes its local calls; each edge whose ends differ in layout, or whose gradient needs a reduction,
becomes one move, shared by all consumers with the same need.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shardwright.ir import rank_groups
from shardwright.ir.buckets import MoveBuckets
from shardwright.ir.graph import Graph, Node
from shardwright.ir.instructions import ProgramInput, Ref
from shardwright.ir.layout import Layout
from shardwright.ir.plan import Plan
from shardwright.ir.program import LocalProgram
from shardwright.partition.builder import Moves, NodeBuilder, ProgramBuilder
from shardwright.partition.overlap import schedule
from shardwright.partition.sharing import Need, sharing
from shardwright.redistribute.planner import Options


def partition(
    graph: Graph, plan: Plan, options: Options | None = None, schedule_options: MoveBuckets | None = None
) -> LocalProgram:
    """Makes the program that one rank runs, with every collective of the plan.

    Args:
        graph: the graph.
        plan: its plan.
        options: which steps redistributions may use and their costs; the item size is that of each tensor.
        schedule_options: which moves share collectives.

    Returns:
        A :class:`LocalProgram` whose outputs are whole on every rank, but for those that are read later.
    """
    return scheduled(unscheduled(graph, plan, options or Options()), schedule_options or MoveBuckets())


def unscheduled(graph: Graph, plan: Plan, options: Options, first_rank_only: bool = False) -> LocalProgram:
    """Makes the same program, with each move alone and where its result is read first.

    Args:
        graph: the graph.
        plan: its plan.
        options: which steps redistributions may use and their costs.
        first_rank_only: whether to make it for the first rank only, which has the largest pieces of every tensor. Decisions
            are the same for all ranks; only the proof is left out that no rank's values vary where a layout says that ranks
            replicate, whose time grows with the number of ranks.
    """
    return _Partitioner(graph, plan, options, first_rank_only).run()


def scheduled(program: LocalProgram, options: MoveBuckets) -> LocalProgram:
    """Fuses the moves of a program and starts them early, as the options say."""
    parameters = {i.name for i in program.inputs if i.kind in ("parameter", "local")}
    return replace(program, instructions=schedule(program.instructions, options, parameters))


class _Partitioner:
    def __init__(self, graph: Graph, plan: Plan, options: Options, first_rank_only: bool):
        self.graph, self.plan = graph, plan
        self.parameters = {i.value for i in graph.inputs if i.kind == "parameter"}
        self.builder = ProgramBuilder(plan.mesh.size, graph.metas, first_rank_only)
        self.layouts, self.rank_groups = self.builder.layouts, self.builder.rank_groups
        self.moves = Moves(self.builder, options, self.parameters)
        self.place: dict[str, str] = {}  # graph value -> local value
        self.moved: dict[tuple[str, Layout, tuple[str, ...]], str] = {}
        self.needs: dict[str, dict[Need, None]] = {}  # layouts in which each graph value is read, in order
        # Values that some reader takes a gradient of: a move is shared, and its first reader may be one that takes none.
        self.with_gradient = graph.needs_grad & {value for node in graph.nodes if node.grad for value in node.inputs}
        self.node: Node | None = None
        for node in graph.nodes:
            choice = plan.choices[node.name]
            for value, layout, gradient in zip(node.inputs, choice.inputs, choice.partial_gradient, strict=True):
                self._add_need(value, layout, gradient)
        for name in graph.made_whole:
            self._add_need(name, Layout.replicated(plan.mesh, len(graph.metas[name].shape)), ())

    def _add_need(self, value: str, layout: Layout, gradient: tuple[str, ...]) -> None:
        self.needs.setdefault(value, {})[layout.normal(self.graph.metas[value].shape), gradient] = None

    def run(self) -> LocalProgram:
        inputs = tuple(self._input(i) for i in self.graph.inputs)
        for node in self.graph.nodes:
            self._node(node)
        self.node = None
        outputs = tuple(self._output(o) for o in self.graph.outputs)
        updates = tuple((name, self._whole(value, name)) for name, value in self.graph.updates)
        return LocalProgram(
            self.builder.size,
            inputs,
            tuple(self.builder.instructions),
            outputs,
            updates,
            self.rank_groups,
            self.layouts,
            self.place,
            split=frozenset(o for o in outputs if isinstance(o, str) and not self.layouts[o].is_replicated),
        )

    def _output(self, output: Any) -> Any:
        """Returns what a program returns for an output of the graph: a local value, or the constant."""
        if not isinstance(output, str):
            return output
        return self.place[output] if output in self.graph.read_later else self._whole(output, "output")

    def _input(self, graph_input: Any) -> ProgramInput:
        layout = self.plan.input_layouts[graph_input.value].normal(graph_input.meta.shape)
        name = graph_input.value
        self.place[name] = name
        self.layouts[name] = layout
        self.rank_groups[name] = self.builder.rank_groups_of_layout(layout)
        return ProgramInput(name, graph_input.kind, graph_input.target, graph_input.meta, layout)

    def _whole(self, value: str, reader: str) -> str:
        layout = self.layouts[self.place[value]]
        return self.value_in(value, Layout.replicated(layout.mesh, layout.ndim), (), reader)

    def _node(self, node: Node) -> None:
        self.node = node
        choice, signature = self.plan.choices[node.name], self.plan.signatures[node.name]
        refs = tuple(
            Ref(self.value_in(value, layout, gradient, node.name))
            for value, layout, gradient in zip(node.inputs, choice.inputs, choice.partial_gradient, strict=True)
        )
        local = NodeBuilder(self.moves, self.graph, node, choice, signature, refs)
        results = signature.lowering(local) if signature.lowering else local.same_call()
        results = (results,) if isinstance(results, Ref) else tuple(results)
        settles_itself = bool(signature.late)
        for value, ref, computed, settled, meta in zip(
            node.outputs, results, choice.computed, choice.outputs, node.op.outputs, strict=True
        ):
            now = settled if settles_itself else computed
            self._check_rank_groups(node, ref.name, now)
            self.layouts[ref.name] = now.normal(meta.shape)
            self.place[value] = ref.name
            if not settles_itself and computed != settled:
                edge = f"{node.name} -> out"
                name = self.moves.emit(ref.name, meta.shape, computed, settled, (), meta.dtype, edge, node)
                self.place[value] = name

    def _check_rank_groups(self, node: Node, name: str, layout: Layout) -> None:
        """Proves that ranks compute the same wherever the layout says that they replicate."""
        if not self.builder.first_rank_only:
            assert rank_groups.varies_only_with(self.rank_groups[name], rank_groups.of_layout(layout)), (
                f"{node.where}: the local result varies along axes that {layout.short()} does not have"
            )

    # -- values ---------------------------------------------------------------------------------------------------

    def value_in(self, value: str, layout: Layout, gradient: tuple[str, ...], reader: str) -> str:
        """Returns the local value that holds ``value`` in ``layout``. Its first use emits a move.

        Args:
            value: a value of the graph.
            layout: the layout in which it is read.
            gradient: axes over which its gradient is partial at the reader.
            reader: the operator that reads it.
        """
        meta = self.graph.metas[value]
        layout = layout.normal(meta.shape)
        source = self.place[value]
        start = self.layouts[source]
        wanted = tuple(n for n in self.needs.get(value, ()))
        options = self.moves.options_for(meta.dtype, value in self.parameters)
        tree = sharing(start, wanted, meta.shape, value in self.graph.needs_grad, options) if len(wanted) > 1 else {}
        need: Need = (layout, gradient)
        chain = [need]
        while tree.get(chain[-1], (start, ())) != (start, ()):
            chain.append(tree[chain[-1]])
        for wanted_layout, wanted_gradient in reversed(chain):
            source = self._move_once(source, wanted_layout, wanted_gradient, value, reader)
        return source

    def _move_once(self, source: str, layout: Layout, gradient: tuple[str, ...], value: str, reader: str) -> str:
        if self.layouts[source] == layout and not gradient:
            return source
        key = (source, layout, gradient)
        if key not in self.moved:
            meta = self.graph.metas[value]
            self.moved[key] = self.moves.emit(
                source, meta.shape, self.layouts[source], layout, gradient, meta.dtype, f"{value} -> {reader}", self.node,
                value in self.graph.needs_grad, value in self.with_gradient,
            )  # fmt: skip
        return self.moved[key]
