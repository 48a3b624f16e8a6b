"""Checks where ``"interleaved_parallel"`` may stand in an operator's Layouts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shardwright.errors import Problems
from shardwright.ir.graph import Graph, Node
from shardwright.ir.layout import Layout
from shardwright.ir.layout_entries import INTERLEAVED
from shardwright.ir.signature import Signature
from shardwright.rules.registry import signature_of


@dataclass(frozen=True)
class Cut:
    """A marked operator: the factor that is the batch, how many devices split it, and into how many copies."""

    node: Node
    factor: str
    ways: int
    copies: int


def cut_layouts(node: Node) -> Iterator[tuple[bool, int, Layout]]:
    """Yields the Layouts of a strategy that have the virtual axis: whether of an output, its index, and the Layout."""
    mark = node.mark
    if mark is None:
        return
    if isinstance(mark.in_strategy, tuple):
        for i, position in enumerate(node.mark_positions):
            entry = mark.in_strategy[position] if position is not None and position < len(mark.in_strategy) else None
            if isinstance(entry, Layout) and entry.copies > 1:
                yield False, i, entry
    if isinstance(mark.out_strategy, tuple):
        for i, entry in enumerate(mark.out_strategy):
            if isinstance(entry, Layout) and entry.copies > 1 and i < len(node.outputs):
                yield True, i, entry


def check_cut(graph: Graph, node: Node, problems: Problems) -> Cut | None:
    """Returns how a node's Layouts cut the batch into copies; adds to ``problems`` what is wrong with it."""
    found = list(cut_layouts(node))
    if not found:
        return None
    what = f"{node.mark.name if node.mark else node.op.name} ({node.op.name}) at {node.source or '?'}"
    if node.copy is not None:
        problems.add(f"{what}: {INTERLEAVED!r} within MicroBatchInterleaved, which makes copies itself; use one of the two")
        return None
    signature = signature_of(node.op)
    if signature is None:
        problems.add(f"{what}: {INTERLEAVED!r} on an operator without a rule; remove it there")
        return None
    before = len(problems.lines)
    factors = {_factor(node, signature, *entry, what, problems) for entry in found}
    if len(problems.lines) > before or None in factors:
        return None
    if len(factors) > 1:
        problems.add(f"{what}: {INTERLEAVED!r} cuts dims that are not the same dim of the operator; leave it in one place")
        return None
    factor, ways = next(iter(factors)) or "", found[0][2].mesh.count(found[0][2].bound[0])
    copies, size = found[0][2].copies, signature.sizes[factor]
    if size % (ways * copies):
        problems.add(
            f"{what}: the batch has size {size}, which {ways} slices of {copies} copies each, {ways * copies} parts, do not "
            "divide; give a batch that they divide"
        )
        return None
    if any(value in graph.outputs for value in node.outputs) and not any(e.split_axes for e in _layouts(node)):
        problems.add(
            f"{what}: its output is the program's, and {INTERLEAVED!r} is the only axis of its Layouts; split it over devices "
            "too, or remove the axis there"
        )
    return Cut(node, factor, ways, copies)


def _layouts(node: Node) -> list[Layout]:
    mark = node.mark
    assert mark is not None
    return [e for e in (*(mark.in_strategy or ()), *(mark.out_strategy or ())) if isinstance(e, Layout) and e.dims is not None]


def _factor(
    node: Node, signature: Signature, is_output: bool, index: int, layout: Layout, what: str, problems: Problems
) -> str | None:
    """Returns the factor that a Layout cuts into copies."""
    side = f"{'output' if is_output else 'input'} {index}"
    meta = (node.op.outputs if is_output else node.op.inputs)[index]
    dim = layout.interleaved[1] if layout.interleaved is not None else None
    if layout.ndim != len(meta.shape):
        return None  # the strategy's own check says so
    if dim != 0:
        problems.add(f"{what}: {INTERLEAVED!r} cuts dim {dim} of {side}; it cuts the batch, so write it in dim 0")
        return None
    factor = signature.major((signature.outputs if is_output else signature.inputs)[index][0])
    if factor is None or factor in signature.summed or not signature.splittable(factor):
        why = "is broadcast" if factor is None else "is summed over" if factor in signature.summed else "must stay whole"
        problems.add(f"{what}: {INTERLEAVED!r} cuts dim 0 of {side}, which {why} here; it cuts the batch only")
        return None
    if factor not in {f for tensor in signature.outputs for dim_factors in tensor for f in dim_factors[:1]}:
        problems.add(f"{what}: {INTERLEAVED!r} cuts dim 0 of {side}, which no output has as a batch; it cuts the batch only")
        return None
    return factor


def check_together(cuts: Sequence[Cut], problems: Problems) -> None:
    """Adds to ``problems`` what cuts of one model disagree in."""
    other = next((cut for cut in cuts if cut.copies != cuts[0].copies), None)
    if other is not None:
        problems.add(
            f"{INTERLEAVED!r} has size {cuts[0].copies} at {cuts[0].node.where} and {other.copies} at {other.node.where}; give "
            "it one size in all Layouts"
        )
