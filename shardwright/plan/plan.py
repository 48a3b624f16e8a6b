"""Plan: a choice for every operator and a layout for every value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shardwright.capture.graph import Graph
from shardwright.layout import Layout
from shardwright.mesh import Mesh
from shardwright.partition.schedule import Schedule
from shardwright.plan.choice import Choice
from shardwright.rules.signature import Signature

# What changes a local program without changing what it computes.
ProgramPass = Callable[["LocalProgram"], "LocalProgram"]

if TYPE_CHECKING:
    import os

    from shardwright.cost.machine import Machine
    from shardwright.partition.program import LocalProgram
    from shardwright.plan.diff import PlanDiff
    from shardwright.plan.explain import Explanation
    from shardwright.plan.memory import MemoryTimeline
    from shardwright.plan.price import PlanPrice
    from shardwright.plan.summary import PlanSummary


@dataclass(frozen=True)
class Search:
    """How a search found a plan.

    Args:
        seconds: modelled time of a step.
        bound: no plan on this mesh, under this memory limit, takes less, by the same model; 0 where nothing is certified.
        method: what solved it.
        tried: mesh and seconds of the best plan on each mesh that was looked at.
        planning: seconds that planning took in all; ``building`` of them to write the problem of the mesh that won, and
            ``solving`` to solve it.
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
        """The share of the plan's time by which the optimum might be better; 0 where the plan is optimal."""
        return 0.0 if self.seconds <= 0 else max(0.0, (self.seconds - self.bound) / self.seconds)


@dataclass(frozen=True)
class Plan:
    """A choice for every operator, a layout for every edge.

    Args:
        mesh: the main mesh; strategies that cannot be named on it bring their own.
        choices, signatures: by node name.
        input_layouts: layout of every graph input as the program receives it (parameters: as stored).
        notes: what a user should know: operators that run replicated and why.
        machine: what it is priced on.
        search: how it was found, where a search found it.
        states: bytes of optimizer state a byte of parameter.
        full_batch: whether every rank is handed the whole batch.
        memory_limit: bytes a rank may use, where that was asked for.
        passes: what the local program goes through before it runs, such as what is computed again in the backward.
        schedule: which of its moves share collectives, and which start early.
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
    states: float = 2.0
    full_batch: bool = True
    memory_limit: float | None = None
    passes: tuple[ProgramPass, ...] = field(default=(), compare=False, repr=False)
    schedule: Schedule = field(default_factory=Schedule, compare=False, repr=False)
    _cache: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def attach(self, program: LocalProgram) -> None:
        """Remembers the local program of this plan, for the collectives it prints."""
        self._cache["program"] = program

    @property
    def program(self) -> LocalProgram | None:
        return self._cache.get("program")

    def priced_on(self, machine: Machine | str) -> PlanPrice:
        """What a step of this plan costs on a machine."""
        from shardwright.cost.machine import load_machine
        from shardwright.plan.price import price_plan
        from shardwright.plan.price_again import with_again

        chosen = load_machine(machine)
        return with_again(self, price_plan(self, chosen, self.full_batch, self.states), chosen)

    @property
    def price(self) -> PlanPrice:
        """What a step costs on the plan's machine, ``cpu-gloo`` where none was named."""
        if "price" not in self._cache:
            self._cache["price"] = self.priced_on(self.machine or "cpu-gloo")
        return self._cache["price"]  # type: ignore[no-any-return]

    @property
    def memory(self) -> MemoryTimeline:
        """What a rank needs over a step."""
        if "memory" not in self._cache:
            from shardwright.plan.memory import memory_of

            device = self.machine.device if self.machine is not None else "cpu"
            self._cache["memory"] = memory_of(self, self.states, device)
        return self._cache["memory"]  # type: ignore[no-any-return]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan to a file that a person can read and edit; see ``docs/plan_files.md``."""
        from shardwright.plan.files import save_plan

        save_plan(self, path)

    def diff(self, other: Plan) -> PlanDiff:
        """Where another plan differs from this one; falsy where it does not."""
        from shardwright.plan.diff import diff_plans

        return diff_plans(self, other)

    def explain(self, name: str) -> Explanation:
        """Why operators run as they do, what they cost and what else they could do.

        Args:
            name: a module, a node, an operator as plan files call it, a parameter, or a pattern for these.
        """
        from shardwright.plan.explain import explain

        return explain(self, name)

    def summary(self) -> PlanSummary:
        """The plan on one page: what a step costs and where, what a rank holds, how much of the work is really split."""
        from shardwright.plan.summary import summary_of

        return summary_of(self)

    def __str__(self) -> str:
        from shardwright.plan.table import plan_table

        return plan_table(self)
