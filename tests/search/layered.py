"""Problems shaped like a transformer: an embedding, layers that repeat, a head."""

from __future__ import annotations

import numpy as np

from shardwright.search.problem import Edge, Node, Problem, Repeat

# One layer: what each of its nodes reads. The last node is the layer's output; "in" is that of the layer before.
BLOCK = (
    ("norm", ["in"]),
    ("q", ["norm"]),
    ("k", ["norm"]),
    ("v", ["norm"]),
    ("q_heads", ["q"]),
    ("k_heads", ["k"]),
    ("v_heads", ["v"]),
    ("attention", ["q_heads", "k_heads", "v_heads"]),
    ("merge", ["attention"]),
    ("o", ["merge"]),
    ("add", ["in", "o"]),
    ("norm2", ["add"]),
    ("gate", ["norm2"]),
    ("up", ["norm2"]),
    ("silu", ["gate"]),
    ("mul", ["silu", "up"]),
    ("down", ["mul"]),
    ("out", ["add", "down"]),
)


def transformer(
    choices: int, count: int, length: int = 60, read: int = 0, seed: int = 0, shared: bool = True, memory: bool = False
) -> Problem:
    """`length` nodes per layer (18 as above, then parameters and pointwise nodes); `read` values go to every layer.

    With `shared`, edges take their arrays from a few kinds, as real layers do.
    """
    rng = np.random.default_rng(seed)
    tables = [(rng.random((choices, choices)) * (1 - np.eye(choices)), None) for _ in range(6 if shared else 1000)]
    if memory:
        tables = [(cost, rng.random(cost.shape) * 0.1) for cost, _ in tables]

    def edge(a: int, b: int, scope: str = "every") -> Edge:
        cost, bytes_ = tables[int(rng.integers(len(tables)))]
        return Edge(a, b, cost, bytes_, scope)

    def node(name: str) -> Node:
        cost = rng.random(choices)
        # Cheap choices tend to take more memory, as replication does.
        return Node(name, cost, (1.2 - cost) * rng.random() + 0.1 * rng.random(choices) if memory else None)

    nodes, edges = [node("embedding")] + [node(f"global{i}") for i in range(read)], []
    start = len(nodes)
    places = {name: start + i for i, (name, _) in enumerate(BLOCK)}
    nodes += [node(name) for name, _ in BLOCK]
    edges += [edge(places[s], places[name]) for name, sources in BLOCK for s in sources if s != "in"]
    carried = [edge(places["out"], places[name]) for name in ("norm", "add")]
    edges += [edge(0, places[name], "first") for name in ("norm", "add")]
    while len(nodes) < start + length:  # a parameter of one node of the block, or a node on a side branch
        edges.append(edge(len(nodes), int(rng.integers(start, len(nodes)))))
        nodes.append(node(f"side{len(nodes)}"))
    for i in range(read):
        edges += [edge(1 + i, places[name]) for name in ("q_heads", "k_heads")]
    edges.append(edge(places["out"], len(nodes), "last"))
    nodes.append(node("head"))
    return Problem(tuple(nodes), tuple(edges), (Repeat(start, length, count, tuple(carried)),))
