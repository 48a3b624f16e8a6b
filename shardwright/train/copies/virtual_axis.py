"""Runs operators whose Layouts have ``"interleaved_parallel"`` in copies on every device.

The operators from the first to the last such one each run once per copy, on a part of the batch. Each device cuts a value
that enters into the copies, within its own piece, and joins the copies of a value that leaves: neither needs communication.
Inputs without a batch, such as parameters, are shared. Operators in between that cannot run on a part of the batch
(statistics over it, random numbers drawn for all of it) run on the joined value.

Invariants:

- The graph computes what it computed: every operator that runs in copies computes each sample by itself.
- All copies of a graph are of one cut: the batch is ``ways`` blocks, as many as its devices' pieces or more, and copy ``c``
  is the ``c``-th part of every block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from shardwright.base.operators import CAT, RESHAPE, SELECT
from shardwright.capture.names import Names
from shardwright.errors import Problems
from shardwright.ir.graph import Graph, Node
from shardwright.ir.layout import Layout
from shardwright.ir.layout_entries import INTERLEAVED
from shardwright.ir.operator import Operator, Slot, TensorMeta
from shardwright.ir.signature import Signature, TensorFactors
from shardwright.rules.registry import signature_of
from shardwright.train.copies.one_copy import Unfit, meta_of, operator_of_one_copy
from shardwright.train.copies.turns import draws
from shardwright.train.copies.virtual_axis_rules import Cut, check_cut, check_together, cut_layouts


def is_interleaved(graph: Graph) -> bool:
    """Tells whether some operator has a Layout with the virtual axis."""
    return any(True for node in graph.nodes for _ in cut_layouts(node))


def in_copies(graph: Graph, parameter_plan: Mapping[str, tuple[Any, str]]) -> Graph:
    """Puts the operators marked by the virtual axis into copies; a graph without any stays as it is.

    Raises:
        StrategyError: lists every use of the axis that is against its rules.
    """
    problems = Problems()
    for name, (entry, what) in parameter_plan.items():
        if isinstance(entry, Layout) and entry.copies > 1:
            problems.add(f"{what}: parameter {name!r} has {INTERLEAVED!r}, which cuts a batch; write the layout without it")
    cuts = [cut for node in graph.nodes if (cut := check_cut(graph, node, problems)) is not None]
    check_together(cuts, problems)
    problems.raise_if_any("the strategies cannot be followed")
    return _Copies(graph, cuts).graph() if cuts else graph


# -- copies -----------------------------------------------------------------------------------------------------------


class _Copies:
    """Rebuilds the graph, with the operators between the marked ones in copies."""

    def __init__(self, graph: Graph, cuts: Sequence[Cut]):
        self.old, self.cuts = graph, {cut.node.name: cut for cut in cuts}
        self.copies, self.ways = cuts[0].copies, math.lcm(*(cut.ways for cut in cuts))
        self.between = _between(graph, self.cuts)
        self.group = 1 + max((node.copy[0] for node in graph.nodes if node.copy is not None), default=0)
        self.names = Names()
        self.names.taken = {name: 0 for name in graph.metas} | {node.name: 0 for node in graph.nodes}
        self.metas = dict(graph.metas)
        self.nodes: list[Node] = []
        self.parts: dict[tuple[str, int], list[str]] = {}  # value and the dim that is cut -> the value in each copy
        self.made: dict[str, int] = {}  # values that are made in copies -> the dim that is cut
        self.joined: set[str] = set()
        self.problems = Problems()

    def graph(self) -> Graph:
        for node in self.old.nodes:
            if node.name not in self.between or not self._run_in_copies(node):
                self._whole(node.inputs, node)
                self._append(node)
        last = self.old.nodes[-1]
        self._whole([o for o in self.old.outputs if isinstance(o, str)], last)
        self._whole([value for _, value in self.old.updates], last)
        self.problems.raise_if_any("the strategies cannot be followed")
        return replace(self.old, nodes=tuple(self.nodes))

    def _append(self, node: Node) -> None:
        self.nodes.append(node)
        self.metas.update(zip(node.outputs, node.op.outputs, strict=True))

    def _run_in_copies(self, node: Node) -> bool:
        """Writes an operator once per copy; tells whether it can be."""
        signature = signature_of(node.op)
        try:
            if signature is None or draws(node.op):
                raise Unfit("it draws random numbers for the whole batch" if signature else "it has no rule")
            factor = self._batch(node, signature)
            dims = [_dim_of(factor, signature, tensor) for tensor in signature.inputs]
            outputs = [_dim_of(factor, signature, tensor) for tensor in signature.outputs]
            if any(dim is None for dim in outputs):
                raise Unfit("not all of its outputs have the batch")
            metas = [self._part_meta(v, dim) if dim is not None else self.metas[v] for v, dim in zip(node.inputs, dims)]
            op = operator_of_one_copy(node.op, signature, factor, self.copies, metas)
        except Unfit as why:
            if node.name in self.cuts:
                self.problems.add(f"{node.where} cannot run in copies: {why}; remove {INTERLEAVED!r} there")
            return False
        inputs = [
            self._parts(v, dim, node) if dim is not None else [v] * self.copies
            for v, dim in zip(node.inputs, dims, strict=True)
        ]
        made: list[list[str]] = []
        for copy in range(self.copies):
            names = [self.names.new(f"{value}_copy{copy}") for value in node.outputs]
            name = names[0] if len(names) == 1 else self.names.new(f"{node.name}_copy{copy}")
            own = tuple(values[copy] for values in inputs)
            self._append(replace(node, name=name, op=op, inputs=own, outputs=tuple(names), copy=(self.group, copy)))
            made.append(names)
        for value, dim, parts in zip(node.outputs, outputs, zip(*made, strict=True), strict=True):
            assert dim is not None
            self.parts[value, dim], self.made[value] = list(parts), dim
        return True

    def _batch(self, node: Node, signature: Signature) -> str:
        """Returns the factor of an operator that is the batch."""
        if node.name in self.cuts:
            return self.cuts[node.name].factor
        found = {
            signature.major(signature.inputs[i][self.made[value]])
            for i, value in enumerate(node.inputs)
            if value in self.made and len(signature.inputs[i]) > self.made[value]
        }
        if len(found) != 1:
            raise Unfit("it reads no copies" if not found else "it reads copies along several dims")
        factor = found.pop()
        if factor is None or factor in signature.summed or not signature.splittable(factor):
            raise Unfit("it does not compute each sample by itself")
        if signature.sizes[factor] % (self.ways * self.copies):
            raise Unfit(f"its batch of {signature.sizes[factor]} does not divide into {self.ways * self.copies} parts")
        return factor

    # -- entering and leaving -----------------------------------------------------------------------------------------

    def _part_meta(self, value: str, dim: int) -> TensorMeta:
        """Returns the shape of a value in each copy."""
        if self.made.get(value, dim) != dim:
            raise Unfit("it reads copies along several dims")
        if (value, dim) in self.parts:
            return self.metas[self.parts[value, dim][0]]
        meta = self.metas[value]
        shape = (*meta.shape[:dim], meta.shape[dim] // self.copies, *meta.shape[dim + 1 :])
        return replace(meta, shape=shape, stride=())

    def _parts(self, value: str, dim: int, at: Node) -> list[str]:
        """Returns a value in each copy, and cuts it if it is still whole."""
        if (value, dim) not in self.parts:
            shape = self.metas[value].shape
            rest = shape[dim] // (self.ways * self.copies)
            blocks = (*shape[:dim], self.ways, self.copies, rest, *shape[dim + 1 :])
            part = (*shape[:dim], self.ways * rest, *shape[dim + 1 :])
            apart = self._emit(at, f"{value}_parts", RESHAPE, [value], list(blocks))
            found = []
            for copy in range(self.copies):
                one = self._emit(at, f"{value}_part", SELECT, [apart], dim + 1, copy, copy=copy)
                found.append(self._emit(at, f"{value}_copy{copy}", RESHAPE, [one], list(part), copy=copy))
            self.parts[value, dim] = found
        return self.parts[value, dim]

    def _whole(self, values: Sequence[str], at: Node) -> None:
        """Joins the copies of values that are made in copies."""
        for value in values:
            if value not in self.made or value in self.joined:
                continue
            self.joined.add(value)
            dim = self.made[value]
            shape = self.metas[value].shape
            rest = shape[dim] // (self.ways * self.copies)
            blocks = [*shape[:dim], self.ways, 1, rest, *shape[dim + 1 :]]
            apart = [
                self._emit(at, f"{value}_block", RESHAPE, [part], blocks, copy=copy)
                for copy, part in enumerate(self.parts[value, dim])
            ]
            joined = self._emit(at, f"{value}_joined", CAT, [apart], dim + 1)
            self._emit(at, value, RESHAPE, [joined], list(shape), is_name=True, carries_batch=dim == 0)

    def _emit(
        self,
        at: Node,
        hint: str,
        target: Any,
        inputs: Sequence[Any],
        *args: Any,
        copy: int | None = None,
        is_name: bool = False,
        carries_batch: bool = False,
    ) -> str:
        """Writes an operator of our own, on one value or on a list of values.

        Args:
            at: the node that needs it.
            hint: a name for its result.
            target: the operator.
            inputs: the values that it reads.
            copy: the copy that it belongs to.
        """
        values = inputs[0] if isinstance(inputs[0], list) else list(inputs)
        slots: Any = [Slot(i) for i in range(len(values))] if isinstance(inputs[0], list) else Slot(0)
        metas = tuple(self.metas[value] for value in values)
        fakes = [torch.empty(meta.shape, dtype=meta.dtype, device="meta") for meta in metas]
        made = target(fakes if isinstance(slots, list) else fakes[0], *args)
        output: TensorMeta = meta_of(made, metas[0].device)
        name = hint if is_name else self.names.new(hint)
        op = Operator(target, (slots, *args), {}, metas, (output,))
        self._append(
            Node(
                name, op, tuple(values), (name,), at.module, at.source, autocast=at.autocast, grad=at.grad,
                copy=None if copy is None else (self.group, copy), carries_batch=carries_batch,
            )
        )  # fmt: skip
        return name


def _dim_of(factor: str, signature: Signature, tensor: TensorFactors) -> int | None:
    """Returns the dim of a tensor whose outer part is the factor; ``None`` where the tensor lacks it."""
    for dim, factors in enumerate(tensor):
        if factor in factors:
            if signature.major(factors) != factor:
                raise Unfit("its batch is not the outer part of a dim")
            return dim
    return None


def _between(graph: Graph, marked: Mapping[str, Any]) -> set[str]:
    """Finds the operators on the way from one marked operator to another, these included."""
    after: set[str] = set()
    values: set[str] = set()
    for node in graph.nodes:
        if node.name in marked or any(value in values for value in node.inputs):
            after.add(node.name)
            values.update(node.outputs)
    before: set[str] = set()
    wanted: set[str] = set()
    for node in reversed(graph.nodes):
        if node.name in marked or any(value in wanted for value in node.outputs):
            before.add(node.name)
            wanted.update(node.inputs)
    return after & before
