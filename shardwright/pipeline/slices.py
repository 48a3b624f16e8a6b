"""Slices of the sequence: where values carry it, and rules of operators that join it with the samples to rows.

Causal attention is the one operator that reads other slices, the keys and values that the forwards of earlier ones have kept:
:func:`shardwright.rules.attention.sliced_causal_attention`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from shardwright.errors import PipelineError
from shardwright.ir.graph import Graph, Node
from shardwright.ir.instructions import PerRank, Ref
from shardwright.ir.operator import Operator, Slot, TensorMeta
from shardwright.ir.signature import Signature, TensorFactors
from shardwright.pipeline.stages import free_nodes
from shardwright.pipeline.units import rows_of_unit, slice_sizes
from shardwright.rules.attention import attends_causally, is_attention, mask_of
from shardwright.rules.lowering import Local
from shardwright.rules.registry import replicated_signature, signature_of

# -- where the sequence is --------------------------------------------------------------------------------------------


def sequence_of(graph: Graph, slices: int) -> tuple[dict[str, int], list[Node]]:
    """Finds the inputs, and free values, that carry the sequence of the model's causal attention, with the dims of it.

    Beside them it returns the operators that compute of inputs, and through whose rules the sequence cannot be followed back.

    Args:
        graph: the whole graph.
        slices: number of slices that the sequence is to be cut into.

    Raises:
        PipelineError: there is no causal attention, or of several lengths, or of fewer positions than slices.
    """
    attention = [node for node in graph.nodes if attends_causally(node.op)]
    lengths = {node.op.inputs[0].shape[-2]: node for node in attention}
    if not attention:
        raise PipelineError(_no_attention(graph))
    if len(lengths) > 1:
        texts = "; ".join(f"{length} in {node.where}" for length, node in lengths.items())
        raise PipelineError(
            f'pipeline(slices={slices}): causal attention has sequences of several lengths: {texts}; use scheduler="1f1b"'
        )
    length = next(iter(lengths))
    if slices > length:
        raise PipelineError(
            f"pipeline(slices={slices}): the sequence of {attention[0].where} has {length} positions; "
            f"give at most slices={length}"
        )
    trace = _Trace(graph)
    return trace.back_from(attention), list(trace.ends.values())


def _no_attention(graph: Graph) -> str:
    """Returns why there is no causal attention: what attention there is, and what it is not causal by."""
    head = (
        'pipeline(scheduler="seqpipe"): no operator is F.scaled_dot_product_attention(..., is_causal=True), whose sequence is '
        "what is cut into slices"
    )
    there = [node for node in graph.nodes if is_attention(node.op)]
    if not there:
        return (
            f'{head}; use scheduler="1f1b", or that function for causal attention, as nn.MultiheadAttention calls it with '
            "need_weights=False and is_causal=True"
        )
    lines = []
    for node in there:
        masked = mask_of(node.op) is not None
        why = "has a mask that is not the causal one, or that changes" if masked else "is not causal, or of two sequences"
        lines.append(f"  {node.where} {why}")
    return "\n".join([f'{head}; use scheduler="1f1b", or is_causal=True where a mask is the causal one:', *lines])


def sizes_of_slices(graph: Graph, slices: int) -> tuple[int, ...]:
    """Returns the sizes of the slices of the sequence of a graph's causal attention; one without slices."""
    lengths = (node.op.inputs[0].shape[-2] for node in graph.nodes if attends_causally(node.op))
    return slice_sizes(next(lengths), slices) if slices > 1 else (1,)


class _Trace:
    """Follows dims back through operators, by their rules."""

    def __init__(self, graph: Graph):
        self.makers = {value: node for node in graph.nodes for value in node.outputs}
        self.inputs = {i.value for i in graph.inputs if i.kind == "input"}
        self.ends: dict[str, Node] = {}
        self.of_inputs = set(self.inputs)
        for node in graph.nodes:
            if self.of_inputs.intersection(node.inputs):
                self.of_inputs.update(node.outputs)
        free = free_nodes(graph)
        of_inputs, self.carriers = set(self.inputs), set(self.inputs)
        for node in graph.nodes:
            if node.name in free and of_inputs.intersection(node.inputs):
                of_inputs.update(node.outputs)
                self.carriers.update(node.outputs)

    def back_from(self, attention: Sequence[Node]) -> dict[str, int]:
        waiting = [(value, len(meta.shape) - 2, False) for n in attention for value, meta in zip(n.inputs[:3], n.op.inputs[:3])]
        seen, found = set(waiting), dict[str, int]()
        while waiting:
            value, dim, is_rows = waiting.pop()
            before = list(self.before(value, dim, is_rows))
            if not before and not is_rows and value in self.carriers:
                found[value] = dim
            elif not before and value in self.of_inputs and value in self.makers:
                self.ends[self.makers[value].name] = self.makers[value]
            for each in before:
                if each not in seen:
                    seen.add(each)
                    waiting.append(each)
        return found

    def before(self, value: str, dim: int, is_rows: bool) -> Iterator[tuple[str, int, bool]]:
        """Yields the dims that a dim comes from, and whether they are of rows."""
        node = self.makers.get(value)
        if node is None:
            return
        signature = signature_of(node.op) or replicated_signature(node.op)
        large = _large(signature, signature.outputs[node.outputs.index(value)][dim])
        if not large:
            return
        factor = large[1] if is_rows and len(large) > 1 else large[0]
        if factor in signature.inner:
            return
        for name, factors in zip(node.inputs, signature.inputs, strict=True):
            for at, own in enumerate(_large(signature, dim_factors) for dim_factors in factors):
                if factor in own[:2]:
                    yield name, at, own[0] != factor or (is_rows and factor == large[0])


def _large(signature: Signature, factors: Sequence[str]) -> list[str]:
    return [factor for factor in factors if signature.sizes[factor] > 1]


# -- rows -------------------------------------------------------------------------------------------------------------

ROW = "row"


@dataclass(frozen=True)
class Rows:
    """The factor of rows in the rule of an operator.

    Args:
        factor: its name.
        samples: the number of samples that the rows are of.
        pair: the factors of samples and positions that it stands for, where they are apart in another tensor.
    """

    factor: str
    samples: int
    pair: tuple[str, str] | None = None

    def pieces(self, samples: Sequence[int], positions: Sequence[int]) -> tuple[int, ...]:
        """Returns the rows of every unit, of samples of micro-batches and positions of slices."""
        return tuple(own * length for own in samples for length in positions)


class NotInSlices(Exception):
    """An operator cannot run slice by slice; says why."""


class SlicedInput(NamedTuple):
    """An input whose sequence is cut: its position and dim, and of rows their samples and what each slice has of a sample."""

    position: int
    dim: int
    samples: int | None = None
    columns: tuple[int, ...] = ()


def with_rows(signature: Signature, cuts: Sequence[SlicedInput]) -> tuple[Signature, Rows | None]:
    """Gives a rule the factor of rows, where an operator joins samples and positions, takes them apart, or has rows.

    Args:
        signature: the rule.
        cuts: the inputs whose sequence is cut.

    Raises:
        NotInSlices: dims are joined in another way.
    """
    found: Rows | None = None
    for index, dim, samples, columns in cuts:
        own = _large(signature, signature.inputs[index][dim])
        if not own:
            continue
        if samples is not None:
            pair = (own[0], own[1]) if len(own) > 1 and signature.sizes[own[0]] == samples else None
            rest = math.prod(signature.sizes[factor] for factor in own[2 if pair else 1 :])
            if (len(own) > 1 and pair is None and signature.sizes[own[0]] % samples) or any(c % rest for c in columns):
                raise NotInSlices("takes rows of samples and positions apart in another way than they were joined")
            made: Rows | None = Rows(ROW if pair else own[0], samples, pair)
        else:
            made_of = _joined_before(signature, own[0])
            made = Rows(ROW, signature.sizes[made_of], (made_of, own[0])) if made_of else None
        if made is not None and found is not None and made != found:
            raise NotInSlices("reads rows that were joined in several ways")
        found = found or made
    if found is not None and any(
        own.samples is None and _large(signature, signature.inputs[own.position][own.dim])[:1] == [found.factor] for own in cuts
    ):
        raise NotInSlices("reads rows of samples and positions beside other ones")
    return (signature, found) if found is None or found.pair is None else (_with_row(signature, *found.pair), found)


def _joined_before(signature: Signature, position: str) -> str | None:
    """Returns the factor that a factor of positions is joined to in an output, as the less significant one.

    Raises:
        NotInSlices: there are others between them.
    """
    for factors in (dim for tensor in signature.outputs for dim in tensor):
        own = _large(signature, factors)
        if position in own[1:]:
            if own[1] != position:
                raise NotInSlices("joins the sequence to dims between it and the samples")
            return own[0]
    return None


def _with_row(signature: Signature, sample: str, position: str) -> Signature:
    """Returns a rule in which a dim of samples and positions is one factor."""

    def joined(tensor: TensorFactors) -> TensorFactors:
        dims = []
        for factors in tensor:
            own = _large(signature, factors)
            dims.append((ROW, *own[2:]) if own[:2] == [sample, position] else factors)
        return tuple(dims)

    inputs, outputs = tuple(map(joined, signature.inputs)), tuple(map(joined, signature.outputs))
    reached = {factor for tensor in outputs for dim in tensor for factor in dim}
    row = {sample, position, ROW}
    sizes = {**signature.sizes, ROW: signature.sizes[sample] * signature.sizes[position]}
    return replace(
        signature, inputs=inputs, outputs=outputs, sizes=sizes, whole=signature.whole - row,
        inner=signature.inner | (row - reached), tied=signature.tied | row,
    )  # fmt: skip


def rows_operator(
    meta: TensorMeta, dim: int, samples: int, grid: tuple[Sequence[int], Sequence[int]], ranks: int
) -> tuple[Operator, Signature]:
    """Makes the operator that gives each unit its rows of a value that is there for the whole batch.

    Args:
        meta: of the value.
        dim: of the rows.
        samples: number of samples in the batch.
        grid: the samples of each micro-batch, and the rows that each slice has of every sample.
        ranks: of the stage.
    """
    slices = len(grid[1])

    def spans(pieces: Sequence[int], of_slice: bool) -> tuple[PerRank, PerRank]:
        def place(rank: int) -> int:
            unit = rank // ranks
            return unit % slices if of_slice else unit // slices

        return PerRank(lambda rank: sum(pieces[: place(rank)])), PerRank(lambda rank: pieces[place(rank)])

    own, columns = spans(grid[0], of_slice=False), spans(grid[1], of_slice=True)

    def emit(local: Local) -> tuple[Ref, ...]:
        return (local.call(rows_of_unit, local.inputs[0], dim, samples, own, columns),)

    dims = [(f"d{at}",) for at in range(len(meta.shape))]
    read: TensorFactors = tuple(("all",) if at == dim else own_dim for at, own_dim in enumerate(dims))
    given: TensorFactors = tuple((ROW,) if at == dim else own_dim for at, own_dim in enumerate(dims))
    sizes = {f"d{at}": size for at, size in enumerate(meta.shape)} | {"all": meta.shape[dim], ROW: meta.shape[dim]}
    signature = Signature((read,), (given,), sizes, whole=frozenset({"all"}), lowering=emit)
    return Operator(rows_of_unit, (Slot(0), dim, samples), {}, (meta,), (meta,)), signature


def counts_no_rows(signature: Signature, rows: Rows, where: str) -> Signature:
    """Returns a rule whose lowering may not ask where a piece of rows starts: those of a unit are not next to each other.

    Args:
        signature: the rule.
        rows: the factor of rows.
        where: the operator, for messages.
    """
    if signature.lowering is None:
        return signature
    return replace(signature, lowering=partial(_without_offsets, signature.lowering, rows.factor, where))


def _without_offsets(lowering: object, factor: str, where: str, local: Local) -> object:
    return lowering(_NoOffsets(local, factor, where))  # type: ignore[operator]


class _NoOffsets:
    """A local call that refuses to say where rows start."""

    def __init__(self, local: Local, factor: str, where: str):
        self._local, self._factor, self._where = local, factor, where

    def __getattr__(self, name: str) -> object:
        return getattr(self._local, name)

    def offset(self, tensor_is_output: bool, index: int, dim: int) -> PerRank:
        """Returns where the local piece of a dim starts.

        Raises:
            NotInSlices: it is one of rows.
        """
        signature = self._local.signature
        if self._factor in (signature.outputs if tensor_is_output else signature.inputs)[index][dim]:
            raise NotInSlices(f"{self._where} counts positions in rows of samples and positions")
        return self._local.offset(tensor_is_output, index, dim)
