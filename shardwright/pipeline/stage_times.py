"""Seconds of the stages of a pipeline for one micro-batch, from the prices of their plans."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from shardwright.cost.machine_files import load_machine
from shardwright.ir.graph import Graph
from shardwright.ir.machine import Machine
from shardwright.ir.plan import Plan
from shardwright.pipeline.cut import Stage
from shardwright.pipeline.schedules.clock import StageTimes
from shardwright.plan.price.price_of import price_of

WEIGHT_SHARE = 0.5  # of the backward of an operator with a parameter and another input: as much work as the forward


@dataclass(frozen=True)
class StageCost:
    """Seconds of a stage for a whole batch.

    Args:
        forward, backward, weight: of F, I and W.
        launches: the part of each that does not shrink with the batch.
        unshard, reduce: of the gathers of parameters, and of the sums of their gradients, once per step.
    """

    forward: float
    backward: float
    weight: float
    launches: tuple[float, float, float]
    unshard: float = 0.0
    reduce: float = 0.0

    def of_micro(self, micro: int) -> tuple[float, float, float]:
        """Returns the seconds of F, I and W for one of so many micro-batches."""
        whole = (self.forward, self.backward, self.weight)
        return tuple(  # type: ignore[return-value]
            fixed + max(seconds - fixed, 0.0) / micro for seconds, fixed in zip(whole, self.launches, strict=True)
        )

    def followed_by(self, tail: StageCost) -> StageCost:
        """Returns the cost of the stage with a tail, whose passes run after all forwards of the stage."""
        forward = self.forward + tail.forward + tail.backward + tail.weight
        return replace(self, forward=forward, unshard=self.unshard + tail.unshard, reduce=self.reduce + tail.reduce)


def cost_of(plan: Plan) -> StageCost:
    """Prices a stage's plan, made for the whole batch."""
    price, graph = price_of(plan), plan.graph
    machine = price.machine
    needs = {value for value in graph.needs_grad}
    parameters = {i.value for i in graph.inputs if i.kind == "parameter"}
    forward = backward = weight = 0.0
    fixed = [0.0, 0.0, 0.0]
    for node in graph.nodes:
        own = price.operators.get(node.name)
        if own is None:
            continue
        wanted = [value for value in node.inputs if value in needs]
        of_weights = [value for value in wanted if value in parameters]
        share = 0.0 if not of_weights else 1.0 if len(of_weights) == len(wanted) else WEIGHT_SHARE
        inside = [sum(step.seconds for step in phase) for phase in own.own]
        forward += own.forward + inside[0]
        backward += (1 - share) * own.backward + inside[1]
        weight += share * own.backward
        launch = machine.operator_launch
        fixed[0] += min(launch, own.forward)
        fixed[1] += min(launch, (1 - share) * own.backward)
        fixed[2] += min(launch, share * own.backward)
    for move in price.moves:
        if not move.of_parameter:
            forward += sum(step.seconds for step in move.forward)
            backward += sum(step.seconds for step in move.backward)
            fixed[0] += machine.collective_launch * len(move.forward)
            fixed[1] += machine.collective_launch * len(move.backward)
    once = [move for move in price.moves if move.of_parameter]
    unshard = sum(step.seconds for move in once for step in move.forward)
    reduce = sum(step.seconds for move in once for step in move.backward)
    return StageCost(forward, backward, weight, (fixed[0], fixed[1], fixed[2]), unshard, reduce)


def times_of(
    costs: Sequence[StageCost], stages: Sequence[Stage], graph: Graph, machine: Machine | str | None, sizes: Sequence[float]
) -> StageTimes:
    """Returns the seconds that the schedule is timed with.

    Args:
        costs: of every stage.
        stages: the stages, for what they send each other.
        graph: the whole graph.
        machine: the machine, ``cpu-gloo`` if ``None``.
        sizes: of every micro-batch, its number of samples.
    """
    micro = len(sizes)
    level = load_machine(machine or "cpu-gloo").levels[-1]
    seconds = [cost.of_micro(micro) for cost in costs]
    transfers = []
    for stage in stages[:-1]:
        sent = sum(_bytes(graph, value) for value in stage.sent) / micro
        transfers.append(level.latency + sent / level.bandwidth if stage.sent else 0.0)
    largest = max(sizes)
    factors = [size / largest for size in sizes] if len(set(sizes)) > 1 else ()
    forward, backward, weight = (tuple(part) for part in zip(*seconds, strict=True))
    once = [cost.unshard for cost in costs], [cost.reduce for cost in costs]
    return StageTimes(forward, backward, weight, transfers, factors, (), *once)


def _bytes(graph: Graph, value: str) -> float:
    meta = graph.metas[value]
    return math.prod(meta.shape) * meta.dtype.itemsize


def operator_seconds(plan: Plan) -> Mapping[str, float]:
    """Returns the seconds of every operator of a plan, by node."""
    return {name: own.forward + own.backward for name, own in price_of(plan).operators.items()}


def operator_bytes(plan: Plan) -> Mapping[str, float]:
    """Returns the bytes that a stage has because of every operator of a plan: its parameters thrice, and what it keeps."""
    price, graph = price_of(plan), plan.graph
    parameters = {i.value: _bytes(graph, i.value) for i in graph.inputs if i.kind == "parameter"}
    return {
        node.name: price.operators[node.name].kept + 3 * sum(parameters.get(value, 0.0) for value in node.inputs)
        for node in graph.nodes
        if node.name in price.operators
    }
