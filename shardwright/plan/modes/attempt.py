"""One search on one mesh, and the interface of the planner that makes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from shardwright.ir.mesh import Mesh
from shardwright.plan.choose.tables import ChoiceTable, Codes, Symbol
from shardwright.plan.problem.formulation import Folded, Formulation
from shardwright.search.problem import Problem, Solution


@dataclass
class Attempt:
    """Result of the search on one mesh."""

    mesh: Mesh
    formulation: Formulation
    solution: Solution


class MeshProblem(Protocol):
    """Writes and solves the problem of one mesh, or of some of its axes.

    Args:
        folded: the graph, its repeated blocks once.
        latest: the problem that was written last.
    """

    mesh: Mesh
    folded: Folded
    latest: Formulation

    def table(
        self,
        site: int,
        base: tuple[Symbol, ...] | None = None,
        free: Sequence[int] | None = None,
        among: frozenset[Symbol] | None = None,
    ) -> ChoiceTable:
        """Lists the choices of a site.

        Args:
            site: the operator.
            base, free: where given, only choices that differ from ``base`` on the axes ``free``.
            among: the symbols that axes may have.
        """

    def stored(self, value: str, base: tuple[int, ...] | None = None, free: Sequence[int] | None = None) -> Codes:
        """Returns the codes in which a parameter may be stored."""

    def read_parameters(self) -> list[str]:
        """Returns the parameters that the graph reads."""

    def formulate(self, tables: dict[int, ChoiceTable], stored: dict[str, Codes], gradients: float = 0.0) -> Formulation:
        """Writes the problem of these choices."""

    def find(self, problem: Problem, gap: float) -> Solution:
        """Solves a problem to within a gap."""
