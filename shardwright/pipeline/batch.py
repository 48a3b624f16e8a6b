"""Finds where the batch is in the values of a graph: which dims of inputs carry it, and where reshapes have taken it.

The rules say which dims of an operator's tensors are one dim of the operator. From the batch of the first input on, these are
followed to other values, forwards and backwards, so an input carries the batch where one of its dims meets it: whatever its
dim 0 is as long as.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from shardwright.ir.graph import Graph, GraphInput, Node
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.ir.pieces import chunk_pieces
from shardwright.ir.signature import Signature, TensorFactors
from shardwright.pipeline.stages import free_nodes
from shardwright.rules.registry import signature_of
from shardwright.rules.traits import traits_of


class Place(NamedTuple):
    """A place of the batch in a tensor: dim ``dim`` counts ``outer x batch x inner`` entries, the last ones fastest."""

    dim: int
    outer: int = 1
    inner: int = 1


Places = dict[str, dict[Place, None]]  # by value, in the order in which they are found


def batch_input(graph: Graph) -> GraphInput | None:
    """Returns the input that says how large the batch is: the first one with dims."""
    return next((i for i in graph.inputs if i.kind == "input" and i.meta.shape), None)


@dataclass(frozen=True)
class Batch:
    """The batch of a graph, and the places that it has in its values.

    Args:
        graph: the graph.
        dim: the dim of its first input that is the batch.
    """

    graph: Graph
    dim: int = 0

    @cached_property
    def size(self) -> int:
        """The number of samples."""
        first = batch_input(self.graph)
        return 0 if first is None or self.dim >= len(first.meta.shape) else first.meta.shape[self.dim]

    @cached_property
    def places(self) -> Mapping[str, Place]:
        """The place of the batch in every value that has it in one place."""
        return {value: next(iter(found)) for value, found in self._found.items() if len(found) == 1}

    def with_graph(self, graph: Graph) -> Batch:
        """Returns the same batch in another form of the graph."""
        return self if graph is self.graph else replace(self, graph=graph)

    def layouts(self, axis: str, count: int) -> dict[str, Layout]:
        """Returns how inputs are cut into micro-batches; others are there whole for each of them.

        Args:
            axis: the axis of micro-batches.
            count: their number.
        """
        mesh = Mesh((axis,), (count,))
        found = {}
        for graph_input in self.graph.inputs:
            place = self.places.get(graph_input.value)
            if graph_input.kind != "input" or place is None or place.outer > 1:
                continue
            dims = range(len(graph_input.meta.shape))
            pieces = tuple(piece * place.inner for piece in chunk_pieces(self.size, (count,)))
            layout = Layout.of(
                mesh, [(axis,) if d == place.dim else () for d in dims], (), [pieces if d == place.dim else None for d in dims]
            )
            found[graph_input.value] = layout.normal(graph_input.meta.shape)
        return found

    # -- following ----------------------------------------------------------------------------------------------------

    @cached_property
    def _found(self) -> Places:
        """The places of the batch in all values."""
        first = batch_input(self.graph)
        if first is None or not self.size:
            return {}
        found = self._spread(first.value, Place(self.dim))
        found[first.value] = {Place(self.dim): None}
        waiting = [i for i in self.graph.inputs if i.kind == "input" and i is not first]
        while (known := self._next(waiting, found)) is not None:
            waiting.remove(known)
            ((place, _),) = found[known.value].items()
            own = self._spread(known.value, place)
            if any(value in found and not found[value].keys() >= places.keys() for value, places in own.items()):
                del found[known.value]  # elsewhere its dim is another one: its readers cut it, each as it needs it
            else:
                found |= own
        for graph_input in waiting:
            if graph_input.value not in found and self._is_encoded(graph_input, found):
                for value, places in self._spread(graph_input.value, Place(self.dim)).items():
                    found.setdefault(value, {}).update(places)
        return found

    def _next(self, waiting: Sequence[GraphInput], found: Places) -> GraphInput | None:
        """Returns an input that the batch has been followed to, and not been followed from."""
        return next((i for i in waiting if len(found.get(i.value, ())) == 1), None)

    def _is_encoded(self, graph_input: GraphInput, found: Places) -> bool:
        """Tells whether an input that never meets the batch has as many samples, encoded by themselves, such as texts.

        Args:
            graph_input: the input.
            found: where the batch is.
        """
        if graph_input.meta.shape[self.dim : self.dim + 1] != (self.size,):
            return False
        own, after = self._spread(graph_input.value, Place(self.dim)), self._after(graph_input.value)
        if any(value in found and value not in after for value in own):
            return False  # it is as long as another dim of what carries the batch
        return any(value in self._computed and value not in found for value in own)

    @cached_property
    def _readers(self) -> Mapping[str, list[Node]]:
        """By value, the operators that read or make it."""
        found: dict[str, list[Node]] = {}
        for node in self.graph.nodes:
            for value in dict.fromkeys((*node.inputs, *node.outputs)):
                found.setdefault(value, []).append(node)
        return found

    @cached_property
    def _computed(self) -> frozenset[str]:
        """The values that no stage computes for itself, of the whole batch."""
        free = free_nodes(self.graph)
        return frozenset(value for node in self.graph.nodes if node.name not in free for value in node.outputs)

    def _after(self, value: str) -> set[str]:
        """Returns a value and all that depend on it."""
        found = {value}
        for node in self.graph.nodes:
            if found.intersection(node.inputs):
                found.update(node.outputs)
        return found

    def _spread(self, value: str, place: Place) -> Places:
        """Follows one dim of an input to all values that have it, up to other inputs.

        Args:
            value: the input.
            place: the dim.
        """
        found: Places = {value: {place: None}}
        waiting, ends = [(value, place)], {i.value for i in self.graph.inputs}
        while waiting:
            value, place = waiting.pop()
            for node in self._readers.get(value, ()):
                for other, its in self._related(node, value, place):
                    if its not in found.setdefault(other, {}):
                        found[other][its] = None
                        if other not in ends:
                            waiting.append((other, its))
        return found

    def _related(self, node: Node, value: str, place: Place) -> Iterator[tuple[str, Place]]:
        """Yields where an operator's tensors have what a value has in a place."""
        if is_reshape(node):
            ends = ((node.inputs[0], node.op.inputs[0].shape), (node.outputs[0], node.op.outputs[0].shape))
            for (name, shape), (other, target) in (ends, ends[::-1]):
                if name == value and (moved := reshaped(place, shape, target, self.size)) is not None:
                    yield other, moved
            return
        signature = self._signatures[node.name]
        if signature is None:
            return
        tensors: list[tuple[str, TensorFactors]] = [
            *zip(node.inputs, signature.inputs, strict=True), *zip(node.outputs, signature.outputs, strict=True)
        ]  # fmt: skip
        sizes = signature.sizes
        for name, dims in tensors:
            if name != value or place.dim >= len(dims):
                continue
            within = _within(dims[place.dim], sizes, place, self.size)
            for other, its in tensors if within is not None else ():
                for dim, factors in enumerate(its):
                    if within is not None and within[0] in factors:
                        at = factors.index(within[0])
                        before, behind = _count(factors[:at], sizes), _count(factors[at + 1 :], sizes)
                        yield other, Place(dim, before * within[1], within[2] * behind)

    @cached_property
    def _signatures(self) -> Mapping[str, Signature | None]:
        return {node.name: signature_of(node.op) for node in self.graph.nodes}


def _count(factors: Sequence[str], sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[factor] for factor in factors)


def is_reshape(node: Node) -> bool:
    """Tells whether an operator gives the elements of its first input, in their order, another shape."""
    op = node.op
    return traits_of(op).reshapes and op.argument("dtype") is None and len(op.outputs) == 1 and bool(op.inputs)


def reshaped(place: Place, source: Sequence[int], target: Sequence[int], batch: int) -> Place | None:
    """Returns the place of the batch after a reshape; ``None`` if no dim holds all of it.

    Args:
        place: that before.
        source, target: the shapes before and after.
        batch: its size.

    >>> reshaped(Place(1), (6, 4, 8), (24, 8), 4)
    Place(dim=0, outer=6, inner=1)
    >>> reshaped(Place(0, 6), (24, 8), (6, 4, 8), 4)
    Place(dim=1, outer=1, inner=1)
    """
    if 0 in (*source, *target):
        return None
    before = math.prod(source[: place.dim]) * place.outer
    passed = 1
    for dim, size in enumerate(target):
        outer = before // passed
        if passed * outer == before and size and size % (outer * batch) == 0:
            return Place(dim, outer, size // (outer * batch))
        passed *= size
    return None


def _within(factors: Sequence[str], sizes: Mapping[str, int], place: Place, batch: int) -> tuple[str, int, int] | None:
    """Returns the factor of a dim that has the batch in it, and what this counts outside and inside."""
    passed = 1
    for factor in factors:
        outer = place.outer // passed
        if passed * outer == place.outer and sizes[factor] and sizes[factor] % (outer * batch) == 0:
            return factor, outer, sizes[factor] // (outer * batch)
        passed *= sizes[factor]
    return None
