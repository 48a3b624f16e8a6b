"""Predicts the memory of the rank with the largest pieces, from a plan's choices."""

from __future__ import annotations

from shardwright.cost import algorithms as calibration
from shardwright.ir.plan import Plan
from shardwright.partition.local_program import first_rank_program, local_program
from shardwright.plan.memory.timeline import MemoryTimeline
from shardwright.plan.memory.training_step import OptimizerMemory, TrainingStep
from shardwright.redistribute.planner import Options

_OPTIMIZERS = {
    "adamw": OptimizerMemory(2.0, 2.0),
    "adam": OptimizerMemory(2.0, 2.0),
    "fused adamw": OptimizerMemory(2.0, 0.0),  # updates in place
    "fused adam": OptimizerMemory(2.0, 0.0),
    "sgd": OptimizerMemory(0.0, 0.0),
}


def memory_of(
    plan: Plan, optimizer: str | float | None = 2.0, device: str = "cpu", options: Options | None = None
) -> MemoryTimeline:
    """Predicts the memory of the rank with the largest pieces over a step.

    A step is forward, backward and optimizer, with gradients set to None after it.

    Args:
        plan: with the passes that its program goes through, and its schedule.
        optimizer: ``"adam"``, ``"adamw"``, each also as in ``"fused adamw"``, ``"sgd"``, or bytes of optimizer state per byte
            of parameter; ``None``: no training, only the forward.
        device: the kind of device, which decides what kernels keep and, the CPU having gloo, what collectives need.
        options: which steps redistributions may use, as for the partitioner; default: by the links of the plan's machine.

    Returns:
        Bytes over the step, one point per instruction of the local program and direction.

    Raises:
        KeyError: an optimizer's name that is not one of these.
    """
    program = first_rank_program(plan) if options is None else local_program(plan, options, first_rank_only=True)
    states = _of_optimizer(optimizer)
    choose = calibration.load().choose if device == "cpu" else None
    timeline = TrainingStep(plan.graph, program, states, device, choose, hub=True).run()
    if choose is not None and any(i.starts for i in program.instructions):
        # messages of others to the first rank stay in memory until they wait for the result
        other = TrainingStep(plan.graph, program, states, device, choose, hub=False).run()
        timeline = max(timeline, other, key=lambda t: t.peak)
    return timeline


def step_memory(plan: Plan) -> MemoryTimeline:
    """Predicts the memory of a step on the plan's machine, with the planned optimizer; cached."""
    if "memory" not in plan.memo:
        plan.memo["memory"] = memory_of(
            plan, plan.optimizer_bytes_per_byte, plan.machine.device if plan.machine is not None else "cpu"
        )
    return plan.memo["memory"]  # type: ignore[no-any-return]


def _of_optimizer(optimizer: str | float | None) -> OptimizerMemory | None:
    if isinstance(optimizer, str):
        return _OPTIMIZERS[optimizer]
    return None if optimizer is None else OptimizerMemory(optimizer)
