"""Request for a plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from shardwright.ir.buckets import MoveBuckets
from shardwright.plan.asked.pins import Pin


@dataclass
class PlanRequest:
    """Everything that is asked of a plan, besides the marks on the graph.

    Args:
        dataset_strategy: ``"full_batch"``, ``"data_parallel"``, or one tuple of slice counts or Layout per input.
        parameter_plan: parameter name -> slice counts or Layout, with the mark's name and line for messages.
        honour_marks: whether strategies are followed (not in ``data_parallel`` mode).
        machine: a :class:`~shardwright.ir.machine.Machine`, the name of one, or a TOML file; plans are priced on it.
        memory_limit: bytes that a rank may use over a step; ``None``: no limit.
        mesh, mesh_axes: the device matrix to plan on and its aliases; ``None``: several are tried.
        optimizer_bytes_per_byte: bytes of optimizer state per byte of parameter.
        seconds: how long a search may take.
        operator_plan: how nodes are to run, by name, as a plan file says; it replaces what the nodes' marks ask for.
        on_first_rank: makes a value once for all processes of a job: the result of a search may depend on the clock, and
            processes that had different plans would wait for each other for ever.
        schedule: which moves share collectives, and which start early.
        stored: parameters whose layout in ``parameter_plan`` is also how they are stored, whatever their readers want.
        tell: called with a text that says what is being done.
    """

    world_size: int
    dataset_strategy: Any = "full_batch"
    parameter_plan: dict[str, tuple[Any, str]] = field(default_factory=dict)
    honour_marks: bool = True
    mode: str = "semi_auto"
    machine: Any = "cpu-gloo"
    memory_limit: float | None = None
    mesh: tuple[int, ...] | None = None
    mesh_axes: tuple[str, ...] = ()
    optimizer_bytes_per_byte: float = 2.0
    seconds: float = 30.0
    operator_plan: dict[str, Pin] = field(default_factory=dict)
    stored: frozenset[str] = frozenset()
    schedule: MoveBuckets = field(default_factory=MoveBuckets)
    on_first_rank: Callable[[Callable[[], Any]], Any] = lambda make: make()
    tell: Callable[[str], None] = lambda text: None
