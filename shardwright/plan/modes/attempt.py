"""Attempt: one search on one mesh."""

from __future__ import annotations

from dataclasses import dataclass

from shardwright.ir.mesh import Mesh
from shardwright.plan.problem.formulation import Formulation
from shardwright.search.problem import Solution


@dataclass
class Attempt:
    """What one mesh gave."""

    mesh: Mesh
    formulation: Formulation
    solution: Solution
