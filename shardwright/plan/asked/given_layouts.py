"""Learns where values are from the layouts that users gave, before anything is planned.

Layouts are as users wrote them, over device matrices of their own, axes of size 1 included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from shardwright.ir.graph import Graph, Node
from shardwright.ir.layout import Layout
from shardwright.plan.asked.nd_tensor_parallel import product_of, same_axes
from shardwright.plan.choose.follow import propose
from shardwright.rules.registry import signature_of


class GivenLayouts:
    """Layouts of values, learned from nodes that are passed to :meth:`learn` in order.

    Args:
        parameter_plan: the layouts given to parameters by name, and where they were given.

    Attributes:
        of: the known layout of each value.
    """

    def __init__(self, graph: Graph, parameter_plan: Mapping[str, tuple[Any, str]]):
        self.of: dict[str, Layout] = {}
        self.parameters = {i.value for i in graph.inputs if i.kind == "parameter"}
        targets = {i.value: str(i.target) for i in graph.inputs if i.kind == "parameter"}
        self.planned = {value: parameter_plan[name][0] for value, name in targets.items() if name in parameter_plan}

    def reordered(self, node: Node) -> Node:
        """Orders tuples of axes as the product that made the input left them."""
        mark = node.mark
        orders: dict[frozenset[str], tuple[str, ...]] = {}
        if mark is None or not isinstance(mark.in_strategy, tuple):
            return node
        for i, value in enumerate(node.inputs):
            given, have = self.given(node, i), self.of.get(value)
            if not isinstance(given, Layout) or given.dims is None or have is None or given.mesh != have.mesh:
                continue
            for mine, theirs in zip(given.bound, have.bound):
                if mine != theirs and same_axes(mine, theirs) and mine == given.mesh.ordered(mine):
                    orders.setdefault(frozenset(mine), theirs)
        if not orders:
            return node

        def again(strategy: Any) -> Any:
            return tuple(_in_order(entry, orders) for entry in strategy) if isinstance(strategy, tuple) else strategy

        return replace(node, mark=replace(mark, in_strategy=again(mark.in_strategy), out_strategy=again(mark.out_strategy)))

    def learn(self, node: Node) -> None:
        """Records where an operator's outputs are, if the layouts given so far determine it."""
        given = [self.given(node, i) for i in range(len(node.inputs))]
        found = [
            entry if isinstance(entry, Layout) and entry.dims is not None and entry.ndim == len(meta.shape) else None
            for entry, meta in zip(given, node.op.inputs)
        ]
        split: dict[str, Any] = {}
        mesh = next((layout.mesh for layout in found if layout is not None), None)
        signature = signature_of(node.op) if mesh is not None else None
        if mesh is not None and signature is not None:
            for i, layout in enumerate(found):
                if layout is not None and layout.mesh == mesh:
                    propose(split, signature, signature.inputs[i], layout, node.op.inputs[i].shape)
            nothing: tuple[tuple[str, ...], None] = ((), None)
            for value, tensor in zip(node.outputs, signature.outputs):  # as users wrote it, axes of size 1 included
                axes = [split.get(signature.major(factors) or "", nothing)[0] for factors in tensor]
                self.of[value] = Layout.of(mesh, axes)
        if node.mark is not None and not node.mark.is_pin and isinstance(node.mark.out_strategy, tuple):
            said = zip(node.outputs, node.mark.out_strategy)
            self.of.update((v, e) for v, e in said if isinstance(e, Layout) and e.dims is not None)

    def given(self, node: Node, index: int) -> Any:
        """Returns the layout given for an operator's input: to it, to its function or module, or to a parameter."""
        if index >= len(node.inputs):
            return None
        value = node.inputs[index]
        if node.mark is not None and isinstance(node.mark.in_strategy, tuple):
            position = node.mark_positions[index]
            return node.mark.in_strategy[position] if position is not None and position < len(node.mark.in_strategy) else None
        if value in self.planned:
            return self.planned[value]
        strategy = node.region.in_strategy if node.region is not None else None
        if value in self.parameters and isinstance(strategy, tuple) and len(strategy) > 1 and product_of(node.op) is not None:
            return strategy[1]  # of a module: its input, then its weight
        return self.of.get(value)


def _in_order(entry: Any, orders: Mapping[frozenset[str], tuple[str, ...]]) -> Any:
    if not isinstance(entry, Layout) or entry.dims is None:
        return entry
    dims = [orders.get(frozenset(a), a) if a == entry.mesh.ordered(a) else a for a in entry.bound]
    return Layout.of(entry.mesh, dims, entry.partial, entry.sizes)
