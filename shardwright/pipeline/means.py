"""Rewrites means whose count depends on the data, so that micro-batches can add up.

The mean of a cross entropy divides by the number of targets that are not ignored, or by their weights, of the whole batch. It
becomes the sum, divided by that number, which every rank counts from the targets before the first micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from shardwright.capture.capture import capture
from shardwright.capture.closure import FunctionModule
from shardwright.ir.graph import Graph, Node
from shardwright.ir.operator import Operator, Slot
from shardwright.rules.loss import MEAN, SUM, count_depends_on_data
from shardwright.rules.pointwise import DIVIDE


def with_counted_means(graph: Graph) -> Graph:
    """Replaces means of losses by sums and divisors."""
    nodes: list[Node] = []
    for node in graph.nodes:
        nodes += _in_two(node) if count_depends_on_data(node.op) and node.op.argument("reduction") == MEAN else [node]
    return graph if len(nodes) == len(graph.nodes) else replace(graph, nodes=tuple(nodes), metas={})


def _in_two(node: Node) -> list[Node]:
    op = node.op
    summed = f"{node.outputs[0]}_sum"
    names = [argument.name for argument in op.target._schema.arguments]  # type: ignore[attr-defined]
    place = names.index("reduction")
    args = list(op.args)
    kwargs = dict(op.kwargs)
    if place < len(args):
        args[place] = SUM
    else:
        kwargs["reduction"] = SUM
    whole = Operator(op.target, tuple(args), kwargs, op.inputs, op.outputs, op.returns_sequence)
    weight = op.argument("weight")
    values = [node.inputs[1], *([node.inputs[weight.index]] if isinstance(weight, Slot) else [])]
    metas = [op.inputs[1], *([op.inputs[weight.index]] if isinstance(weight, Slot) else [])]
    ignored, dtype = op.argument("ignore_index"), op.outputs[0].dtype

    def count(target: Tensor, *weights: Tensor) -> Tensor:
        counted = target != ignored
        if not weights:
            return counted.sum().to(dtype)
        return torch.where(counted, weights[0][torch.where(counted, target, 0)], 0).sum().to(dtype)

    made, total = _spliced(count, node, values, metas)
    divide = Operator(DIVIDE, (Slot(0), Slot(1)), {}, (op.outputs[0], op.outputs[0]), op.outputs)
    return [
        *made,
        replace(node, op=whole, outputs=(summed,)),
        Node(f"{node.name}_mean", divide, (summed, total), node.outputs, node.module, node.source, grad=node.grad),
    ]


def _spliced(function: object, node: Node, values: Sequence[str], metas: Sequence[object]) -> tuple[list[Node], str]:
    """Captures a function of some values of a graph, as nodes of it; returns them and the value that they make."""
    fakes = tuple(torch.empty(m.shape, dtype=m.dtype, device="meta") for m in metas)  # type: ignore[attr-defined]
    device = metas[0].device or torch.device("cpu")  # type: ignore[attr-defined]
    with torch.no_grad():
        part = capture(FunctionModule(function), fakes, {}, device)  # type: ignore[arg-type]
    names = {i.value: values[i.target] for i in part.inputs if isinstance(i.target, int)}  # type: ignore[index]
    names |= {v: f"{node.name}_count_{v}" for n in part.nodes for v in n.outputs}
    found = [
        replace(
            n, name=f"{node.name}_count_{n.name}", inputs=tuple(names[v] for v in n.inputs),
            outputs=tuple(names[v] for v in n.outputs), module=node.module, source=node.source, grad=False,
        )
        for n in part.nodes
    ]  # fmt: skip
    return found, names[part.outputs[0]]
