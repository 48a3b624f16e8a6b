"""Writes a graph and a cost model as a problem for :mod:`shardwright.search`.

The problem's nodes are:

- every operator, with the rows of its :class:`~shardwright.plan.choose.tables.ChoiceTable`;
- every parameter, with the layouts it may be stored in (split over data-parallel axes this is optimizer parallelism);
- every value that several operators read, with the layouts and gradients in which they read it: readers with the same
  need share one redistribution.

An edge is a redistribution, forward and, where a gradient flows, backward. Values that every rank can make any piece of
without communication (those made of the whole batch, of buffers or of nothing) are left out; they are made where they are
read. Repeated blocks of the graph are written once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shardwright.cost.memory import kept_bytes
from shardwright.cost.saved import NOTHING, Saved, saved_by
from shardwright.ir.graph import Graph, Node
from shardwright.ir.mesh import Mesh
from shardwright.ir.operator import TensorMeta
from shardwright.plan.choose.tables import PARTIAL, REPLICATED, ChoiceTable, Codes
from shardwright.plan.problem.blocks import Block
from shardwright.plan.problem.prices import Pricing
from shardwright.search.problem import Edge, Problem, Repeat
from shardwright.search.problem import Node as Variable

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Use:
    """One input of a node in the problem. ``scope``: see :class:`shardwright.search.problem.Edge`."""

    node: int
    slot: int
    scope: str


@dataclass
class Needs:
    """Layouts in which something is read: codes ``(N, A)``, and the axes over which the gradient is partial ``(N, A)``."""

    codes: Codes
    gradients: Array


class Folded:
    """Nodes of a graph in the problem, and who reads what, with repeated blocks written once."""

    def __init__(self, graph: Graph, ready: frozenset[str], blocks: Sequence[Block] = ()):
        self.graph, self.ready, self.blocks = graph, ready, tuple(blocks)
        self.producer = {value: at for at, node in enumerate(graph.nodes) for value in node.outputs}
        self.block_of: dict[int, Block] = {}
        self.sites: list[int] = []
        at = 0
        for block in (*self.blocks, None):
            stop = block.start if block else len(graph.nodes)
            self.sites += range(at, stop)
            if block:
                template = range(block.start + block.length, block.start + 2 * block.length)
                self.block_of.update(dict.fromkeys(template, block))
                self.sites += template
                at = block.stop
        self.sites = [s for s in self.sites if not self._is_free(graph.nodes[s])]
        self.uses: dict[str, list[Use]] = {}
        for site in self.sites:
            self._read(site)
        self._exits()

    def _is_free(self, node: Node) -> bool:
        return all(value in self.ready for value in node.outputs)

    def _read(self, site: int) -> None:
        """Records where the inputs of a site come from."""
        block = self.block_of.get(site)
        node = self.graph.nodes[site]
        for slot, value in enumerate(node.inputs):
            if value in self.ready:
                continue
            if block is None:
                self._use(value, Use(site, slot, "every"))
                continue
            owner = self.producer.get(value, -1)
            if block.start <= owner < block.start + block.length:  # of the copy before
                there = self.graph.nodes[owner + block.length]
                position = self.graph.nodes[owner].outputs.index(value)
                self._use(there.outputs[position], Use(site, slot, "carried"))
                first = self.graph.nodes[site - block.length].inputs[slot]
                if first not in self.ready:  # such as the zeros that a recurrence begins with
                    self._use(first, Use(site, slot, "first"))
            else:
                self._use(value, Use(site, slot, "every"))

    def _exits(self) -> None:
        """Attributes values read after a block, which are the last copy's, to the template's value."""
        self.alias: dict[str, str] = {}
        for block in self.blocks:
            last = block.stop - block.length
            for offset in range(block.length):
                template = self.graph.nodes[block.start + block.length + offset]
                for value, kept in zip(self.graph.nodes[last + offset].outputs, template.outputs):
                    self.alias[value] = kept
        for value in [v for v in self.uses if v in self.alias and self.alias[v] != v]:
            moved = [Use(u.node, u.slot, "last") for u in self.uses.pop(value)]
            self.uses.setdefault(self.alias[value], []).extend(moved)

    def _use(self, value: str, use: Use) -> None:
        self.uses.setdefault(value, []).append(use)

    def copies(self, site: int) -> Iterable[tuple[int, int]]:
        """Yields ``(copy, node)`` for every node of the graph that a site stands for."""
        block = self.block_of.get(site)
        if block is None:
            return [(0, site)]
        offset = site - block.start - block.length
        return [(copy, block.start + copy * block.length + offset) for copy in range(block.count)]


@dataclass
class Formulation:
    """Problem of a graph on a mesh, and what its choices stand for.

    Args:
        tables: choice table of each site.
        stored: codes in which a parameter may be stored, by value.
        given: codes of user inputs that are not free.
        optimizer_bytes_per_byte: bytes of optimizer state per byte of parameter.
        live: sites whose own tensors count too, and the phase in which they do: where a plan was found to need most.
        activations, gradients: weights of the two in the memory that is limited; see :mod:`shardwright.search.memory_limit`.
    """

    folded: Folded
    mesh: Mesh
    pricing: Pricing
    tables: dict[int, ChoiceTable]
    stored: dict[str, Codes]
    given: dict[str, Codes]
    optimizer_bytes_per_byte: float = 2.0
    activations: float = 1.0
    gradients: float = 0.0
    live: Mapping[int, str] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)
    at_site: dict[int, int] = field(default_factory=dict)
    at_parameter: dict[str, int] = field(default_factory=dict)
    at_value: dict[str, int] = field(default_factory=dict)
    needs_of_value: dict[str, Needs] = field(default_factory=dict)
    saved: dict[int, Saved] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.graph = self.folded.graph
        self.parameters = {i.value: i for i in self.graph.inputs if i.kind == "parameter" or i.value in self.stored}
        self.kept_whole = {self.folded.alias.get(n, n) for n in self.graph.made_whole}
        self.problem = self._build()

    # -- variables --------------------------------------------------------------------------------------------------

    def _build(self) -> Problem:
        own: dict[int, list[str]] = {}
        for value, uses in self.folded.uses.items():
            if value in self.parameters:
                sites = {u.node for u in uses}
                only = next(iter(sites))
                inside = len(sites) == 1 and only in self.folded.block_of
                own.setdefault(only if inside else -1, []).append(value)
        for value in own.pop(-1, ()):
            self._add_parameter(value)
        spans: dict[Block, list[int]] = {}
        for site in self.folded.sites:
            start = len(self.variables)
            for value in own.get(site, ()):
                self._add_parameter(value)
            self._add_operator(site)
            for value in self.graph.nodes[site].outputs:
                if self._is_shared(value):
                    self._add_value(value)
            block = self.folded.block_of.get(site)
            if block is not None:
                spans.setdefault(block, [start, 0])[1] = len(self.variables)
        carried: dict[Block, list[Edge]] = {block: [] for block in spans}
        for value, uses in self.folded.uses.items():
            for use in uses:
                self._connect(value, use, carried)
        for value, at in self.at_value.items():
            self._connect_value(value, at)
        repeats = tuple(
            Repeat(start, stop - start, block.count, tuple(carried[block])) for block, (start, stop) in spans.items()
        )
        return Problem(tuple(self.variables), tuple(self.edges), repeats)

    def _add(self, name: str, cost: Array, memory: Array | None) -> int:
        self.variables.append(Variable(name, cost, memory))
        return len(self.variables) - 1

    def _is_shared(self, value: str) -> bool:
        return len(self.folded.uses.get(value, ())) > 1

    def _add_parameter(self, value: str) -> None:
        meta, grad = self.graph.metas[value], value in self.graph.needs_grad
        codes = self.stored[value]
        cost, memory = self.pricing.parameter(meta, codes, grad, self.optimizer_bytes_per_byte, self.gradients)
        self.at_parameter[value] = self._add(value, cost, memory)
        if self._is_shared(value):
            self._add_value(value)

    def _add_operator(self, site: int) -> None:
        node, table = self.graph.nodes[site], self.tables[site]
        cost = self.pricing.operator(table, self.needs_grad(node))
        for value, code in zip(node.outputs, table.outputs):
            if value in self.kept_whole:
                cost = cost + self.pricing.to_whole(self.graph.metas[value], code, value in self.graph.needs_grad)
        for slot, value in enumerate(node.inputs):
            if value in self.folded.ready:  # any piece of it, but no part of a sum
                parts = (self.needs(Use(site, slot, "every")).codes == PARTIAL).any(axis=1)
                cost = np.where(parts, np.inf, cost)
            if value in self.given:
                needs = self.needs(Use(site, slot, "every"))
                grad = value in self.graph.needs_grad
                seconds, _ = self.pricing.move(self.graph.metas[value], self.given[value], needs.codes, needs.gradients, grad)
                cost = cost + seconds[0]
        self.at_site[site] = self._add(node.name, cost, self._kept(site))

    def needs_grad(self, node: Node) -> tuple[bool, ...]:
        return tuple(v in self.graph.needs_grad for v in node.inputs)

    def saved_of(self, site: int) -> Saved:
        if site not in self.saved:
            node = self.graph.nodes[site]
            self.saved[site] = saved_by(node.op, self.needs_grad(node), self.pricing.machine.device) if node.grad else NOTHING
        return self.saved[site]

    def _kept(self, site: int) -> Array:
        """Counts the bytes that an operator keeps besides its inputs. Those count where they are made."""
        node, table, saved = self.graph.nodes[site], self.tables[site], self.saved_of(site)
        outputs = self.pricing.local_bytes(node.op.outputs, table.outputs, len(table))
        alone = Saved(frozenset(), saved.outputs, saved.extra, saved.aliases, saved.guessed)
        kept = kept_bytes(alone, np.zeros((len(node.inputs), len(table))), outputs, table.fraction)
        if site in self.live:  # values that are also alive while this operator runs
            backward = self.live[site] == "backward"
            grads = [v in self.graph.needs_grad for v in node.inputs]
            inputs = self.pricing.local_bytes(node.op.inputs, table.inputs, len(table))
            kept = kept + (inputs[np.asarray(grads, dtype=bool)] if backward else outputs).sum(axis=0)
        return self.activations * kept

    def _add_value(self, value: str) -> None:
        found = [self.needs(use) for use in self.folded.uses[value]]
        codes, masks = np.concatenate([n.codes for n in found]), np.concatenate([n.gradients for n in found])
        if value not in self.graph.needs_grad:
            masks = np.zeros_like(masks)
        _, first = np.unique(self.pricing.keys(codes, masks), return_index=True)
        first.sort()
        self.needs_of_value[value] = Needs(self.pricing.interned(codes[first]), self.pricing.interned(masks[first]))
        self.at_value[value] = self._add(f"{value}, read", self.pricing.zeros(len(first)), None)

    def parameter_copies(self, value: str) -> list[tuple[int, str]]:
        """Returns ``(copy, name)`` of every parameter that a parameter of the problem stands for."""
        uses = self.folded.uses[value]
        if len({u.node for u in uses}) > 1 or uses[0].node not in self.folded.block_of:
            return [(0, value)]
        return [(copy, self.graph.nodes[node].inputs[uses[0].slot]) for copy, node in self.folded.copies(uses[0].node)]

    # -- edges ------------------------------------------------------------------------------------------------------

    def needs(self, use: Use) -> Needs:
        table = self.tables[use.node]
        return Needs(table.inputs[use.slot], table.gradients[use.slot])

    def source(self, value: str) -> tuple[int, Codes] | None:
        """Returns the variable for a value's layout, and its codes; ``None`` where that is given."""
        if value in self.at_parameter:
            return self.at_parameter[value], self.stored[value]
        producer = self.folded.producer.get(value)
        if producer is None:
            return None
        return self.at_site[producer], self.tables[producer].outputs[self.graph.nodes[producer].outputs.index(value)]

    def _connect(self, value: str, use: Use, carried: dict[Block, list[Edge]]) -> None:
        """Adds the edge from a value, or from its shared reading, to one reader."""
        reader = self.at_site[use.node]
        grad, meta = value in self.graph.needs_grad, self.graph.metas[value]
        keeps = use.slot in self.saved_of(use.node).inputs
        needs = self.needs(use)
        if value in self.at_value:
            start, state = self.at_value[value], self.needs_of_value[value]
            cost, memory = self.pricing.read(meta, state.codes, state.gradients, needs.codes, needs.gradients, grad, keeps)
        else:
            found = self.source(value)
            if found is None:
                return  # it is given: its price stands at the reader
            start, codes = found
            stored = value in self.parameters
            cost, memory = self.pricing.move(
                meta, codes, needs.codes, needs.gradients, grad, keeps, stored, self.counted(value)
            )
        weighed = None if memory is None else self.pricing.scaled(memory, self.activations)
        scope = "every" if use.scope == "carried" else use.scope
        edge = Edge(start, reader, cost, weighed, scope)
        if use.scope == "carried":
            carried[self.folded.block_of[use.node]].append(edge)
        else:
            self.edges.append(edge)

    def counted(self, value: str) -> bool:
        """Tells whether a value's memory is counted where it is made: stored, or kept by its operator."""
        if value in self.parameters:
            return True
        producer = self.folded.producer[value]
        return self.graph.nodes[producer].outputs.index(value) in self.saved_of(producer).outputs

    def _connect_value(self, value: str, at: int) -> None:
        """Adds the edge from a value to its shared reading."""
        found = self.source(value)
        if found is None:
            return
        start, codes = found
        state = self.needs_of_value[value]
        keeps = any(u.slot in self.saved_of(u.node).inputs for u in self.folded.uses[value])
        cost, memory = self.pricing.move(
            self.graph.metas[value], codes, state.codes, state.gradients, value in self.graph.needs_grad, keeps,
            value in self.parameters, self.counted(value),
        )  # fmt: skip
        weighed = None if memory is None else self.pricing.scaled(memory, self.activations)
        self.edges.append(Edge(start, at, cost, weighed))


def stored_codes(meta: TensorMeta, mesh: Mesh) -> Codes:
    """Lists the layouts a parameter may be stored in: every axis replicates it or splits one dim, no piece empty."""
    if not mesh.axes:
        return np.zeros((1, 0), dtype=np.int8)
    options = [range(REPLICATED, len(meta.shape)) if size > 1 else (REPLICATED,) for size in mesh.sizes]
    grid = np.stack(np.meshgrid(*options, indexing="ij"), axis=-1).reshape(-1, len(mesh.axes)).astype(np.int8)
    counts = np.asarray(mesh.sizes, dtype=float)
    fine = np.ones(len(grid), dtype=bool)
    for dim, size in enumerate(meta.shape):
        ways = np.where(grid == dim, counts, 1.0).prod(axis=1)
        fine &= (ways == 1) | (np.ceil(size / ways) * (ways - 1) < size)
    return grid[fine]
