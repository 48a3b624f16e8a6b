"""Random problems, and the answer found by trying everything."""

from __future__ import annotations

from itertools import product

import numpy as np

from shardwright.search.problem import Edge, Node, Problem, Repeat


def _table(rng, shape, ties, holes):
    table = rng.integers(0, 4, shape).astype(float) if ties else rng.random(shape)
    if holes:
        table[rng.random(shape) < 0.2] = np.inf
    return table


def random_problem(rng, nodes=4, choices=3, repeats=False, memory=False, density=0.5, holes=None) -> Problem:
    """A random graph; with `repeats`, a stretch of its nodes is a template."""
    ties = bool(rng.integers(2))
    holes = bool(rng.integers(3) == 0) if holes is None else holes
    sizes = [int(rng.integers(1, choices + 1)) for _ in range(nodes)]

    def bytes_(shape):
        if not memory or rng.random() < 0.3:
            return None
        return rng.integers(0, 5, shape).astype(float) if ties else rng.random(shape)

    def edge(a, b, scope="every"):
        shape = sizes[a], sizes[b]
        return Edge(a, b, _table(rng, shape, ties, holes), bytes_(shape), scope)

    blocks = []
    if repeats:
        length = int(rng.integers(1, min(nodes, 3) + 1))
        start = int(rng.integers(0, nodes - length + 1))
        inside = range(start, start + length)
        carried = [edge(a, b) for a in inside for b in inside if rng.random() < 0.4]
        blocks.append(Repeat(start, length, int(rng.integers(1, 6)), tuple(carried)))
    edges = []
    for a in range(nodes):
        for b in range(nodes):
            if a < b and rng.random() < density:
                ends = (a, b) if rng.random() < 0.5 else (b, a)
                edges.append(edge(*ends, scope=str(rng.choice(["every", "first", "last"]))))
    items = tuple(Node(f"n{i}", _table(rng, (n,), ties, holes), bytes_((n,))) for i, n in enumerate(sizes))
    return Problem(items, tuple(edges), tuple(blocks))


def brute_force(problem: Problem) -> tuple[float, float, list[int]]:
    """The least cost within the limit, the least memory of any allowed assignment, and flat choices of the former."""
    flat, _ = problem.unfolded()
    sizes = [len(node.cost) for node in flat.nodes]
    grid = np.array(list(product(*(range(n) for n in sizes))))
    cost, memory = np.zeros(len(grid)), np.zeros(len(grid))
    for at, node in enumerate(flat.nodes):
        cost += node.cost[grid[:, at]]
        memory += node.memory[grid[:, at]] if node.memory is not None else 0
    for edge in flat.edges:
        pair = grid[:, edge.a], grid[:, edge.b]
        cost += edge.cost[pair]
        memory += edge.memory[pair] if edge.memory is not None else 0
    least = float(memory[np.isfinite(cost)].min(initial=np.inf))
    limit = np.inf if problem.limit is None else problem.limit + 1e-12 * abs(problem.limit)
    allowed = np.where(memory <= limit, cost, np.inf)
    return float(allowed.min()), least, grid[int(allowed.argmin())].tolist()


def grid(rng, side: int, choices: int) -> Problem:
    """A square grid of nodes, as wide as its side."""
    edges = []
    for at in range(side * side):
        neighbours = ([at + 1] if (at + 1) % side else []) + ([at + side] if at + side < side * side else [])
        edges += [Edge(at, other, rng.random((choices, choices))) for other in neighbours]
    return Problem(tuple(Node(f"n{i}", rng.random(choices)) for i in range(side * side)), tuple(edges))


def complete(rng, nodes: int, choices: int) -> Problem:
    """Every node joined with every other."""
    edges = [Edge(a, b, rng.random((choices, choices))) for a in range(nodes) for b in range(a)]
    return Problem(tuple(Node(f"n{i}", rng.random(choices)) for i in range(nodes)), tuple(edges))
