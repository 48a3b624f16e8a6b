"""Plan: a choice for every operator and a layout for every value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shardwright.capture.graph import Graph
from shardwright.layout import Layout
from shardwright.mesh import Mesh
from shardwright.plan.choice import Choice
from shardwright.rules.signature import Signature

if TYPE_CHECKING:
    from shardwright.partition.program import LocalProgram


@dataclass(frozen=True)
class Plan:
    """A choice for every operator, a layout for every edge.

    Args:
        mesh: the main mesh; strategies that cannot be named on it bring their own.
        choices, signatures: by node name.
        input_layouts: layout of every graph input as the program receives it (parameters: as stored).
        notes: what a user should know: operators that run replicated and why.
    """

    graph: Graph
    mesh: Mesh
    choices: dict[str, Choice]
    signatures: dict[str, Signature]
    input_layouts: dict[str, Layout]
    notes: tuple[str, ...] = ()
    mode: str = "semi_auto"
    _cache: dict[str, object] = field(default_factory=dict, compare=False, repr=False)

    def attach(self, program: LocalProgram) -> None:
        """Remembers the local program of this plan, for the collectives it prints."""
        self._cache["program"] = program

    @property
    def program(self) -> LocalProgram | None:
        return self._cache.get("program")  # type: ignore[return-value]

    def __str__(self) -> str:
        from shardwright.plan.table import plan_table

        return plan_table(self)
