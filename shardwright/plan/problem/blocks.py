"""Finds the repeated blocks of a graph, so that planning can work on one of their copies.

A block is a run of nodes that stands several times in sequence, each copy connected to itself, to the copy before it and
to values that all copies read, always in the same way. It is found by the nodes alone, whatever modules they come from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardwright.ir.graph import Graph, Node

Array = np.ndarray[Any, Any]

# Fewer copies than this are planned one by one.
_LEAST_COPIES = 4


@dataclass(frozen=True)
class Block:
    """Nodes ``start .. start + length * count`` of a graph are ``count`` copies of ``length`` nodes."""

    start: int
    length: int
    count: int

    @property
    def stop(self) -> int:
        return self.start + self.length * self.count

    def copy_of(self, node: int) -> int:
        return (node - self.start) // self.length


def blocks_of(
    graph: Graph, labels: Mapping[str, Any] | None = None, alike: Callable[[Node], Any] | None = None
) -> tuple[Block, ...]:
    """Finds the repeated blocks of a graph, in order, none touching another.

    Args:
        graph: the graph.
        labels: further properties of graph inputs; those of different labels are not alike.
        alike: further properties that nodes must have in common.
    """
    wiring = _Wiring(graph, labels or {}, alike or (lambda node: None))
    found: list[Block] = []
    spans = [(0, len(graph.nodes))]
    while spans:
        low, high = spans.pop()
        block = _largest(wiring, low, high) if low < high else None  # a block may stand at either end
        if block is not None:
            found.append(block)
            # a node between two blocks keeps the exit of one from being the entry of the other
            spans += [(low, block.start - 1), (block.stop + 1, high)]
    return tuple(sorted(found, key=lambda b: b.start))


class _Wiring:
    """Arrays of a graph: the kind of each node, and the origin of each of its inputs.

    A parameter or buffer counts as made by the node that reads it first, so that a layer's own parameters repeat with it.
    """

    def __init__(self, graph: Graph, labels: Mapping[str, Any], alike: Callable[[Node], Any]):
        names = {i.value: i for i in graph.inputs}
        self.owner_of: dict[str, int] = {}
        self.last_reader: dict[str, int] = {}
        kinds: dict[Any, int] = {}
        node_kinds, offsets, owners, places, values = [], [0], [], [], []
        value_ids: dict[str, int] = {}
        place_of: dict[str, Any] = {}
        readers = Counter(value for node in graph.nodes for value in set(node.inputs))
        for at, node in enumerate(graph.nodes):
            given = []
            for slot, value in enumerate(node.inputs):
                source = names.get(value)
                if value not in self.owner_of:
                    assert source is not None
                    own = source.kind in ("parameter", "buffer") and readers[value] == 1
                    self.owner_of[value] = at if own else -1
                    place_of[value] = kinds.setdefault(
                        (source.kind, source.meta, source.requires_grad, slot, labels.get(value)), len(kinds)
                    )
                given.append(value in graph.needs_grad)
                owners.append(self.owner_of[value])
                places.append(place_of[value])
                values.append(value_ids.setdefault(value, len(value_ids)))
                self.last_reader[value] = at
            offsets.append(len(owners))
            node_kinds.append(kinds.setdefault((_kind(node, tuple(given)), alike(node)), len(kinds)))
            for position, value in enumerate(node.outputs):
                self.owner_of[value] = at
                place_of[value] = -1 - position
        for value in [*graph.outputs, *(v for _, v in graph.updates)]:
            if isinstance(value, str):
                self.last_reader[value] = len(graph.nodes)
        self.kinds: Array = np.array(node_kinds, dtype=np.int64)
        self.offsets: Array = np.array(offsets, dtype=np.int64)
        self.owners: Array = np.array(owners, dtype=np.int64)
        self.places: Array = np.array(places, dtype=np.int64)
        self.values: Array = np.array(values, dtype=np.int64)
        self.owner_array = np.array(list(self.owner_of.values()), dtype=np.int64)
        found = self.last_reader
        self.reader_array = np.array([found.get(v, o) for v, o in self.owner_of.items()], dtype=np.int64)
        self.crossing = self._crossing(len(graph.nodes))

    def _crossing(self, count: int) -> Array:
        """Counts the values that are made before each node and read at it or later."""
        change = np.zeros(count + 2, dtype=np.int64)
        read = (self.owner_array >= 0) & (self.reader_array > self.owner_array)
        np.add.at(change, self.owner_array[read] + 1, 1)
        np.add.at(change, self.reader_array[read] + 1, -1)
        return np.cumsum(change)


def _kind(node: Node, given: tuple[bool, ...]) -> Any:
    mark = node.mark
    asked = None if mark is None else (str(mark.in_strategy), str(mark.out_strategy), mark.is_pin, node.mark_positions)
    return id(node.op), given, asked, node.region is not None, node.autocast, node.grad


def _largest(wiring: _Wiring, low: int, high: int) -> Block | None:
    """Finds the block that covers most nodes of ``low .. high``."""
    kinds = wiring.kinds[low:high]
    best: Block | None = None
    for period in _periods(kinds):
        for start, stop in _runs(kinds[:-period] == kinds[period:], (_LEAST_COPIES - 1) * period):
            block = _wired(wiring, low + start, low + stop + period, period)
            if block and (best is None or block.length * block.count > best.length * best.count):
                best = block
    return best


def _periods(kinds: Array) -> list[int]:
    """Lists the distances at which kinds of nodes repeat, the most frequent first."""
    last: dict[int, int] = {}
    gaps: Counter[int] = Counter()
    for at, kind in enumerate(kinds.tolist()):
        if kind in last:
            gaps[at - last[kind]] += 1
        last[kind] = at
    candidates = [gap for gap, times in gaps.most_common(12) if times >= _LEAST_COPIES - 1]
    # a kind that stands several times in a layer comes again after parts of the layer: sums of gaps are periods too
    sums = {a + b for a in candidates for b in candidates} | set(candidates)
    rare = Counter(kinds.tolist())
    for kind, times in sorted(rare.items(), key=lambda item: item[1]):
        if times >= _LEAST_COPIES:
            where = np.flatnonzero(kinds == kind)
            gap, _ = Counter(np.diff(where).tolist()).most_common(1)[0]
            sums.add(int(gap))
            break
    return sorted(sums)


def _runs(equal: Array, least: int) -> list[tuple[int, int]]:
    """Finds where ``equal`` holds for at least ``least`` places in a row."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], equal.astype(np.int8), [0]))))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2]) if b - a >= least]


def _wired(wiring: _Wiring, start: int, stop: int, period: int) -> Block | None:
    """Finds the copies within ``start .. stop`` that are connected alike, cut where fewest values cross."""
    cuts = range(start, min(start + period, stop - _LEAST_COPIES * period + 1))
    for cut in sorted(cuts, key=lambda at: (int(wiring.crossing[at]), at)):
        block = Block(cut, period, (stop - cut) // period)
        if _is_wired(wiring, block) and _exits_last(wiring, block):
            return block
    # the first layers may be connected in ways of their own
    return _wired(wiring, start + period, stop, period) if stop - start >= (_LEAST_COPIES + 1) * period else None


def _is_wired(wiring: _Wiring, block: Block) -> bool:
    """Tells whether all copies read alike: from themselves, from the previous copy, or the same value from before."""
    low = slice(wiring.offsets[block.start], wiring.offsets[block.stop - block.length])
    high = slice(wiring.offsets[block.start + block.length], wiring.offsets[block.stop])
    now, later = wiring.owners[low], wiring.owners[high]
    fine = (later == now + block.length) & (wiring.places[high] == wiring.places[low])
    fine |= (wiring.values[high] == wiring.values[low]) & (now < block.start)
    # where later copies read from the copy before, the first may read from anywhere before
    first = int(wiring.offsets[block.start + block.length] - wiring.offsets[block.start])
    fine[:first] |= (now[:first] < block.start) & (later[:first] >= block.start) & (later[:first] < block.start + block.length)
    return bool(fine.all())


def _exits_last(wiring: _Wiring, block: Block) -> bool:
    """Tells whether readers after the block read its last copy only. Nothing may reach back further than one copy."""
    owners, readers = wiring.owner_array, wiring.reader_array
    inside = (owners >= block.start) & (owners < block.stop)
    owners, readers = owners[inside], readers[inside]
    outside = readers >= block.stop
    if (owners[outside] < block.stop - block.length).any():
        return False
    reach = (readers - block.start) // block.length - (owners - block.start) // block.length
    return bool((reach[~outside] <= 1).all())
