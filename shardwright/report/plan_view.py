"""Views of a plan, as ``net.plan`` and ``plan_for`` return it: everything that can be asked of it.

A :class:`~shardwright.ir.plan.Plan` is a value and knows none of these.
"""

from __future__ import annotations

import os
from typing import Any

from shardwright.ir.machine import Machine
from shardwright.ir.plan import Plan
from shardwright.ir.program import LocalProgram
from shardwright.plan.file.write import save_plan
from shardwright.plan.memory import MemoryTimeline, step_memory
from shardwright.plan.price.price_of import price_of, priced_on
from shardwright.plan.price.values import PlanPrice
from shardwright.report.diff import PlanDiff, diff_plans
from shardwright.report.explain import Explanation, explain
from shardwright.report.summary import PlanSummary, summary_of
from shardwright.report.table import plan_table


class PlanView:
    """Shows, prices, saves and explains a plan. Attributes of the plan (``mesh``, ``choices``, ...) are read through it.

    Args:
        plan: the plan; ``net.plan.value``.
        program: its local program, for the collectives that its table shows.

    >>> import shardwright as sw, torch
    >>> view = sw.plan_for(2, torch.nn.Linear(8, 8), torch.ones(4, 8), mode="data_parallel")
    >>> view.mesh.size, view.price.seconds > 0
    (2, True)
    """

    def __init__(self, plan: Plan, program: LocalProgram | None = None):
        self.value, self.program = plan, program

    def __getattr__(self, name: str) -> Any:
        if name in ("value", "program") or name.startswith("__"):  # not set yet, as in a copy
            raise AttributeError(name)
        return getattr(self.value, name)

    def priced_on(self, machine: Machine | str) -> PlanPrice:
        """Prices a step of this plan on a machine: a preset's name, a TOML file or a :class:`Machine`."""
        return priced_on(self.value, machine)

    @property
    def price(self) -> PlanPrice:
        """Price of a step on the plan's machine, ``cpu-gloo`` where none was named."""
        return price_of(self.value)

    @property
    def memory(self) -> MemoryTimeline:
        """Memory that a rank needs over a step."""
        return step_memory(self.value)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan to a file that a person can read and edit; see ``docs/plan_files.md``."""
        save_plan(self.value, path)

    def diff(self, other: PlanView | Plan) -> PlanDiff:
        """Compares the plan with another one; the result is falsy where they do not differ."""
        return diff_plans(self.value, other.value if isinstance(other, PlanView) else other)

    def explain(self, name: str) -> Explanation:
        """Explains why operators run as they do, what they cost, and their alternatives.

        Args:
            name: a module, a node, an operator as plan files call it, a parameter, or a pattern for these.
        """
        return explain(self.value, name)

    def summary(self) -> PlanSummary:
        """Sums the plan up: what a step costs and where, the memory of a rank, how much of the work is split."""
        return summary_of(self.value)

    def __eq__(self, other: object) -> bool:
        return self.value == (other.value if isinstance(other, PlanView) else other)

    __hash__ = None  # type: ignore[assignment]  # as a plan's

    def __repr__(self) -> str:
        return repr(self.value)

    def __str__(self) -> str:
        return plan_table(self.value, self.program)
