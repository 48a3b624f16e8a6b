"""Plan: a choice for every operator and a layout for every value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from shardwright.ir.buckets import MoveBuckets
from shardwright.ir.choice import Choice
from shardwright.ir.graph import Graph
from shardwright.ir.layout import Layout
from shardwright.ir.machine import Machine
from shardwright.ir.mesh import Mesh
from shardwright.ir.program import LocalProgram
from shardwright.ir.signature import Signature


@dataclass(frozen=True)
class ProgramPass:
    """One change of a local program that leaves what it computes.

    Args:
        name: as in the table ``train/passes.py``.
        change: given the program and its plan, returns the changed program.
        after_overlap: whether it runs after moves are fused and started early, instead of before.
    """

    name: str
    change: Callable[[LocalProgram, Plan], LocalProgram]
    after_overlap: bool = False


@dataclass(frozen=True)
class Search:
    """A search that found a plan.

    Args:
        seconds: modelled time per step.
        bound: lower bound of the modelled time of any plan on this mesh under this memory limit; 0 without a proof.
        method: name of the solver.
        tried: mesh and seconds of the best plan on each mesh that was tried.
        planning: seconds that all of planning took.
        building: seconds of them to write the problem of the mesh that won.
        solving: seconds of them to solve it.
    """

    seconds: float
    bound: float
    method: str
    tried: tuple[tuple[tuple[int, ...], float], ...] = ()
    planning: float = 0.0
    building: float = 0.0
    solving: float = 0.0

    @property
    def gap(self) -> float:
        """The share of the plan's time by which the optimum might be better; 0 if the plan is optimal."""
        return 0.0 if self.seconds <= 0 else max(0.0, (self.seconds - self.bound) / self.seconds)


@dataclass(frozen=True)
class Plan:
    """A choice for every operator, and a layout for every value that passes between operators.

    Args:
        mesh: the main mesh; strategies that need other axes bring their own.
        choices, signatures: by node name.
        input_layouts: layout of every graph input as the program receives it (parameters: as stored).
        notes: what a user should know: operators that run replicated and why.
        machine: what it is priced on.
        search: how it was found, where a search found it.
        optimizer_bytes_per_byte: bytes of optimizer state a byte of parameter.
        full_batch: whether every rank is handed the whole batch.
        memory_limit: bytes a rank may use, where that was asked for.
        enable_alltoall: whether moves may be all-to-alls.
        passes: passes over the local program before it runs, in order, such as recomputation in the backward pass.
        schedule: which of its moves share collectives, and which start early.
        memo: cached results of computations on it.
    """

    graph: Graph
    mesh: Mesh
    choices: dict[str, Choice]
    signatures: dict[str, Signature]
    input_layouts: dict[str, Layout]
    notes: tuple[str, ...] = ()
    mode: str = "semi_auto"
    machine: Machine | None = None
    search: Search | None = None
    optimizer_bytes_per_byte: float = 2.0
    full_batch: bool = True
    memory_limit: float | None = None
    enable_alltoall: bool = True
    passes: tuple[ProgramPass, ...] = field(default=(), compare=False, repr=False)
    schedule: MoveBuckets = field(default_factory=MoveBuckets, compare=False, repr=False)
    memo: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)
