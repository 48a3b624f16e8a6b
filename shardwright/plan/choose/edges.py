"""Edges of a plan and the bytes that they cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from shardwright.ir.graph import Node
from shardwright.ir.layout import Layout
from shardwright.ir.plan import Plan
from shardwright.ir.redistribution import Redistribution
from shardwright.ir.step import Step
from shardwright.redistribute.planner import Options
from shardwright.redistribute.steps import DEFAULT, redistribution, steps_between
from shardwright.redistribute.volume import lower_bound, sent_elements

Shape = tuple[int, ...]
# -- elements that the busiest rank sends ---------------------------------------------------------------------------------


def sent(steps: tuple[Step, ...], shape: Shape) -> int:
    """Counts the elements that the busiest rank sends in some steps."""
    return sum(sent_elements(step, shape) for step in steps)


@lru_cache(maxsize=65536)
def forward_elements(source: Layout, target: Layout, shape: Shape) -> int:
    """Counts the elements sent to bring a tensor from layout ``source`` to ``target``.

    >>> layout = Layout((2, 2), ("dp", "tp"))
    >>> forward_elements(layout("dp", "None"), layout("dp", "tp"), (8, 8))
    0
    >>> forward_elements(layout("dp", "tp"), layout("dp", "None"), (8, 8))
    16
    """
    return 0 if is_slice(source, target) else sent(steps_between(source, target, shape), shape)


@lru_cache(maxsize=65536)
def backward_elements(source: Layout, target: Layout, shape: Shape, gradient: tuple[str, ...]) -> int:
    """Counts the elements sent to bring back a gradient.

    Args:
        source, target: the layouts of the value and of its reader.
        shape: global shape.
        gradient: axes over which the gradient is partial where it is made.
    """
    if not gradient and is_slice(target, source):
        return 0
    return sent(redistribution(source, target, shape, gradient).backward, shape)


@lru_cache(maxsize=65536)
def least_elements(source: Layout, target: Layout, shape: Shape) -> float:
    """Computes a quick lower bound of :func:`forward_elements`: the elements that ranks lack, divided evenly."""
    return 0.0 if is_slice(source, target) else lower_bound(source, target, shape) / source.mesh.size


def is_slice(source: Layout, target: Layout) -> bool:
    """Tells whether each rank can surely cut its target piece out of its source piece."""
    if source == target:
        return True
    if source.mesh != target.mesh or source.partial != target.partial:
        return False
    return all(
        now == then[: len(now)] if a is None and b is None else now == then and a == b
        for now, then, a, b in zip(source.bound, target.bound, source.sizes, target.sizes)
    )


# -- the edges of a plan --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edge:
    """One reading of a value by an operator.

    Args:
        producer: the node that makes the value; ``None`` for an input of the graph.
        reader, slot: the node that reads it, and the index of the input.
        source, target: the layout of the value, and that in which it is read.
        gradient: axes over which its gradient is partial at the reader.
    """

    value: str
    producer: Node | None
    reader: Node
    slot: int
    source: Layout
    target: Layout
    gradient: tuple[str, ...]
    shape: Shape
    itemsize: int
    needs_grad: bool

    def redistribution(self, enable_alltoall: bool = True) -> Redistribution:
        options = DEFAULT if enable_alltoall else Options(enable_alltoall=False)
        return redistribution(self.source, self.target, self.shape, self.gradient, options)

    @property
    def forward_bytes(self) -> int:
        """Bytes that the busiest rank sends to redistribute the value, including a pending sum."""
        return forward_elements(self.source, self.target, self.shape) * self.itemsize

    @property
    def backward_bytes(self) -> int:
        """Bytes that the busiest rank sends to bring the gradient back."""
        if not self.needs_grad:
            return 0
        return backward_elements(self.source, self.target, self.shape, self.gradient) * self.itemsize

    @property
    def changes_pieces(self) -> bool:
        """Tells whether ranks read other pieces of the value than those they have."""
        shape = self.shape
        return self.source.without_partial().normal(shape) != self.target.without_partial().normal(shape)


def edges_of(plan: Plan) -> Iterator[Edge]:
    """Yields every edge of a plan, in the order of its operators."""
    made = {value: (node, i) for node in plan.graph.nodes for i, value in enumerate(node.outputs)}
    for node in plan.graph.nodes:
        choice = plan.choices[node.name]
        for slot, value in enumerate(node.inputs):
            producer, index = made.get(value, (None, 0))
            source = plan.choices[producer.name].outputs[index] if producer else plan.input_layouts[value]
            meta = plan.graph.metas[value]
            yield Edge(
                value, producer, node, slot, source, choice.inputs[slot], choice.partial_gradient[slot], meta.shape,
                meta.dtype.itemsize, value in plan.graph.needs_grad,
            )  # fmt: skip
