"""Planner: visits the operators of a graph in order and gives each a choice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from shardwright.base.operators import may_draw
from shardwright.errors import Problems
from shardwright.ir.choice import Choice, make_choice
from shardwright.ir.graph import Graph, GraphInput, Node
from shardwright.ir.layout import Layout
from shardwright.ir.plan import Plan
from shardwright.ir.signature import Signature
from shardwright.plan.asked.pins import check_pin, pinned_graph
from shardwright.plan.asked.splits import Checked
from shardwright.plan.asked.strategies import (
    check_counts,
    check_form,
    check_layout,
    check_strategy,
    flat_pieces,
    reserve,
    resolve_strategy,
)
from shardwright.plan.choose.common_mesh import Refinement
from shardwright.plan.choose.follow import choice_for_output, follow
from shardwright.plan.request import PlanRequest
from shardwright.rules.registry import replicated_signature, signature_of

Where = dict[str, "Layout | None"]


class Planner:
    """Plans a graph operator by operator; modes are its subclasses.

    Args:
        graph: what is planned.
        request: what the user asked for.
    """

    def __init__(self, graph: Graph, request: PlanRequest):
        self.graph = pinned_graph(graph, request.operator_plan, request.dataset_strategy == "full_batch")
        self.request = request
        self.size = request.world_size
        self.problems = Problems()
        self.notes: list[str] = []
        self.signatures: dict[str, Signature] = {}
        self.choices: dict[str, Choice] = {}
        self.where: Where = {}
        self.batch: Where = {}
        self.refinement = Refinement(self.size)
        self.checked: dict[str, Checked] = {}
        self.pins: dict[str, Any] = {}
        self.ready: set[str] = set()  # values any piece of which every rank can make without communication
        asked = request.parameter_plan if request.honour_marks else {}
        self.planned = {i.value for i in graph.inputs if i.kind in ("parameter", "buffer") and str(i.target) in asked}
        self.needs = {n.name: [v in graph.needs_grad for v in n.inputs] for n in graph.nodes}

    def plan(self) -> Plan:
        self.find_rules()
        self.check()
        self.problems.raise_if_any("the strategies cannot be followed")
        self.make_room_for_batch()
        self.refinement.finish()
        self.mesh = self.refinement.meshes[0]
        self.data_parallel()
        self.forward()
        self.problems.raise_if_any("the strategies cannot be followed")
        self.backward()
        self.problems.raise_if_any("the strategies cannot be followed")
        layouts = {i.value: self.input_layout(i) for i in self.graph.inputs}
        return Plan(self.graph, self.mesh, self.choices, self.signatures, layouts, tuple(self.notes), self.request.mode)

    # -- before: rules and strategies -----------------------------------------------------------------------------

    def find_rules(self) -> None:
        known: dict[int, Signature] = {}  # of repeated layers' operators, by identity
        missing: set[int] = set()
        for node in self.graph.nodes:
            key = id(node.op)
            if key not in known:
                found = signature_of(node.op)
                if found is None:
                    missing.add(key)
                known[key] = found if found is not None else replicated_signature(node.op)
            if key in missing:
                size = sum(m.bytes for m in node.op.inputs)
                self.notes.append(f"{node.where} has no rule and runs whole on every rank ({size:,} bytes of input)")
            self.signatures[node.name] = known[key]

    def check(self) -> None:
        if not self.request.honour_marks:
            self.check_dataset()
            return
        for node in self.graph.nodes:
            pin = self.request.operator_plan.get(node.name)
            if pin is None and (node.mark is None or node.mark.in_strategy is None):
                continue
            if node.mark is not None and node.mark.is_pin:
                self.check_pin(node)
                continue
            if pin is not None:
                fine = check_pin(node, pin, self.size, self.problems)
                checked = Checked(None, pin.inputs, pin.outputs, pin.what) if fine else None
            else:
                checked = check_strategy(node, self.signatures[node.name], self.size, self.problems)
            if checked is not None:
                self.checked[node.name] = checked
                reserve(checked, self.signatures[node.name], self.refinement, self.size)
        self.check_parameters()
        self.check_dataset()

    def check_pin(self, node: Node) -> None:
        mark = node.mark
        assert mark is not None
        what = f"{node.module + '.' if node.module else ''}{mark.name}" + (f" at {mark.source}" if mark.source else "")
        if check_form(mark.in_strategy, what, self.problems) is not None and self.fits(
            mark.in_strategy[0], node.op.inputs[0].shape, what
        ):
            self.pins[node.name] = mark.in_strategy[0]

    def fits(self, entry: Any, shape: Sequence[int], what: str) -> bool:
        """Checks one layout or tuple of counts, and adds its cuts to the mesh."""
        if isinstance(entry, Layout):
            fine = check_layout(entry, len(shape), self.size, what, self.problems)
            if fine:
                self.refinement.add(entry.mesh.sizes, entry.mesh.axes, entry.mesh.ranks)
            return fine
        fine = check_counts(entry, len(shape), self.size, what, self.problems)
        if fine:
            self.refinement.add((*entry, self.size // math.prod(entry)))
        return fine

    def laid_out(self, entry: Any, shape: tuple[int, ...]) -> Layout:
        """Returns the layout that an entry checked by :meth:`fits` stands for."""
        if isinstance(entry, Layout):
            return self.refinement.refined(entry, shape)
        mesh, axes = self.refinement.axes_of((*entry, self.size // math.prod(entry)))
        dims = axes[: len(entry)]
        sizes = [flat_pieces(size, mesh, a) if a else None for size, a in zip(shape, dims, strict=True)]
        return Layout.of(mesh, dims, (), sizes).normal(shape)

    def check_parameters(self) -> None:
        by_name = {str(i.target): i for i in self.graph.inputs if i.kind in ("parameter", "buffer")}
        for name, (entry, what) in self.request.parameter_plan.items():
            if name not in by_name:
                self.problems.add(f"{what}: parameter_plan names {name!r}, which no operator reads; remove the entry")
            elif check_form((entry,), f"{what} parameter {name!r}", self.problems) is not None:
                self.fits(entry, by_name[name].meta.shape, f"{what} parameter {name!r}")

    def check_dataset(self) -> None:
        strategy = self.request.dataset_strategy
        if isinstance(strategy, str):
            return
        inputs = [i for i in self.graph.inputs if i.kind == "input"]
        if check_form(strategy, "dataset_strategy", self.problems) is None:
            return
        if len(strategy) != len(inputs):
            self.problems.add(f"dataset_strategy: {len(strategy)} entries for {len(inputs)} tensor inputs; give one per input")
            return
        for i, (entry, graph_input) in enumerate(zip(strategy, inputs, strict=True)):
            self.fits(entry, graph_input.meta.shape, f"dataset_strategy input {i}")

    # -- pass 1: data parallel --------------------------------------------------------------------------------------

    def data_parallel(self) -> None:
        for graph_input in self.graph.inputs:
            self.batch[graph_input.value] = None
        for graph_input, layout in self.batch_layouts():
            self.batch[graph_input.value] = layout
        for node in self.graph.nodes:
            known = [self.batch[v] for v in node.inputs]
            if all(layout is None for layout in known):
                self.batch.update(dict.fromkeys(node.outputs))
                continue
            choice = follow(node.op, self.signatures[node.name], known, self.needs[node.name], self.mesh)
            self.batch.update(zip(node.outputs, choice.outputs, strict=True))
            if node.carries_batch:
                self.batch.update(
                    (v, self.batch_layout(m.shape)) for v, m in zip(node.outputs, node.op.outputs, strict=True) if m.shape
                )

    def batch_layout(self, shape: tuple[int, ...]) -> Layout:
        """Returns the layout of a tensor whose dim 0 is the batch, split over the ranks."""
        return Layout.of(self.mesh, [self.batch_axes(shape[0]), *[()] * (len(shape) - 1)]).normal(shape)

    def batch_layouts(self) -> list[tuple[GraphInput, Layout]]:
        """Returns the user inputs that carry the batch, with their layouts by the dataset strategy."""
        inputs = [i for i in self.graph.inputs if i.kind == "input"]
        strategy = self.request.dataset_strategy
        if not isinstance(strategy, str):
            return [(i, self.laid_out(e, i.meta.shape)) for i, e in zip(inputs, strategy, strict=True)]
        first = next((i.meta.shape[0] for i in inputs if i.meta.shape), 0)
        axes = self.batch_axes(first)
        result = []
        for i in inputs:
            carries = bool(i.meta.shape) and i.meta.shape[0] == first
            dims = [axes if carries and d == 0 else () for d in range(len(i.meta.shape))]
            result.append((i, Layout.of(self.mesh, dims).normal(i.meta.shape)))
        return result

    def make_room_for_batch(self) -> None:
        """Cuts the mesh if the batch has fewer samples than there are ranks. Most ranks can then share it."""
        first = next((i.meta.shape[0] for i in self.graph.inputs if i.kind == "input" and i.meta.shape), 0)
        if isinstance(self.request.dataset_strategy, str) and 1 < first < self.size:
            ways = max(d for d in range(1, first + 1) if self.size % d == 0)
            self.refinement.add_if_fits((ways, self.size // ways))

    def batch_axes(self, batch: int) -> tuple[str, ...]:
        """Returns all axes of the mesh, or the first ones with enough samples for them."""
        axes: tuple[str, ...] = ()
        for axis in self.mesh.axes:
            if self.mesh.count((*axes, axis)) > batch:
                note = f"the batch of {batch} is split over {self.mesh.count(axes)} of {self.size} ranks; the others repeat"
                if note not in self.notes:
                    self.notes.append(note)
                break
            axes = (*axes, axis)
        return axes

    # -- pass 2: forward --------------------------------------------------------------------------------------------

    def forward(self) -> None:
        for graph_input in self.graph.inputs:
            self.where[graph_input.value] = self.given(graph_input)
            whole = graph_input.kind == "input" and self.request.dataset_strategy == "full_batch"
            if whole and not graph_input.requires_grad:
                self.ready.add(graph_input.value)
        for node in self.graph.nodes:
            if self.is_ready(node):
                self.ready.update(node.outputs)
                self.where.update(
                    (v, Layout.replicated(self.mesh, len(m.shape))) for v, m in zip(node.outputs, node.op.outputs, strict=True)
                )
                continue
            choice = self.choose(node)
            if choice is None:
                self.where.update(dict.fromkeys(node.outputs))
                continue
            self.choices[node.name] = choice
            self.where.update(zip(node.outputs, choice.outputs, strict=True))

    def is_ready(self, node: Node) -> bool:
        """Tells whether every rank can make any piece of an operator's outputs by itself."""
        return (
            bool(node.inputs)
            and not may_draw(node.op.target)
            and node.mark is None
            and all(v in self.ready for v in node.inputs)
        )

    def given(self, graph_input: GraphInput) -> Layout | None:
        """Returns the given layout of an input; ``None``: it is free."""
        shape = graph_input.meta.shape
        if graph_input.kind == "input":
            if self.request.dataset_strategy == "full_batch":
                return Layout.replicated(self.mesh, len(shape))
            return self.batch[graph_input.value]
        entry = self.request.parameter_plan.get(str(graph_input.target)) if self.request.honour_marks else None
        return self.laid_out(entry[0], shape) if entry is not None else None

    def choose(self, node: Node) -> Choice | None:
        """Returns the choice of one operator, or ``None`` for one whose inputs are all free."""
        signature, needs = self.signatures[node.name], self.needs[node.name]
        if node.name in self.checked:
            return resolve_strategy(node, signature, self.checked[node.name], self.refinement, needs, self.problems)
        if node.name in self.pins:
            target = self.laid_out(self.pins[node.name], node.op.inputs[0].shape)
            return choice_for_output(node.op, signature, target, needs)
        here = [self.where[v] for v in node.inputs]
        if (node.region is not None and self.request.honour_marks) or self.reads_planned_parameter(node):
            if all(layout is None for layout in here):
                return None
            return follow(node.op, signature, here, needs, self.mesh, self.parameters_first(node, here))
        batch = [self.batch[v] for v in node.inputs]
        if all(layout is None for layout in batch):  # no batch reaches it: it follows configured operators, or is free
            return None if all(h is None for h in here) else follow(node.op, signature, here, needs, self.mesh)
        settled = [b if b is None or not b.partial or b == h else b.without_partial() for b, h in zip(batch, here, strict=True)]
        return follow(node.op, signature, settled, needs, self.mesh)

    def reads_planned_parameter(self, node: Node) -> bool:
        """Tells whether a node reads a parameter of the plan. It is followed outside a marked region too."""
        return any(v in self.planned for v in node.inputs)

    def parameters_first(self, node: Node, here: Sequence[Layout | None]) -> list[int]:
        """Orders the inputs to satisfy: parameters with a planned layout, then the largest."""
        known = [i for i, layout in enumerate(here) if layout is not None]
        return sorted(known, key=lambda i: (node.inputs[i] not in self.planned, -node.op.inputs[i].numel))

    # -- pass 3: backward -------------------------------------------------------------------------------------------

    def backward(self) -> None:
        wanted: dict[str, list[Layout]] = {}
        for node in reversed(self.graph.nodes):
            if node.name not in self.choices:
                self.choices[node.name] = self.choose_free(node, wanted)
            for value, layout in zip(node.inputs, self.choices[node.name].inputs, strict=True):
                wanted.setdefault(value, []).append(layout)
        self.wanted = wanted

    def choose_free(self, node: Node, wanted: dict[str, list[Layout]]) -> Choice:
        signature, needs = self.signatures[node.name], self.needs[node.name]
        if node.name in self.checked:
            told = resolve_strategy(node, signature, self.checked[node.name], self.refinement, needs, self.problems)
            return told or make_choice(node.op, signature, self.mesh, {}, needs)
        readers = {layout for v in node.outputs for layout in wanted.get(v, ())}
        if len(readers) > 1 and all(v in self.ready for v in node.outputs):
            return make_choice(node.op, signature, self.mesh, {}, needs)  # each reader takes its slice
        for index, value in enumerate(node.outputs):
            for layout in _most_split(wanted.get(value, ())):
                choice = choice_for_output(node.op, signature, layout.without_partial(), needs, index)
                if choice is not None:
                    return choice
        return make_choice(node.op, signature, self.mesh, {}, needs)

    def input_layout(self, graph_input: GraphInput) -> Layout:
        """Returns the layout of a graph input; parameters are stored as their readers want them."""
        given = self.where[graph_input.value]
        replicated = Layout.replicated(self.mesh, len(graph_input.meta.shape))
        if graph_input.kind == "input":
            return given or replicated
        if graph_input.kind != "parameter":
            return replicated
        if str(graph_input.target) in self.request.stored and given is not None:
            return self.on_main_mesh(given, graph_input.meta.shape)
        candidates = [layout.without_partial() for layout in _most_split(self.wanted.get(graph_input.value, ()))]
        return self.on_main_mesh(next(iter(candidates), given or replicated), graph_input.meta.shape)

    def on_main_mesh(self, layout: Layout, shape: tuple[int, ...]) -> Layout:
        """Returns the layout itself, or the nearest on the main mesh.

        Parameters share one mesh, so that their norms can be added.
        """
        if layout.mesh == self.mesh:
            return layout
        free, dims = list(self.mesh.axes), []
        for axes in layout.bound:
            taken: list[str] = []
            for axis in list(free):
                if self.mesh.count([*taken, axis]) <= layout.mesh.count(axes):
                    taken.append(axis)
                    free.remove(axis)
            dims.append(taken)
        return Layout.of(self.mesh, dims).normal(shape)


def _most_split(layouts: Sequence[Layout]) -> list[Layout]:
    """Sorts the layouts by number of ways, most first; among equals the last reader's (they come last to first)."""
    unique = list(dict.fromkeys(reversed(layouts)))
    return sorted(unique, key=lambda layout: -layout.mesh.count(layout.split_axes))
