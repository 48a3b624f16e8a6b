"""Price of a plan on a machine, with what it computes again; cached for its own machine."""

from __future__ import annotations

from shardwright.cost.machine_files import load_machine
from shardwright.ir.machine import Machine
from shardwright.ir.plan import Plan
from shardwright.plan.price.in_wires import in_wires
from shardwright.plan.price.plan_price import price_plan
from shardwright.plan.price.recomputed import with_again
from shardwright.plan.price.values import PlanPrice


def priced_on(plan: Plan, machine: Machine | str) -> PlanPrice:
    """Prices a step of a plan on a machine.

    Args:
        plan: the plan.
        machine: a :class:`Machine`, a preset's name or a TOML file.

    Raises:
        ShardwrightError: no such machine.
    """
    chosen = load_machine(machine)
    price = in_wires(plan, price_plan(plan, chosen, plan.full_batch, plan.optimizer_bytes_per_byte), chosen)
    return with_again(plan, price, chosen)


def price_of(plan: Plan) -> PlanPrice:
    """Prices a step on the plan's machine, ``cpu-gloo`` where none was named."""
    if "price" not in plan.memo:
        plan.memo["price"] = priced_on(plan, plan.machine or "cpu-gloo")
    return plan.memo["price"]  # type: ignore[no-any-return]
