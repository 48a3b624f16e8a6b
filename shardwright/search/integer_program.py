"""Integer program: the same problem for HiGHS, as an independent referee.

A 0/1 variable stands for each choice of each node, a variable in [0, 1] for each pair of choices of an edge. A node
takes one choice; the pairs of an edge add up to the choices at either end (the local polytope).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from shardwright.search.problem import Edge, Infeasible, Node, Problem, Solution


def solve_integer_program(problem: Problem, seconds: float = 60.0, gap: float = 0.0) -> Solution:
    """Solves a problem, including its limit, by scipy's HiGHS.

    Raises:
        TimeoutError: it finds nothing in time.

    >>> from shardwright.search.problem import Edge, Node
    >>> a, b = Node("a", np.array([0.0, 2.0])), Node("b", np.array([1.0, 0.0]))
    >>> solve_integer_program(Problem((a, b), (Edge(0, 1, np.eye(2) * 5),))).choices
    [0, 1]
    """
    flat, places = problem.unfolded()
    program = _Program(flat)
    slack = 1.0
    found: Any = program.run(seconds, gap, slack)
    bound = found.mip_dual_bound
    for slack in (1 - 1e-7, 1 - 1e-6, 1 - 1e-5):  # HiGHS lets a row exceed its limit a little, which is not allowed here
        if found.x is None or problem.fits(flat.price(program.choices(found.x))[1]):
            break
        found = program.run(seconds, gap, slack)
    if found.status == 2:
        raise _infeasible(problem, seconds)
    if found.x is None:
        raise TimeoutError(f"HiGHS found no assignment in {seconds} s: {found.message}")
    choices = problem.folded(program.choices(found.x), places)
    cost, memory = problem.price(choices)
    bound = -np.inf if bound is None else bound * program.scale
    return Solution(choices, cost, min(float(bound), cost), memory, "integer program")


def _infeasible(problem: Problem, seconds: float) -> Infeasible:
    if problem.limit is None:
        return Infeasible(np.inf, [])
    least = solve_integer_program(problem.memory_alone(), seconds)
    return Infeasible(least.cost, least.choices, problem.limit)


class _Program:
    """Sparse matrices of a flat problem."""

    def __init__(self, flat: Problem):
        self.flat = flat
        sizes = [len(node.cost) for node in flat.nodes]
        self.starts = np.concatenate([[0], np.cumsum(sizes)])
        items: list[Node | Edge] = [*flat.nodes, *flat.edges]
        cost = np.concatenate([item.cost.ravel() for item in items])
        self.memory = np.concatenate(
            [(np.zeros_like(item.cost) if item.memory is None else item.memory).ravel() for item in items]
        )
        self.allowed = np.isfinite(cost)
        self.memory[~self.allowed] = 0.0
        # HiGHS has absolute tolerances: scale the prices so that these do not matter.
        self.scale = max(float(np.abs(cost[self.allowed]).max(initial=0.0)), 1e-300) / 1e4
        self.cost = np.where(self.allowed, cost, 0.0) / self.scale
        self._rows()

    def _rows(self) -> None:
        from scipy.sparse import csr_matrix  # type: ignore[import-untyped]

        rows: list[np.ndarray] = []
        columns: list[np.ndarray] = []
        values: list[np.ndarray] = []
        count, column = len(self.flat.nodes), int(self.starts[-1])
        for node in range(count):
            own = np.arange(self.starts[node], self.starts[node + 1])
            rows, columns, values = rows + [np.full(len(own), node)], columns + [own], values + [np.ones(len(own))]
        for edge in self.flat.edges:
            height, width = edge.cost.shape
            pairs = column + np.arange(height * width).reshape(height, width)
            column += height * width
            for end, size, own in ((edge.a, height, pairs), (edge.b, width, pairs.T)):
                these = count + np.arange(size)
                count += size
                rows += [np.repeat(these, own.shape[1]), these]
                columns += [own.ravel(), self.starts[end] + np.arange(size)]
                values += [np.ones(own.size), -np.ones(size)]
        entries = np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))
        self.matrix = csr_matrix(entries, shape=(count, column))
        self.right = (np.arange(count) < len(self.flat.nodes)).astype(float)

    def run(self, seconds: float, gap: float, slack: float) -> Any:
        """Returns HiGHS's result, under the limit times `slack`."""
        from scipy.optimize import Bounds, LinearConstraint, milp  # type: ignore[import-untyped]
        from scipy.sparse import csr_matrix  # type: ignore[import-untyped]

        rules = [LinearConstraint(self.matrix, self.right, self.right)]
        if self.flat.limit is not None:
            unit = max(abs(self.flat.limit), float(np.abs(self.memory).max(initial=0.0)), 1e-300) / 1e3
            rules.append(LinearConstraint(csr_matrix(self.memory / unit), -np.inf, self.flat.limit * slack / unit))
        whole = (np.arange(len(self.cost)) < self.starts[-1]).astype(int)
        options = {"time_limit": seconds, "mip_rel_gap": gap}
        bounds = Bounds(0, self.allowed.astype(float))
        return milp(self.cost, integrality=whole, bounds=bounds, constraints=rules, options=options)

    def choices(self, values: np.ndarray) -> list[int]:
        """Returns the choice of each node."""
        return [int(np.argmax(values[start:end])) for start, end in zip(self.starts, self.starts[1:])]
