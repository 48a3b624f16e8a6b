"""Cuts a graph into one graph per stage.

A stage's graph has, as inputs, the parameters, buffers and inputs that it reads, and the values that earlier stages send it,
which have the kind ``input`` too; its outputs are the values that it sends, and those of the whole graph's outputs that it
makes. Parameters may be inputs of several stages; then their gradients are those of all of them together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from shardwright.ir.graph import Graph, GraphInput, Node
from shardwright.pipeline.stages import free_nodes


@dataclass(frozen=True)
class Stage:
    """One stage's part of a graph.

    Args:
        index: its number.
        graph: its operators; all of its outputs are read later, so that programs return them as they are split.
        received: the values that earlier stages send it, and which stage makes each.
        sent: the values that it makes for later stages.
        returned: positions, among the whole graph's outputs, of those that it makes.
    """

    index: int
    graph: Graph
    received: Mapping[str, int]
    sent: tuple[str, ...]
    returned: Mapping[int, str]


def cut_graph(graph: Graph, stage_of: Mapping[str, int], count: int) -> list[Stage]:
    """Cuts a graph into stages.

    Args:
        graph: the graph.
        stage_of: the stage of each operator that is not free; free ones run in every stage that reads them.
        count: number of stages.
    """
    free = free_nodes(graph)
    made = {value: stage_of[node.name] for node in graph.nodes if node.name not in free for value in node.outputs}
    home = _homes_of_outputs(graph, made, count)
    parts = [_Part(index, graph, stage_of, free) for index in range(count)]
    for position, output in enumerate(graph.outputs):
        if isinstance(output, str):
            parts[home[output]].needed.add(output)
            parts[home[output]].returned[position] = output
    for name, value in graph.updates:
        parts[home[value]].needed.add(value)
        parts[home[value]].updates.append((name, value))
    for part in reversed(parts):
        part.collect(made, parts)
    return [part.stage() for part in parts]


def _homes_of_outputs(graph: Graph, made: Mapping[str, int], count: int) -> dict[str, int]:
    names = [o for o in graph.outputs if isinstance(o, str)] + [value for _, value in graph.updates]
    return {name: made.get(name, count - 1) for name in names}


class _Part:
    """Collects one stage's operators, from the last to the first."""

    def __init__(self, index: int, graph: Graph, stage_of: Mapping[str, int], free: frozenset[str]):
        self.index, self.graph, self.stage_of, self.free = index, graph, stage_of, free
        self.needed: set[str] = set()
        self.sent: dict[str, None] = {}
        self.received: dict[str, int] = {}
        self.returned: dict[int, str] = {}
        self.updates: list[tuple[str, str]] = []
        self.nodes: list[Node] = []

    def collect(self, made: Mapping[str, int], parts: list[_Part]) -> None:
        for node in reversed(self.graph.nodes):
            own = self.stage_of.get(node.name) == self.index
            if not own and not (node.name in self.free and self.needed.intersection(node.outputs)):
                continue
            self.nodes.append(node)
            for value in node.inputs:
                if made.get(value, self.index) == self.index:
                    self.needed.add(value)
                elif value not in self.received:
                    self.received[value] = made[value]
                    parts[made[value]].sent[value] = None
        self.nodes.reverse()

    def stage(self) -> Stage:
        read = {value for node in self.nodes for value in node.inputs} | set(self.returned.values())
        read |= {value for _, value in self.updates} | {name for name, _ in self.updates}
        sent = tuple(v for node in self.nodes for v in node.outputs if v in self.sent)
        received = [
            GraphInput(value, "input", f"stage {source}: {value}", self.graph.metas[value], value in self.graph.needs_grad)
            for value, source in self.received.items()
        ]
        inputs = [i for i in self.graph.inputs if i.value in read]
        outputs = (*sent, *self.returned.values())
        graph = replace(
            self.graph, inputs=(*inputs, *received), nodes=tuple(self.nodes), outputs=outputs, updates=tuple(self.updates),
            metas={}, read_later=frozenset(outputs), assignments=(),
        )  # fmt: skip
        return Stage(self.index, graph, dict(self.received), sent, dict(self.returned))


def loss_of(graph: Graph) -> int | None:
    """Returns the position of the output that gradients come from: the first, if it is a scalar that needs one."""
    first = graph.outputs[0] if graph.outputs else None
    if isinstance(first, str) and not graph.metas[first].shape and first in graph.needs_grad:
        return 0
    return None


def gives_gradients(graph: Graph, output: str) -> frozenset[str]:
    """Finds the values that a value's gradient reaches.

    Args:
        graph: the graph.
        output: the value.
    """
    found = {output} & graph.needs_grad
    for node in reversed(graph.nodes):
        if not found.isdisjoint(node.outputs):
            found.update(value for value in node.inputs if value in graph.needs_grad)
    return frozenset(found)
