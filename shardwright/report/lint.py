"""Finds operators that nobody configured and that a strategy would serve better.

Propagation makes redistributions small, not steps short, so a few operators are best configured by hand: those that carry
weights, those that change dims, those at the boundary between two ways to split, and fused ones. The lint reports those of
them where it pays: that redistribute, that hold a large weight whole, or that do large work several times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import functional

from shardwright.base.operators import without_library
from shardwright.base.text import bytes_text
from shardwright.ir.choice import Choice
from shardwright.ir.graph import Node, is_configured
from shardwright.ir.layout_text import Counts, counts_of
from shardwright.ir.plan import Plan
from shardwright.plan.choose.candidates import reducing, share_of
from shardwright.plan.choose.edges import Edge, edges_of
from shardwright.plan.choose.follow import choice_for_output, follow
from shardwright.redistribute.volume import largest
from shardwright.rules.traits import traits_of


@dataclass(frozen=True)
class Finding:
    """One operator that would be better configured.

    Args:
        operator: the name that the user knows; ``line``: ``file:line`` of its call, where that is known.
        kind: ``weights``, ``dimensions``, ``boundary`` or ``fusion``: the reason to configure it.
        strategy: its present strategy: slice counts of each tensor input, in the operator's order.
        bytes: bytes that the busiest rank sends to redistribute its tensors in a step, forward and backward.
        why: what is wrong with it.
        annotation: the code to write.
    """

    operator: str
    line: str
    kind: str
    strategy: tuple[Counts, ...]
    bytes: int
    why: str
    annotation: str

    def __str__(self) -> str:
        return f"{self.operator}: not configured, runs as {self.strategy}; {self.why}\n    add: {self.annotation}"


def lint(plan: Plan, share: float = 0.01, large: int = 2**24) -> tuple[Finding, ...]:
    """Finds the operators of a plan that would be better configured, the most expensive first.

    Args:
        plan: the plan.
        share: a redistribution counts if it sends at least this share of the bytes of a step, and work that is done
            several times if it is at least this share of all operators' work.
        large: bytes of a weight that should not be whole on every rank.

    >>> import torch, shardwright as sw
    >>> matmul = sw.shard(torch.matmul, in_strategy=((1, 4), (4, 2)))
    >>> net = sw.AutoParallel(lambda x, w: torch.softmax(matmul(x, w), -1), "semi_auto")
    >>> for finding in lint(net.compile(torch.ones(16, 64), torch.ones(64, 32)).plan):
    ...     print(finding.kind, finding.strategy, finding.bytes)
    boundary ((8, 1),) 128
    """
    return _Lint(plan, share, large).run()


class _Lint:
    def __init__(self, plan: Plan, share: float, large: int):
        self.plan, self.share, self.large = plan, share, large
        self.parameters = {i.value: i for i in plan.graph.inputs if i.kind == "parameter"}
        self.maker = {value: node for node in plan.graph.nodes for value in node.outputs}
        self.edges = list(edges_of(plan))
        self.works = {node.name: self._work(node) for node in plan.graph.nodes}

    def run(self) -> tuple[Finding, ...]:
        prices, of_step = self._prices()
        found = []
        for node in self.plan.graph.nodes:
            if is_configured(node):
                continue
            edges = prices.get(node.name, [])
            price = sum(edge.forward_bytes + edge.backward_bytes for edge in edges)
            finding = None
            if price and price >= self.share * of_step:
                finding = self._of_edges(node, edges, price)
            finding = finding or self._of_weight(node) or self._of_work(node)
            if finding is not None:
                found.append(finding)
        return tuple(sorted(found, key=lambda f: -f.bytes))

    # -- the findings -------------------------------------------------------------------------------------------------

    def _prices(self) -> tuple[dict[str, list[Edge]], int]:
        """Finds edges along which pieces change, by the operator to configure. Sums the bytes of a step too."""
        found: dict[str, list[Edge]] = {}
        total, seen = 0, set()
        for edge in self.edges:
            key = (edge.value, edge.target, edge.gradient)
            if key in seen:
                continue  # readers that want the same share it
            seen.add(key)
            total += edge.forward_bytes + edge.backward_bytes
            if edge.producer is None or not edge.changes_pieces:
                continue
            for node in (edge.reader, edge.producer):
                if not is_configured(node):
                    found.setdefault(node.name, []).append(edge)
                    break
        return found, total

    def _of_edges(self, node: Node, edges: Sequence[Edge], price: int) -> Finding | None:
        """Finds redistribution at an operator. A boundary that the user wants, or that shares out the work, does not count."""
        worst = max(edges, key=lambda edge: edge.forward_bytes + edge.backward_bytes)
        better = self._in_place(node, edges)
        signature, now = self.plan.signatures[node.name], self.plan.choices[node.name]
        free = [e for e in edges if not is_configured(e.reader if e.producer is node else e.producer)]  # type: ignore[arg-type]
        paid = self._price_of(node, now) + sum(edge.forward_bytes + edge.backward_bytes for edge in free)
        dearer = better is not None and self._price_of(node, better) >= paid
        if dearer and self._kind(node) == "boundary":
            return None  # it stands between two operators that are configured differently
        if not any(edge.forward_bytes for edge in edges):
            same = better is None or _counts(better) == _counts(now)
            if same or share_of(better, node.op, signature) > share_of(now, node.op, signature):  # type: ignore[arg-type]
                return None  # ranks take slices so as to share the work, and gather the gradient
        other = worst.producer if worst.reader is node else worst.reader
        assert other is not None
        there = f"{worst.source.short() or '()'} to {worst.target.short() or '()'}"
        why = f"{'reading from' if worst.reader is node else 'handing on to'} {other.where} takes {there}, "
        why += f"{bytes_text(price)} a step"
        if better is None or dearer:
            why += "; nothing costs less there: confirm it, or configure the other one otherwise"
            better = now
        return self._finding(node, price, why, _counts(better))

    def _price_of(self, node: Node, choice: Choice) -> int:
        """Sums the bytes between an operator with another choice and its configured neighbours; others would follow it."""
        total = 0
        for edge in self.edges:
            if edge.reader is node and edge.producer is not None and is_configured(edge.producer):
                target, gradient = choice.inputs[edge.slot], choice.partial_gradient[edge.slot]
                edge = replace(edge, target=target, gradient=gradient)
            elif edge.producer is node and is_configured(edge.reader):
                edge = replace(edge, source=choice.outputs[node.outputs.index(edge.value)])
            else:
                continue
            total += edge.forward_bytes + edge.backward_bytes
        return total

    def _in_place(self, node: Node, edges: Sequence[Edge]) -> Choice | None:
        """Returns the choice that keeps all inputs in place, or makes the layouts that readers want."""
        op, signature = node.op, self.plan.signatures[node.name]
        needs = [value in self.plan.graph.needs_grad for value in node.inputs]
        reads = {edge.slot: edge.source.without_partial() for edge in edges if edge.reader is node}
        if reads:
            now = self.plan.choices[node.name].inputs
            follows = [value not in self.maker for value in node.inputs]  # inputs are given as they are read
            have = [reads.get(i, None if follows[i] else layout) for i, layout in enumerate(now)]
            order = sorted((i for i, layout in enumerate(have) if layout is not None), key=lambda i: i not in reads)
            return reducing(op, signature, follow(op, signature, have, needs, self.plan.mesh, order), needs)
        return choice_for_output(op, signature, edges[0].target.without_partial(), needs, node.outputs.index(edges[0].value))

    def _of_weight(self, node: Node) -> Finding | None:
        """Finds a large weight that is whole on every rank."""
        if self.plan.mesh.size == 1:
            return None
        for slot, value in enumerate(node.inputs):
            if value not in self.parameters or len(self.plan.graph.metas[value].shape) < 2:
                continue
            meta, layout = self.plan.graph.metas[value], self.plan.input_layouts[value]
            counts = self._cut(node, slot)
            if meta.bytes < self.large or not layout.is_replicated or counts is None:
                continue
            name = str(self.parameters[value].target)
            why = f"its weight {name}, {bytes_text(largest(layout, meta.shape) * meta.dtype.itemsize)}, is whole on every rank"
            return self._finding(node, 0, why, counts, f"net.shard({{{name!r}: {counts[slot]}}})")
        return None

    def _of_work(self, node: Node) -> Finding | None:
        """Finds large work of operators with weights, or fused ones, that ranks repeat."""
        slots = [i for i, v in enumerate(node.inputs) if self._is_weight(v)]
        repeats = self.plan.mesh.size // math.prod(self.plan.mesh.axis_size(a) for a in self._axes(node))
        if repeats == 1 or not (slots or traits_of(node.op).fused) or traits_of(node.op).looks_up:
            return None
        if self.works[node.name] < self.share * sum(self.works.values()):
            return None
        counts = self._cut(node, slots[0]) if slots else None
        return self._finding(node, 0, f"{repeats} ranks each do the same work", counts or self._strategy(node))

    def _axes(self, node: Node) -> tuple[str, ...]:
        choice = self.plan.choices[node.name]
        return choice.axes if choice.mesh == self.plan.mesh else self.plan.mesh.axes

    def _work(self, node: Node) -> int:
        return math.prod(self.plan.signatures[node.name].sizes.values()) if node.inputs else 0

    def _is_weight(self, value: str) -> bool:
        """Tells whether a value is a parameter of two dims or more, or its view."""
        while value in self.maker and len(self.maker[value].inputs) == 1:
            value = self.maker[value].inputs[0]
        return value in self.parameters and len(self.plan.graph.metas[value].shape) > 1

    # -- the recommendations --------------------------------------------------------------------------------------------

    def _cut(self, node: Node, slot: int) -> tuple[Counts, ...] | None:
        """Splits a weight by the axes that are idle, or by all where none is."""
        choice, signature = self.plan.choices[node.name], self.plan.signatures[node.name]
        mesh = choice.mesh
        idle = tuple(a for a in mesh.axes if a not in choice.axes and mesh.axis_size(a) > 1)
        kept, axes = (dict(choice.split), idle) if idle else ({}, mesh.axes)
        factors = [signature.major(dim) for dim in signature.inputs[slot]]
        usable = [
            f for f in factors
            if f is not None and signature.splittable(f) and f not in kept and signature.sizes[f] % mesh.count(axes) == 0
        ]  # fmt: skip
        if not usable:
            return None
        factor = min(usable, key=lambda f: (f in signature.summed, -signature.sizes[f]))
        return tuple(counts_of(layout) for layout in signature.layouts(mesh, {**kept, factor: (axes, None)})[0])

    def _strategy(self, node: Node) -> tuple[Counts, ...]:
        return _counts(self.plan.choices[node.name])

    def _kind(self, node: Node) -> str:
        if traits_of(node.op).fused:
            return "fusion"
        if any(self._is_weight(value) for value in node.inputs):
            return "weights"
        largest_input = max((meta for meta in node.op.inputs), key=lambda meta: meta.numel, default=None)
        changes = largest_input is not None and any(meta.shape != largest_input.shape for meta in node.op.outputs)
        return "dimensions" if changes or traits_of(node.op).reorders else "boundary"

    def _finding(self, node: Node, price: int, why: str, counts: tuple[Counts, ...], annotation: str | None = None) -> Finding:
        annotation = annotation or f"sw.shard({_function(node)}, in_strategy={_in_user_order(node, counts)})"
        return Finding(node.where, node.source, self._kind(node), self._strategy(node), price, why, annotation)


def _counts(choice: Choice) -> tuple[Counts, ...]:
    return tuple(counts_of(layout) for layout in choice.inputs)


def _in_user_order(node: Node, counts: tuple[Counts, ...]) -> tuple[Counts, ...]:
    order = traits_of(node.op).user_order or tuple(range(len(counts)))
    return tuple(counts[i] for i in order if i < len(counts))


def _function(node: Node) -> str:
    name = without_library(node.op.name).removesuffix("_loss")
    if hasattr(functional, name):
        return f"F.{name}"
    return f"torch.Tensor.{name}" if hasattr(Tensor, name) and name in ("view", "expand") else f"torch.{name}"
