"""Plan files: a plan, or a part of one, as text that a person can read, compare and edit.

One JSON file, with one line per operator and per parameter. Layouts are written as text over the file's mesh; those over
another mesh name it. An operator is known by the path of its module, its name, and its number among those of that name, so
that a file outlives changes elsewhere in the model. ``"complete": true`` says that every operator of the graph has an entry.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.ir.plan import Search

if TYPE_CHECKING:
    pass

FORMAT, VERSION = "shardwright plan", 1
_ENTRY = {
    "operators": ("inputs", "outputs", "shapes"),
    "parameters": ("layout", "shape", "dtype"),
    "inputs": ("layout", "shape"),
}
_REQUIRED = {"operators": ("inputs",), "parameters": ("layout",), "inputs": ("layout",)}
_KEYS = (
    "format", "version", "devices", "mesh", "mode", "complete", "machine", "states", "memory_limit", "search", "notes",
    *_ENTRY,
)  # fmt: skip


@dataclass(frozen=True)
class OperatorEntry:
    """Layouts of an operator in a file; ``None`` where the file leaves something open."""

    key: str
    line: int
    inputs: tuple[Layout, ...]
    outputs: tuple[Layout, ...] | None
    shapes: str | None


@dataclass(frozen=True)
class TensorEntry:
    """Layout of a parameter, or of an input of the program, in a file."""

    key: str
    line: int
    layout: Layout
    shape: tuple[int, ...] | None


@dataclass(frozen=True)
class PlanFile:
    """A plan file, read and checked as far as can be without a graph.

    Args:
        complete: whether it determines how every operator of its graph runs.
        operators: by key, which may be a pattern; see :func:`operator_keys`.
        parameters: by qualified name.
        inputs: by position.
    """

    path: str
    devices: int
    mesh: Mesh
    mode: str = ""
    complete: bool = False
    machine: str = ""
    states: float | None = None
    memory_limit: float | None = None
    search: Search | None = None
    notes: tuple[str, ...] = ()
    operators: dict[str, OperatorEntry] = field(default_factory=dict)
    parameters: dict[str, TensorEntry] = field(default_factory=dict)
    inputs: dict[str, TensorEntry] = field(default_factory=dict)

    def where(self, entry: OperatorEntry | TensorEntry) -> str:
        return f"{self.path}:{entry.line}"

    def __str__(self) -> str:
        complete = "a complete plan" if self.complete else "a part of a plan"
        return (
            f"{self.path}: {complete} for {self.devices} devices, mesh {self.mesh or '()'}, "
            f"{len(self.operators)} operators, {len(self.parameters)} parameters"
        )


# -- saving ---------------------------------------------------------------------------------------------------------------


# -- loading --------------------------------------------------------------------------------------------------------------
