"""Partition: Graph and Plan to the local program.

Each operator becomes its local calls; each edge whose ends differ in layout, or whose gradient needs a reduction,
becomes one move, shared by all consumers with the same need.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from shardwright.capture.graph import Graph, Node
from shardwright.capture.torch_private import pytree
from shardwright.layout import Layout
from shardwright.partition import lanes as lane
from shardwright.partition.program import Autocast, Call, Instruction, LocalProgram, Move, ProgramInput
from shardwright.partition.schedule import Schedule, schedule
from shardwright.partition.sharing import Need, sharing
from shardwright.plan.choice import Choice
from shardwright.plan.plan import Plan
from shardwright.redistribute.planner import Options
from shardwright.redistribute.steps import redistribution
from shardwright.rules.lowering import PerRank, Ref
from shardwright.rules.operator import OpOverload
from shardwright.rules.signature import Signature

# Operators of lowerings that read a tensor without its gradient.
_NO_GRADIENT = frozenset({"detach", "argmax", "argmin", "ge", "gt", "le", "lt", "eq", "ne"})


def partition(
    graph: Graph, plan: Plan, options: Options | None = None, schedule_options: Schedule | None = None
) -> LocalProgram:
    """The program one rank runs, with every collective the plan asks for.

    Args:
        options: what redistributions may use and what they cost; the item size is that of each tensor.
        schedule_options: which moves share collectives.

    Returns:
        A :class:`LocalProgram` whose outputs are whole on every rank.
    """
    return _Partitioner(graph, plan, options or Options(), schedule_options).run()


def unscheduled(graph: Graph, plan: Plan, options: Options) -> LocalProgram:
    """The same, each move where its result is read first and by itself."""
    return _Partitioner(graph, plan, options).unscheduled()


def scheduled(program: LocalProgram, options: Schedule) -> LocalProgram:
    """The program with its moves together and early, as the options say."""
    parameters = {i.name for i in program.inputs if i.kind in ("parameter", "local")}
    return replace(program, instructions=schedule(program.instructions, options, parameters))


class _Partitioner:
    def __init__(self, graph: Graph, plan: Plan, options: Options, schedule_options: Schedule | None = None):
        self.graph, self.plan, self.schedule = graph, plan, schedule_options or Schedule()
        self.options = {(options.itemsize, False): options}
        self.parameters = {i.value for i in graph.inputs if i.kind == "parameter"}
        self.size = plan.mesh.size
        self.instructions: list[Instruction] = []
        self.lanes: dict[str, lane.Lanes] = {}
        self.layouts: dict[str, Layout] = {}
        self.place: dict[str, str] = {}  # graph value -> local value
        self.moved: dict[tuple[str, Layout, tuple[str, ...]], str] = {}
        self.needs: dict[str, dict[Need, None]] = {}  # what each graph value is read as, in order
        # Values that some reader takes a gradient of: a move is shared, and its first reader may be one that takes none.
        self.with_gradient = graph.needs_grad & {value for node in graph.nodes if node.grad for value in node.inputs}
        self.node: Node | None = None
        self.count = 0
        for node in graph.nodes:
            choice = plan.choices[node.name]
            for value, layout, gradient in zip(node.inputs, choice.inputs, choice.partial_gradient, strict=True):
                self._add_need(value, layout, gradient)
        for name in [*graph.outputs, *(value for _, value in graph.updates)]:
            if isinstance(name, str):
                self._add_need(name, Layout.replicated(plan.mesh, len(graph.metas[name].shape)), ())

    def _add_need(self, value: str, layout: Layout, gradient: tuple[str, ...]) -> None:
        self.needs.setdefault(value, {})[layout.normal(self.graph.metas[value].shape), gradient] = None

    def run(self) -> LocalProgram:
        return scheduled(self.unscheduled(), self.schedule)

    def unscheduled(self) -> LocalProgram:
        inputs = tuple(self._input(i) for i in self.graph.inputs)
        for node in self.graph.nodes:
            self._node(node)
        self.node = None
        outputs = tuple(self._whole(o, "output") if isinstance(o, str) else o for o in self.graph.outputs)
        updates = tuple((name, self._whole(value, name)) for name, value in self.graph.updates)
        return LocalProgram(self.size, inputs, tuple(self.instructions), outputs, updates, self.lanes, self.layouts, self.place)

    def _input(self, graph_input: Any) -> ProgramInput:
        layout = self.plan.input_layouts[graph_input.value].normal(graph_input.meta.shape)
        name = graph_input.value
        self.place[name] = name
        self.layouts[name] = layout
        self.lanes[name] = lane.of_layout(layout)
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
        local = _Local(self, node, choice, signature, refs)
        results = signature.lowering(local) if signature.lowering else local.same_call()
        results = (results,) if isinstance(results, Ref) else tuple(results)
        settles_itself = bool(signature.late)
        for value, ref, computed, settled, meta in zip(
            node.outputs, results, choice.computed, choice.outputs, node.op.outputs, strict=True
        ):
            now = settled if settles_itself else computed
            assert lane.varies_only_with(self.lanes[ref.name], lane.of_layout(now)), (
                f"{node.where}: the local result varies along axes that {now.short()} does not have"
            )
            self.layouts[ref.name] = now.normal(meta.shape)
            self.place[value] = ref.name
            if not settles_itself and computed != settled:
                name = self.emit_move(ref.name, meta.shape, computed, settled, (), meta.dtype, f"{node.name} -> out")
                self.place[value] = name

    # -- values ---------------------------------------------------------------------------------------------------

    def value_in(self, value: str, layout: Layout, gradient: tuple[str, ...], reader: str) -> str:
        """The local value that holds ``value`` laid out as ``layout``; emits a move at its first use."""
        meta = self.graph.metas[value]
        layout = layout.normal(meta.shape)
        source = self.place[value]
        start = self.layouts[source]
        wanted = tuple(n for n in self.needs.get(value, ()))
        options = self.options_for(meta.dtype, value in self.parameters)
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
            self.moved[key] = self.emit_move(
                source, meta.shape, self.layouts[source], layout, gradient, meta.dtype, f"{value} -> {reader}",
                value in self.graph.needs_grad, value in self.with_gradient,
            )  # fmt: skip
        return self.moved[key]

    def options_for(self, dtype: torch.dtype, of_parameter: bool = False) -> Options:
        """What a move may use and costs. Those of parameters share their messages with others: only bytes count."""
        key = (dtype.itemsize, of_parameter)
        if key not in self.options:
            options = next(iter(self.options.values()))
            links = options.links
            if of_parameter:
                axes = tuple((axis, 0.0, bandwidth) for axis, _, bandwidth in links.axes)
                links = replace(links, launch=0.0, latency=0.0, axes=axes)
            self.options[key] = replace(options, links=links, itemsize=key[0])
        return self.options[key]

    def new_name(self, hint: str) -> str:
        while True:
            self.count += 1
            name = f"{hint}_{self.count}"
            if name not in self.lanes and name not in self.graph.metas:
                return name

    def emit_move(
        self,
        source: str,
        shape: tuple[int, ...],
        before: Layout,
        after: Layout,
        gradient: tuple[str, ...],
        dtype: torch.dtype,
        edge: str,
        needs_grad: bool = True,
        with_gradient: bool = False,
    ) -> str:
        plan = redistribution(before, after, shape, gradient, self.options_for(dtype, source in self.parameters))
        if plan.is_identity:
            return source
        name = self.new_name(source.rstrip("0123456789").rstrip("_") or source)
        out_lanes = lane.of_layout(plan.target, plan.partial_gradient)
        node = self.node
        self.instructions.append(
            Move(
                source, name, plan, dtype, node.name if node else edge, edge, out_lanes, needs_grad,
                with_gradient or node is None or node.grad, _autocast_of_move(node, dtype),
            )
        )  # fmt: skip
        self.lanes[name], self.layouts[name] = out_lanes, plan.target
        return name


def _autocast_of_move(node: Node | None, dtype: torch.dtype) -> Autocast:
    """That of the operators around it, so that they share a block; none where autocast cannot concatenate the dtype."""
    autocast = node.autocast if node else None
    if autocast is None or (dtype.is_floating_point and dtype not in (torch.float32, torch.float64, autocast[1])):
        return None
    return autocast


class _Local:
    """What a lowering writes to; see :class:`shardwright.rules.lowering.Local`."""

    def __init__(self, parent: _Partitioner, node: Node, choice: Choice, signature: Signature, inputs: tuple[Ref, ...]):
        self.parent, self.node, self.choice = parent, node, choice
        self.op, self.signature, self.mesh, self.split = node.op, signature, choice.mesh, choice.split
        self.inputs, self.input_layouts = inputs, choice.inputs
        self.output_layouts, self.settled_layouts = choice.computed, choice.outputs

    # -- emitting -------------------------------------------------------------------------------------------------

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Ref:
        return self._emit(function, args, kwargs, 1, sequence=False)[0]

    def call_many(self, count: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Ref, ...]:
        return self._emit(function, args, kwargs, count, sequence=True)

    def same_call(self, **changes: Any) -> tuple[Ref, ...]:
        from shardwright.rules.operator import Slot

        def local(leaf: Any) -> Any:
            return self.inputs[leaf.index] if isinstance(leaf, Slot) else leaf

        args, kwargs = pytree.tree_map(local, (list(self.op.args), dict(self.op.kwargs)))
        schema = getattr(self.op.target, "_schema", None)
        for name, value in changes.items():
            position = next((i for i, a in enumerate(schema.arguments) if a.name == name), None) if schema else None
            if position is not None and position < len(args):
                args[position] = value
            else:
                kwargs[name] = value
        return self._emit(self.op.target, tuple(args), kwargs, len(self.op.outputs), self.op.returns_sequence)

    def _emit(self, function: Callable[..., Any], args: Any, kwargs: Any, count: int, sequence: bool) -> tuple[Ref, ...]:
        leaves = pytree.tree_leaves((args, kwargs))
        known = [self.parent.lanes[leaf.name] for leaf in leaves if isinstance(leaf, Ref)]
        known += [
            lane.number([_hashable(leaf.of(r)) for r in range(self.parent.size)])
            for leaf in leaves
            if isinstance(leaf, PerRank)
        ]
        lanes = lane.join(*known) if known else (0,) * self.parent.size
        self._check_gradients(function, leaves, lanes)
        hint = self.node.outputs[0] if self.node.outputs else self.node.name
        names = []
        for _ in range(count):
            name = hint if hint not in self.parent.lanes and count == 1 else self.parent.new_name(hint)
            names.append(name)
            self.parent.lanes[name] = lanes
        self.parent.instructions.append(
            Call(function, args, kwargs, tuple(names), sequence, self.node.name, lanes, self.node.autocast, self.node.grad)
        )
        return tuple(Ref(n) for n in names)

    def _check_gradients(self, function: Callable[..., Any], leaves: list[Any], lanes: lane.Lanes) -> None:
        """A differentiable input that several lanes share would lose its gradient's reduction."""
        if not self.node.grad or not self.parent.graph.needs_grad.intersection(self.node.outputs) or _reads_without(function):
            return
        for i, ref in enumerate(self.inputs):
            if not self.op.inputs[i].differentiable or self.node.inputs[i] not in self.parent.graph.needs_grad:
                continue
            if any(leaf is ref for leaf in leaves):
                assert self.parent.lanes[ref.name] == lanes, (
                    f"{self.node.where}: input {i} is shared along axes where the operator's work differs"
                )

    def move(
        self,
        value: Ref,
        shape: tuple[int, ...],
        source: Layout,
        target: Layout,
        partial_gradient: tuple[str, ...] = (),
        dtype: Any = None,
    ) -> Ref:
        edge = f"within {self.node.name}"
        return Ref(self.parent.emit_move(value.name, shape, source, target, partial_gradient, dtype or torch.float32, edge))

    def settle(self, value: Ref, index: int = 0) -> Ref:
        meta = self.op.outputs[index]
        return Ref(
            self.parent.emit_move(
                value.name, meta.shape, self.output_layouts[index], self.settled_layouts[index], (), meta.dtype,
                f"{self.node.name} -> out",
            )
        )  # fmt: skip

    # -- reading --------------------------------------------------------------------------------------------------

    def axes_of(self, factor: str) -> tuple[str, ...]:
        return self.split[factor][0] if factor in self.split else ()

    def _bounds(self, tensor_is_output: bool, index: int) -> dict[int, tuple[tuple[int, int], ...]]:
        meta = (self.op.outputs if tensor_is_output else self.op.inputs)[index]
        layout = (self.output_layouts if tensor_is_output else self.input_layouts)[index]
        return layout.bounds(meta.shape)

    def local_size(self, tensor_is_output: bool, index: int, dim: int) -> PerRank | int:
        bounds = self._bounds(tensor_is_output, index)
        sizes = {b[dim][1] - b[dim][0] for b in bounds.values()}
        if len(sizes) == 1:
            return sizes.pop()
        return PerRank(lambda rank: bounds[rank][dim][1] - bounds[rank][dim][0])

    def local_shape(self, tensor_is_output: bool, index: int) -> list[PerRank | int]:
        meta = (self.op.outputs if tensor_is_output else self.op.inputs)[index]
        return [self.local_size(tensor_is_output, index, dim) for dim in range(len(meta.shape))]

    def offset(self, tensor_is_output: bool, index: int, dim: int) -> PerRank:
        bounds = self._bounds(tensor_is_output, index)
        return PerRank(lambda rank: bounds[rank][dim][0])


def _reads_without(function: Callable[..., Any]) -> bool:
    """Whether a call reads tensors without their gradients."""
    return isinstance(function, OpOverload) and function.overloadpacket.__name__ in _NO_GRADIENT


def _hashable(value: Any) -> Any:
    return value if isinstance(value, (int, float, bool, str, type(None))) else repr(value)
