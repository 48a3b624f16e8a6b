"""Proves that masks of attention are causal ones, so that slices of a sequence can pass: those made of nothing are computed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shardwright.base.operators import may_draw
from shardwright.base.torch_private import pytree
from shardwright.ir.graph import Graph, Node
from shardwright.ir.operator import Slot
from shardwright.rules.attention import causal_mask, mask_of, without_mask


def with_causal_attention(graph: Graph) -> Graph:
    """Replaces attention under an explicit causal mask by causal attention, where the mask is made of numbers alone.

    Tensors that the model holds count as changing, whether buffers or not: a call may find other values in them.
    """
    constants, nodes = _Constants(graph), []
    known: dict[str, bool] = {}
    for node in graph.nodes:
        at = mask_of(node.op)
        if at is not None:
            value = node.inputs[at]
            if value not in known:
                known[value] = _is_causal(constants.value(value))
            if known[value]:
                inputs = tuple(v for i, v in enumerate(node.inputs) if i != at)
                node = replace(node, op=without_mask(node.op), inputs=inputs)
        nodes.append(node)
    return replace(graph, nodes=tuple(nodes), metas={}) if any(known.values()) else graph


def _is_causal(mask: Tensor | None) -> bool:
    """Tells whether a mask lets every query see its own position and those before, and nothing else."""
    if mask is None or mask.ndim < 2 or mask.shape[-1] != mask.shape[-2]:
        return False
    causal = causal_mask(mask.shape[-2], mask.shape[-1])
    if mask.dtype != torch.bool:
        causal = torch.zeros(causal.shape, dtype=mask.dtype).masked_fill(~causal, -torch.inf)
    return bool((mask.cpu() == causal).all())


class _Constants:
    """Values of a graph that depend on nothing that enters it."""

    def __init__(self, graph: Graph):
        self.makers = {value: node for node in graph.nodes for value in node.outputs}
        self.known: dict[str, Tensor | None] = dict.fromkeys(i.value for i in graph.inputs)

    def value(self, name: str) -> Tensor | None:
        """Computes a value; ``None`` if it is not constant."""
        waiting = [name]
        while waiting:
            node = self.makers.get(waiting[-1])
            missing = [v for v in node.inputs if v not in self.known] if node is not None else []
            if missing and not self._is_open(node):
                waiting += missing
                continue
            if node is not None and waiting[-1] not in self.known:
                self._run(node)
            waiting.pop()
        return self.known[name]

    def _is_open(self, node: Node | None) -> bool:
        """Tells whether some input is known to be no constant, so that the others do not matter."""
        return node is not None and any(self.known.get(v, True) is None for v in node.inputs)

    def _run(self, node: Node) -> None:
        given = [self.known.get(v) for v in node.inputs]
        self.known.update(dict.fromkeys(node.outputs))
        if may_draw(node.op.target) or any(value is None for value in given):
            return

        def read(leaf: Any) -> Any:
            return given[leaf.index] if isinstance(leaf, Slot) else leaf

        args, kwargs = pytree.tree_map(read, (node.op.args, node.op.kwargs))
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        with torch.no_grad():
            made = node.op.target(*args, **kwargs)
        self.known.update(zip(node.outputs, made if isinstance(made, (list, tuple)) else [made], strict=True))
