"""Rewrites reshapes that put the batch behind another dim, so that micro-batches are pieces of what they make.

Of ``(T, B, E) -> (T * B, E)`` a micro-batch has rows here and there. What reads rows without regard to their order, such as a
linear, may read them in another one: sample by sample, ``(B * T, E)``, of which a micro-batch has a piece. So in place of
the rows stand *sorted* rows, up to a reshape that takes them apart again. Dropout draws for rows that have been put back into
their order, and so does whatever else regards it. There micro-batches cannot pass, except at the end of the network, see
:mod:`shardwright.pipeline.tail`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from shardwright.base.operators import DRAWS_ELEMENTWISE, PERMUTE, RESHAPE
from shardwright.ir.graph import Graph, Node
from shardwright.ir.instructions import PerRank, Ref
from shardwright.ir.mesh import Mesh
from shardwright.ir.operator import Operator, Slot, TensorMeta
from shardwright.ir.signature import Signature, TensorFactors
from shardwright.pipeline.batch import Batch, Place, is_reshape
from shardwright.pipeline.micro import MICRO
from shardwright.rules.registry import signature_of


def with_sorted_rows(batch: Batch) -> Graph:
    """Rewrites a graph so that what holds the batch behind another dim holds it first, wherever that is exact.

    Args:
        batch: where the batch is in the graph's values.
    """
    if all(batch.places[v].outer == 1 for n in batch.graph.nodes for v in n.outputs if v in batch.places):
        return batch.graph
    return _Sorter(batch).run()


class _Sorter:
    def __init__(self, batch: Batch):
        self.graph, self.places, self.size = batch.graph, batch.places, batch.size
        self.nodes: list[Node] = []
        self.sorted: dict[str, str] = {}  # by value, the one with sorted rows
        self.known = {i.value: i.meta for i in self.graph.inputs}  # values in their own order
        self.count = 0

    def run(self) -> Graph:
        for node in self.graph.nodes:
            if is_reshape(node) and node.mark is None:
                self.reshape(node)
            elif not any(value in self.sorted for value in node.inputs) or not (self.on_rows(node) or self.drawn(node)):
                self.as_it_is(node)
        last = self.graph.nodes[-1]
        for value in [*(o for o in self.graph.outputs if isinstance(o, str)), *(v for _, v in self.graph.updates)]:
            self.in_order(value, last)
        return replace(self.graph, nodes=tuple(self.nodes), metas={})

    # -- operators ----------------------------------------------------------------------------------------------------

    def reshape(self, node: Node) -> None:
        """Writes a reshape, of sorted rows or into them."""
        source, target = node.inputs[0], node.outputs[0]
        before, after = self.places.get(source), self.places.get(target)
        if before is None or after is None or (source not in self.sorted and after.outer == 1):
            self.as_it_is(node)
            return
        shape, made = node.op.inputs[0].shape, node.op.outputs[0]
        value = self.apart(node, source, before)
        if after.outer == 1:
            self.reshaped(node, value, made.shape, target, made)
            self.known[target] = made
            return
        value = self.reshaped(node, value, _apart(made.shape, after, self.size))
        value = self.permuted(node, value, _first(after))
        self.sorted[target] = self.reshaped(node, value, made.shape)
        assert math.prod(shape) == made.numel

    def on_rows(self, node: Node) -> bool:
        """Writes an operator on sorted rows; tells whether that is exact."""
        signature = signature_of(node.op)
        found = None if signature is None or node.op.draws else self.factor(node, signature)
        if signature is None or found is None or not regards_no_order(node.op, signature, found[0]):
            return False
        factor, group = found
        outputs, metas = [], []
        for value, dims, meta in zip(node.outputs, signature.outputs, node.op.outputs, strict=True):
            has_rows = any(factor in factors for factors in dims)
            if has_rows and not self.is_grouped(value, dims, factor, group):
                return False
            outputs.append(self.name(value) if has_rows else value)
            metas.append(replace(meta, stride=_contiguous(meta.shape)) if has_rows else meta)
        inputs = [
            self.in_rows(node, value, dims.index((factor,)), group) if (factor,) in dims else value
            for value, dims in zip(node.inputs, signature.inputs, strict=True)
        ]
        self.known.update(zip(outputs, metas, strict=True))
        self.sorted.update((value, name) for value, name in zip(node.outputs, outputs, strict=True) if value != name)
        op = replace(node.op, inputs=tuple(self.known[v] for v in inputs), outputs=tuple(metas), _named={})
        self.nodes.append(replace(node, op=op, inputs=tuple(inputs), outputs=tuple(outputs)))
        return True

    def factor(self, node: Node, signature: Signature) -> tuple[str, Place] | None:
        """Returns the factor of an operator that counts the rows, and how; ``None`` unless all its tensors agree.

        Args:
            node: the operator.
            signature: its rule.
        """
        found = set()
        for value, dims in zip(node.inputs, signature.inputs, strict=True):
            if value in self.sorted:
                place = self.places[value]
                found.add((dims[place.dim], place._replace(dim=0)))
        if len(found) != 1:
            return None
        ((factors, group),) = found
        if len(factors) != 1 or not signature.splittable(factors[0]) or factors[0] in signature.tied:
            return None
        factor = factors[0]
        is_alone = all(dims.count((factor,)) == sum(factor in f for f in dims) <= 1 for dims in signature.inputs)
        is_first = all(f[0] == factor for dims in signature.outputs for f in dims if factor in f)
        return (factor, group) if is_alone and is_first else None

    def drawn(self, node: Node) -> bool:
        """Writes a draw per element for rows in their order, as tensors of more dims; tells whether it is one."""
        if node.op.target not in DRAWS_ELEMENTWISE or len(node.inputs) != 1:
            return False
        source, target = node.inputs[0], node.outputs[0]
        place, (given,), (made,) = self.places[source], node.op.inputs, node.op.outputs
        metas = [
            replace(m, shape=_apart(m.shape, place, self.size), stride=_strides_apart(m, place, self.size))
            for m in (given, made)
        ]
        value, name = self.apart(node, source, place, metas[0]), self.name(target)
        op = replace(node.op, inputs=(metas[0],), outputs=(metas[1],), _named={})
        self.nodes.append(replace(node, op=op, inputs=(value,), outputs=(name,)))
        self.known[name] = metas[1]
        self.sorted[target] = self.reshaped(node, self.permuted(node, name, _first(place)), made.shape)
        return True

    def as_it_is(self, node: Node) -> None:
        """Writes an operator that reads all values in their own order."""
        for value in node.inputs:
            self.in_order(value, node)
        self.nodes.append(node)
        self.known.update(zip(node.outputs, node.op.outputs, strict=True))

    # -- values -------------------------------------------------------------------------------------------------------

    def is_grouped(self, value: str, dims: TensorFactors, factor: str, group: Place) -> bool:
        """Tells whether the rows of an operator's output count what those of its inputs do, before anything else.

        Args:
            value: the output.
            dims: its factors.
            factor: that of the rows.
            group: what they count.
        """
        place = self.places.get(value)
        return place is not None and dims[place.dim][:1] == (factor,) and place.outer == group.outer

    def name(self, value: str) -> str:
        """Returns a new name."""
        self.count += 1
        return f"{value}_sorted{self.count}"

    def in_rows(self, node: Node, value: str, dim: int, group: Place) -> str:
        """Returns a value that an operator reads with sorted rows, and makes it if need be.

        Args:
            node: the operator.
            value: the value.
            dim: the dim of its rows.
            group: what the rows count.
        """
        if value not in self.sorted:
            place, meta = group._replace(dim=dim), self.known[value]
            made = self.reshaped(node, value, _apart(meta.shape, place, self.size))
            return self.reshaped(node, self.permuted(node, made, _first(place)), meta.shape)
        return self.sorted[value]

    def in_order(self, value: str, reader: Node) -> None:
        """Puts the rows of a value back into their own order, unless that has been done."""
        if value in self.sorted and value not in self.known:
            meta = self.graph.metas[value]
            self.reshaped(reader, self.apart(reader, value, self.places[value]), meta.shape, value, meta)
            self.known[value] = meta

    def apart(self, node: Node, value: str, place: Place, meta: TensorMeta | None = None) -> str:
        """Returns a value with the batch in a dim of its own, and all elements in their order.

        Args:
            node: the operator that reads it.
            value: the value.
            place: of the batch.
            meta: that of the result, if it matters.
        """
        shape = self.graph.metas[value].shape
        if value not in self.sorted:
            return self.reshaped(node, value, _apart(shape, place, self.size))
        outer, batch, inner = _group(place, self.size)
        rest = (*shape[: place.dim], batch, outer, inner, *shape[place.dim + 1 :])
        return self.permuted(node, self.reshaped(node, self.sorted[value], rest), _first(place), meta)

    def reshaped(self, node: Node, value: str, shape: Sequence[int], name: str = "", meta: TensorMeta | None = None) -> str:
        """Writes a reshape; returns the value that it makes.

        Args:
            node: the operator that it is written for.
            value: its input.
            shape: that of the result.
            name: of the result; default a new one.
            meta: that of the result, if its strides matter.
        """
        before = self.known[value]
        if before.shape == tuple(shape) and not name:
            return value
        after = meta or replace(before, shape=tuple(shape), stride=_contiguous(shape))
        return self.add(node, Operator(RESHAPE, (Slot(0), list(shape)), {}, (before,), (after,)), value, name)

    def permuted(self, node: Node, value: str, order: Sequence[int], meta: TensorMeta | None = None) -> str:
        """Writes a permutation; returns the value that it makes.

        Args:
            node: the operator that it is written for.
            value: its input.
            order: its dims in their new order. Others follow as they are.
            meta: that of the result, if its strides matter.
        """
        before = self.known[value]
        dims = [*order, *range(len(order), len(before.shape))]
        shape, stride = (tuple(of[d] for d in dims) for of in (before.shape, before.stride))
        after = meta or replace(before, shape=shape, stride=stride)
        return self.add(node, Operator(PERMUTE, (Slot(0), dims), {}, (before,), (after,)), value)

    def add(self, node: Node, op: Operator, value: str, name: str = "") -> str:
        """Adds an operator of one input and one output; returns the output.

        Args:
            node: the operator that it is written for.
            op: the call.
            value: its input.
            name: of the output; default a new one.
        """
        name = name or self.name(value.partition("_sorted")[0])
        self.nodes.append(
            replace(node, name=f"{name}_of_{node.name}", op=op, inputs=(value,), outputs=(name,), mark=None, mark_positions=(),
                    mark_count=0)
        )  # fmt: skip
        self.known[name] = op.outputs[0]
        return name


# -- shapes ------------------------------------------------------------------------------------------------------------


def _group(place: Place, batch: int) -> tuple[int, int, int]:
    return place.outer, batch, place.inner


def _apart(shape: Sequence[int], place: Place, batch: int) -> tuple[int, ...]:
    """Returns a shape with the dim of the batch in three: what is outside of it, the batch, and what is inside."""
    inner = shape[place.dim] // (place.outer * batch)
    return (*shape[: place.dim], place.outer, batch, inner, *shape[place.dim + 1 :])


def _first(place: Place) -> tuple[int, ...]:
    """Returns the order of dims that swaps the batch with what is outside of it, once they are apart."""
    return (*range(place.dim), place.dim + 1, place.dim, place.dim + 2)


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


def _strides_apart(meta: TensorMeta, place: Place, batch: int) -> tuple[int, ...]:
    """Returns the strides of a tensor whose dim of the batch is taken apart, in its own memory."""
    stride = meta.stride if len(meta.stride) == len(meta.shape) else _contiguous(meta.shape)
    own, inner = stride[place.dim], place.inner
    return (*stride[: place.dim], own * batch * inner, own * inner, own, *stride[place.dim + 1 :])


# -- what regards the order ----------------------------------------------------------------------------------------------


def regards_no_order(op: Operator, signature: Signature, factor: str) -> bool:
    """Tells whether an operator computes the same of rows in any order, but for their order.

    It does if it can be split along them, into pieces that are computed without knowing where they are.

    Args:
        op: the operator.
        signature: its rule.
        factor: the factor that counts the rows.
    """
    if signature.lowering is None:
        return True
    pieces = _Pieces(op, signature, factor)
    signature.lowering(pieces)
    return not pieces.asked


class _Pieces:
    """Receives a lowering, and notes whether it asks where pieces are; see :class:`shardwright.rules.lowering.Local`."""

    def __init__(self, op: Operator, signature: Signature, factor: str):
        self.op, self.signature, self.asked = op, signature, False
        self.mesh = Mesh((MICRO,), (2,))
        self.split: dict[str, Any] = {factor: ((MICRO,), None)}
        self.inputs = tuple(Ref(f"{i}") for i in range(len(op.inputs)))
        self.input_layouts, self.output_layouts = signature.layouts(self.mesh, self.split)
        self.settled_layouts = self.output_layouts

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Ref:
        return Ref("made")

    def call_many(self, count: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Ref, ...]:
        return (Ref("made"),) * count

    def same_call(self, **changes: Any) -> tuple[Ref, ...]:
        return (Ref("made"),) * len(self.op.outputs)

    def move(self, *args: Any, **kwargs: Any) -> Ref:
        return Ref("made")

    def settle(self, value: Ref, index: int = 0) -> Ref:
        return value

    def axes_of(self, factor: str) -> tuple[str, ...]:
        return self.split[factor][0] if factor in self.split else ()

    def local_size(self, tensor_is_output: bool, index: int, dim: int) -> PerRank | int:
        return self.local_shape(tensor_is_output, index)[dim]

    def local_shape(self, tensor_is_output: bool, index: int) -> list[PerRank | int]:
        meta = (self.op.outputs if tensor_is_output else self.op.inputs)[index]
        layout = (self.output_layouts if tensor_is_output else self.input_layouts)[index]
        return list(layout.local_shape(meta.shape, 0))

    def offset(self, tensor_is_output: bool, index: int, dim: int) -> PerRank:
        self.asked = True
        return PerRank(lambda rank: 0)
