"""Makes once what all copies make of parameters alone.

A weight that a network transposes or casts would be transposed once per copy. Made once, its gradient is also reduced once,
when the copies' gradients have been added, and not once per copy.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shardwright.ir.graph import Graph
from shardwright.train.copies.turns import draws


def share_between_copies(graph: Graph) -> Graph:
    """Merges equal operators of different copies that read the same parameters."""
    if not any(node.copy is not None for node in graph.nodes):
        return graph
    fixed = {i.value for i in graph.inputs if i.kind != "input"}  # and values made of these alone
    known: dict[Any, tuple[str, ...]] = {}
    same: dict[str, str] = {}
    nodes = []
    for node in graph.nodes:
        node = replace(node, inputs=tuple(same.get(value, value) for value in node.inputs)) if same else node
        if node.copy is not None and node.inputs and all(v in fixed for v in node.inputs) and not draws(node.op):
            key = (id(node.op), node.inputs, id(node.mark), id(node.region), node.autocast, node.grad)
            if key in known:
                same.update(zip(node.outputs, known[key], strict=True))
                continue
            known[key] = node.outputs
            fixed.update(node.outputs)
        nodes.append(node)
    outputs = tuple(same.get(o, o) if isinstance(o, str) else o for o in graph.outputs)
    updates = tuple((name, same.get(value, value)) for name, value in graph.updates)
    later = frozenset(same.get(value, value) for value in graph.read_later)
    return replace(graph, nodes=tuple(nodes), outputs=outputs, updates=updates, read_later=later) if same else graph
