"""Plans from the configured operators to all others, with the least redistribution.

1. Configured operators take their strategies, on a mesh cut as finely as the strategies allow.
2. Breadth first, from all of them at once, to the readers of their outputs and to the makers of their inputs: each
   operator that is reached takes the candidate that redistributes least on the edges by which it was reached; see
   :mod:`shardwright.plan.choose.candidates` for ties. A decision is never changed.
3. Operators that are never reached run data parallel; values made from parameters alone go where they are read.
4. Sums that only linear operators read stay pending, where that makes them fewer or smaller.

The least means the bytes that the busiest rank sends on an edge, not the time of a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from shardwright.errors import StrategyError
from shardwright.ir.choice import Choice, make_choice
from shardwright.ir.graph import Graph, Node
from shardwright.ir.layout import Layout
from shardwright.ir.layout_text import counts_of
from shardwright.ir.mesh import Mesh
from shardwright.ir.plan import Plan
from shardwright.plan.asked.strategies import resolve_strategy
from shardwright.plan.choose.candidates import Candidates, Link, reducing
from shardwright.plan.choose.common_mesh import Refinement
from shardwright.plan.choose.follow import choice_for_output, follow
from shardwright.plan.choose.tables import code_of, layout_of
from shardwright.plan.modes.planner import Planner
from shardwright.plan.request import PlanRequest

# Each axis multiplies the candidates of an operator; four cover 16 devices cut in every way.
MOST_AXES = 4

NOTHING_CONFIGURED = (
    "sharding_propagation starts from configured operators, and none is configured: use mode 'auto', or mark one, "
    "for example sw.shard(torch.matmul, in_strategy=((2, 1), (1, 4)))"
)


def plan_propagation(graph: Graph, request: PlanRequest) -> Plan:
    """Plans a graph by propagation from its marks.

    Raises:
        StrategyError: nothing is configured, or strategies cannot be followed; nothing has been run.
    """
    return PropagationPlanner(graph, request).plan()


def slice_counts(plan: Plan, node: Node | str) -> tuple[tuple[int, ...], ...]:
    """Returns an operator's choice as a strategy: slice counts per dim of each tensor input.

    Args:
        plan: the plan.
        node: a node of the plan's graph, or its name.
    """
    return tuple(counts_of(layout) for layout in plan.choices[node if isinstance(node, str) else node.name].inputs)


class PropagationPlanner(Planner):
    """Plans a graph by propagation; the passes of :class:`Planner` around it stay as they are."""

    def __init__(self, graph: Graph, request: PlanRequest):
        super().__init__(graph, request)
        self.level: dict[str, int] = {}  # decided operators: how many edges from a configured one
        self.open: set[str] = set()
        self.maker = {v: n for n in self.graph.nodes for v in n.outputs}
        self.readers: dict[str, list[tuple[Node, int]]] = {}
        self.position = {n.name: i for i, n in enumerate(self.graph.nodes)}
        for node in self.graph.nodes:
            for slot, value in enumerate(node.inputs):
                self.readers.setdefault(value, []).append((node, slot))
        self.remembered: dict[Any, Any] = {}
        self.kinds: dict[Any, int] = {}

    def check(self) -> None:
        super().check()
        if not (self.checked or self.pins or self.planned or self.problems.lines):
            raise StrategyError(NOTHING_CONFIGURED)

    def make_room_for_batch(self) -> None:
        if self.request.mesh is not None:
            self.refinement.add(self.request.mesh, self.request.mesh_axes)
        else:
            refine_to_primes(self.refinement)

    def data_parallel(self) -> None:
        """Does nothing yet; data parallel follows only for operators that are never reached."""

    def forward(self) -> None:
        self.sort_out()
        self.problems.raise_if_any("the strategies cannot be followed")
        self.spread()
        self.choose_unreached()
        self.keep_sums_pending()

    # -- what is given ------------------------------------------------------------------------------------------------

    def sort_out(self) -> None:
        """Places the inputs, decides configured operators, and finds those that propagation may decide."""
        self.batch = dict.fromkeys(i.value for i in self.graph.inputs)
        if self.request.dataset_strategy != "full_batch":
            self.batch.update((i.value, layout) for i, layout in self.batch_layouts())
        for graph_input in self.graph.inputs:
            self.where[graph_input.value] = self.given(graph_input)
            whole = graph_input.kind == "input" and self.request.dataset_strategy == "full_batch"
            if whole and not graph_input.requires_grad:
                self.ready.add(graph_input.value)
        for node in self.graph.nodes:
            if node.name in self.checked or node.name in self.pins:
                choice = self.configured(node)
                if choice is not None:
                    self.decide(node, choice, 0)
            elif self.is_ready(node):
                self.ready.update(node.outputs)
                self.where.update(
                    (v, Layout.replicated(self.mesh, len(m.shape))) for v, m in zip(node.outputs, node.op.outputs)
                )
            else:
                self.where.update(dict.fromkeys(node.outputs))
                if not all(self.is_free(v) for v in node.inputs):
                    self.open.add(node.name)

    def configured(self, node: Node) -> Choice | None:
        signature, needs = self.signatures[node.name], self.needs[node.name]
        if node.name in self.checked:
            return resolve_strategy(node, signature, self.checked[node.name], self.refinement, needs, self.problems)
        return choice_for_output(node.op, signature, self.laid_out(self.pins[node.name], node.op.inputs[0].shape), needs)

    def is_free(self, value: str) -> bool:
        """Tells whether a value may be wherever its readers want it: a parameter, or made from parameters alone."""
        maker = self.maker.get(value)
        return self.where[value] is None and (maker is None or maker.name not in self.open)

    def decide(self, node: Node, choice: Choice, level: int) -> None:
        self.choices[node.name] = choice
        self.level[node.name] = level
        self.where.update(zip(node.outputs, choice.outputs, strict=True))

    # -- breadth first ------------------------------------------------------------------------------------------------

    def spread(self) -> None:
        readers = [node for value in self.planned for node, _ in self.readers.get(value, ())]
        frontier = [n for name in self.level for n in self.neighbours(name)] + readers
        level = 1
        while frontier:
            nodes = {n.name: n for n in frontier if n.name in self.open and n.name not in self.level}
            for name in sorted(nodes, key=self.position.__getitem__):
                self.decide(nodes[name], self.choose_reached(nodes[name], level), level)
            frontier = [n for name in nodes for n in self.neighbours(name)]
            level += 1

    def neighbours(self, name: str) -> Iterator[Node]:
        """Yields the makers of an operator's inputs and the readers of its outputs."""
        node = self.graph.nodes[self.position[name]]
        for value in node.inputs:
            if value in self.maker:
                yield self.maker[value]
        for value in node.outputs:
            for reader, _ in self.readers.get(value, ()):
                yield reader

    def choose_reached(self, node: Node, level: int) -> Choice:
        """Chooses the candidate that fits an operator's decided neighbours best; alike operators share it."""
        signature, needs = self.signatures[node.name], tuple(self.needs[node.name])
        links = tuple(dict.fromkeys([*self.input_links(node, level), *self.output_links(node, level)]))
        parameters = tuple(i for i, v in enumerate(node.inputs) if needs[i] and self.where[v] is None and self.is_free(v))
        key = (self.kind(node), needs, links, parameters)
        if key not in self.remembered:
            mesh = self.mesh_of(links)
            extra = self.extra_choices(node, links, mesh)
            about = (self.kind(node), needs, mesh)
            if extra or about not in self.remembered:
                candidates = Candidates(node.op, signature, mesh, needs, extra)
                if not extra:
                    self.remembered[about] = candidates
            else:
                candidates = self.remembered[about]
            self.remembered[key] = candidates.best(links, parameters)
        return self.remembered[key]  # type: ignore[no-any-return]

    def kind(self, node: Node) -> int:
        """Numbers operators; those that are called alike on alike tensors have one number."""
        op = node.op
        key = (op.target, repr(op.args), repr(op.kwargs), op.inputs, op.outputs)
        return self.kinds.setdefault(key, len(self.kinds))

    def input_links(self, node: Node, level: int) -> Iterator[Link]:
        for slot, value in enumerate(node.inputs):
            where, grad = self.where[value], value in self.graph.needs_grad
            reached = fixed = value in self.planned
            if value in self.maker:
                reached = self.level.get(self.maker[value].name, level) < level
            elif where is None:  # a parameter that another operator reads is best stored as that one reads it
                where = self.read_elsewhere(node, value)
            if where is not None:
                yield Link(slot, True, where.without_partial(), (), grad, reached, fixed)

    def read_elsewhere(self, node: Node, value: str) -> Layout | None:
        for reader, slot in self.readers[value]:
            if reader is not node and reader.name in self.level:
                return self.choices[reader.name].inputs[slot].without_partial()
        return None

    def output_links(self, node: Node, level: int) -> Iterator[Link]:
        for slot, value in enumerate(node.outputs):
            for reader, at in self.readers.get(value, ()):
                if reader.name in self.level:
                    choice, grad = self.choices[reader.name], value in self.graph.needs_grad
                    wanted, gradient = choice.inputs[at].without_partial(), choice.partial_gradient[at]
                    yield Link(slot, False, wanted, gradient, grad, self.level[reader.name] < level)

    def mesh_of(self, links: Sequence[Link]) -> Mesh:
        """Returns the mesh of the neighbours that reached the operator, if they are split."""
        split = [link.other.mesh for link in links if link.reached and not link.other.is_replicated]
        return self.mesh if not split or self.mesh in split else split[0]

    def extra_choices(self, node: Node, links: Sequence[Link], mesh: Mesh) -> tuple[Choice, ...]:
        """Returns choices with layouts that tables do not have: given piece sizes, axes in another order."""
        unusual = [link for link in links if not link.other.is_replicated and not _is_usual(link.other, mesh)]
        if not unusual:
            return ()
        signature, needs = self.signatures[node.name], self.needs[node.name]
        found = []
        inputs = {link.slot: link.other for link in links if link.is_input}
        if inputs:
            order = sorted({link.slot for link in links if link.is_input and link.reached}) or None
            layouts = [inputs.get(i) for i in range(len(node.inputs))]
            found.append(follow(node.op, signature, layouts, needs, mesh))
            found.append(follow(node.op, signature, layouts, needs, mesh, order))
        for link in links:
            choice = None if link.is_input else choice_for_output(node.op, signature, link.other, needs, link.slot)
            if choice is not None:
                found.append(choice)
        return tuple(reducing(node.op, signature, choice, needs) for choice in found)

    # -- what propagation does not decide -------------------------------------------------------------------------------

    def choose_unreached(self) -> None:
        """Decides operators without an edge to a configured one as in semi-auto mode."""
        left = [n for n in self.graph.nodes if n.name in self.open and n.name not in self.level]
        if not left:
            return
        super().data_parallel()
        for node in left:
            choice = self.choose(node)
            if choice is not None:
                self.choices[node.name] = choice
                self.where.update(zip(node.outputs, choice.outputs, strict=True))
        names = ", ".join(n.where for n in left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        self.notes.append(f"no configured operator is connected to {names}: data parallel")

    def keep_sums_pending(self) -> None:
        """Keeps sums pending whose only reader is linear in them, so that one reduction does."""
        kept = set(self.graph.made_whole)
        for node in self.graph.nodes:
            if not self.level.get(node.name):
                continue
            signature, choice = self.signatures[node.name], self.choices[node.name]
            for group in signature.linear:
                pending = self.pending_inputs(node, group, kept)
                if pending is None or choice.mesh != pending[min(group)].mesh:
                    continue
                sums = set(pending[min(group)].partial_axes)
                idle = sums.isdisjoint(choice.axes) and not any(layout.partial for layout in choice.computed)
                if idle and all(choice.inputs[i] == pending[i].without_partial() for i in group):
                    self.read_pending(node, pending)
                    break

    def pending_inputs(self, node: Node, group: frozenset[int], kept: set[str]) -> dict[int, Layout] | None:
        """Returns the sums that a group of inputs would read, where reading them pending pays."""
        values = {node.inputs[i] for i in group}
        found: dict[int, Layout] = {}
        for i in group:
            maker = self.maker.get(node.inputs[i])
            alone = all(reader is node and slot in group for reader, slot in self.readers[node.inputs[i]])
            if maker is None or not alone or node.inputs[i] in kept or not self.level.get(maker.name):
                return None
            signature, choice = self.signatures[maker.name], self.choices[maker.name]
            if signature.late or len(choice.outputs) > 1 or not choice.computed[0].partial or choice.outputs[0].partial:
                return None
            found[i] = choice.computed[0]
        pays = len(values) > 1 or node.op.outputs[0].numel < node.op.inputs[min(group)].numel
        return found if pays and len({layout.partial for layout in found.values()}) == 1 else None

    def read_pending(self, node: Node, pending: dict[int, Layout]) -> None:
        for i in pending:
            maker = self.maker[node.inputs[i]]
            made = self.choices[maker.name]
            self.decide(maker, replace(made, outputs=made.computed), self.level[maker.name])
        choice, needs, signature = self.choices[node.name], self.needs[node.name], self.signatures[node.name]
        changed = make_choice(node.op, signature, choice.mesh, choice.split, needs, pending)
        self.decide(node, reducing_pending(changed), self.level[node.name])


def reducing_pending(choice: Choice) -> Choice:
    """Returns the choice with all pending sums of its outputs done."""
    return replace(choice, outputs=tuple(layout.without_partial() for layout in choice.computed))


def _is_usual(layout: Layout, mesh: Mesh) -> bool:
    return layout.mesh == mesh and layout_of(code_of(layout, mesh), layout.ndim, mesh) == layout


def refine_to_primes(refinement: Refinement) -> None:
    """Cuts the unnamed axes of the main mesh into prime factors, up to four axes in all.

    >>> refinement = Refinement(8)
    >>> refine_to_primes(refinement)
    >>> refinement.finish().meshes[0].sizes
    (2, 2, 2)
    """
    main = refinement.families[0]
    if len(refinement.families) > 1 and not (main.cuts - {1, refinement.size} or main.names):
        return  # all strategies are over ranks in another order: theirs is the mesh to be on
    while True:
        chain = sorted(main.cuts, reverse=True)
        spans = [(high, low) for high, low in pairwise(chain) if _divisor(high // low) > 1]
        spans = [span for span in spans if not any(outer[0] >= span[0] and span[1] >= outer[1] for outer in main.names)]
        if len(chain) > MOST_AXES or not spans:
            return
        high, low = max(spans, key=lambda span: (span[0] / span[1], span[0]))
        main.cuts.add(low * _divisor(high // low))


def _divisor(n: int) -> int:
    """Returns the largest divisor up to the root: it splits a size about evenly. It is 1 of a prime."""
    return max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0)
