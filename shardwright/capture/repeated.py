"""Capture of models with many equal layers: captures a few, and makes the graph of all from these.

A *run* is a row of equal modules in a list. Its graph has one *segment* per copy: from the copy's first operator to the
next copy's first one, so operators of the caller between two calls belong to the earlier one. Three copies are captured;
the middle segment is repeated between the first and the last. This is tested, not assumed: the graph of four copies made
from three has to equal the capture of four, in every shape, connection and name. Models that fail the test are captured in
full, for example if layers use their number, if values of one layer are read far from it, or if settings differ.

See :mod:`shardwright.capture.runs` for what makes modules a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from shardwright.capture.capture import capture
from shardwright.capture.decisions import Decisions
from shardwright.capture.names import Names, numbered
from shardwright.capture.runs import Run, find_runs, is_within, shortened
from shardwright.ir.graph import Graph, GraphInput, Node
from shardwright.ir.marks import Mark

COPIES = 3  # the first, one that has copies on both sides, and the last
LEAST = 5  # a shorter run is not worth two captures


def capture_repeated(
    root: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    device: torch.device,
    marks: dict[nn.Module, Mark] | None = None,
    decisions: Decisions | None = None,
) -> Graph:
    """Captures like :func:`capture`, in a time that hardly depends on the number of equal layers.

    Corresponding nodes of equal layers share one :class:`Operator` object. Arguments and errors are those of
    :func:`capture`. The model is left as it was. Not seen is a layer that is treated otherwise because of its number by
    code that none of the modules around it holds.

    Args:
        root, args, kwargs, device, marks, decisions: see :func:`capture`.

    >>> net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    >>> len(capture_repeated(net, (torch.ones(2, 4),), {}, torch.device("cpu")).nodes)
    6
    """
    marks = marks or {}
    runs = find_runs(root, marks, LEAST)
    graph = _from_few(root, args, kwargs, device, marks, runs) if runs else None
    return capture(root, args, kwargs, device, marks, decisions=decisions) if graph is None else graph


def _from_few(root: nn.Module, args: Any, kwargs: Any, device: Any, marks: Any, runs: Sequence[Run]) -> Graph | None:
    """Builds the graph from a capture of a few copies. Returns ``None`` where that cannot be proved right."""
    by_path = {mark.module_path: mark for mark in marks.values()}
    captured = []
    for count in (COPIES, COPIES + 1):
        try:
            with shortened(runs, count) as asked:
                captured.append(capture(root, args, kwargs, device, marks))
        except Exception:  # the shortened model may fail where the full one does not
            return None
        if asked:
            return None
    few, more = captured
    proof = _expanded(few, runs, [COPIES + 1] * len(runs), by_path)
    if proof is None or not same_graphs(proof, more):
        return None
    return _expanded(few, runs, [len(run.copies) for run in runs], by_path)


class _NotRepeated(Exception):
    """Signals that a graph is not that of a row of copies."""


def _expanded(few: Graph, runs: Sequence[Run], counts: Sequence[int], by_path: dict[str | None, Mark]) -> Graph | None:
    try:
        return _Expansion(few, runs, counts, by_path).graph()
    except _NotRepeated:
        return None


@dataclass(frozen=True)
class _Place:
    """A place of a value of a run: its copy, and its position among that copy's values."""

    run: int
    copy: int
    position: int = -1  # -1: a parameter or buffer


class _Expansion:
    """Makes the graph of ``counts[r]`` copies of each run from one of ``COPIES``.

    The middle copy's value ``v`` is called ``k:v`` in copy ``k`` until all values get their names.
    """

    def __init__(self, few: Graph, runs: Sequence[Run], counts: Sequence[int], by_path: dict[str | None, Mark]):
        self.few, self.runs, self.counts, self.by_path = few, runs, counts, by_path
        self.copy_of = {path: (r, i) for r, run in enumerate(runs) for i, path in enumerate(run.copies[:COPIES])}
        self.seen: dict[str, tuple[int, int] | None] = {}
        self.bounds = [self._bounds(r) for r in range(len(runs))]  # where each segment starts, and where the last ends
        self.values: dict[tuple[int, int], list[str]] = {}
        self.places: dict[str, _Place] = {}
        self._place_values()

    def graph(self) -> Graph:
        """Returns the graph of all copies."""
        inputs = self._inputs()
        names = Names()
        known = {i.value: names.new(i.value if i.kind == "input" else _plain(i)) for i in inputs}
        raw = self._nodes()
        outside = [o for o in self.few.outputs if isinstance(o, str)] + [v for n, v in self.few.updates if n not in self.places]
        for value in outside:
            self._outside(value)
        updates = self._updates(inputs)
        nodes, made = numbered([self._with_inputs(node, known) for node in raw], names)
        known.update(made)
        outputs = tuple(known.get(o, o) if isinstance(o, str) else o for o in self.few.outputs)
        named = tuple(replace(i, value=known[i.value]) for i in inputs)
        updates = tuple((known[name], known.get(value, value)) for name, value in updates)
        marks = self.few.impossible_marks
        return Graph(
            named,
            tuple(nodes),
            outputs,
            updates,
            self.few.out_spec,
            self.few.constants,
            impossible_marks=marks,
            hidden=self.few.hidden,
        )

    # -- where things stand -----------------------------------------------------------------------------------------

    def _copy(self, path: str) -> tuple[int, int] | None:
        """Returns the run and copy that a module, parameter or buffer belongs to."""
        if path not in self.seen:
            parent = path.rpartition(".")[0]
            self.seen[path] = self.copy_of.get(path) or (self._copy(parent) if parent else None)
        return self.seen[path]

    def _bounds(self, run: int) -> list[int]:
        own = [(i, c[1]) for i, node in enumerate(self.few.nodes) if (c := self._copy(node.module)) and c[0] == run]
        starts: list[int] = []
        for i, copy in own:
            if copy == len(starts):
                starts.append(i)
            elif copy != len(starts) - 1:
                raise _NotRepeated  # a copy that is called again, or out of turn
        if len(starts) < COPIES:
            raise _NotRepeated
        # What follows the last call belongs to its segment as far as the same follows the other calls.
        end, middle = starts[2], self.few.nodes[starts[1] : starts[2]]
        for node, same in zip(self.few.nodes[starts[2] :], middle):
            if node.op is not same.op:
                break
            end += 1
        return [*starts, max(end, own[-1][0] + 1)]

    def _place_values(self) -> None:
        ends = 0
        for run in sorted(range(len(self.runs)), key=lambda r: self.bounds[r][0]):
            if self.bounds[run][0] < ends:
                raise _NotRepeated  # runs whose calls alternate
            ends = self.bounds[run][-1]
            for copy in range(COPIES):
                first, stop = self.bounds[run][copy : copy + 2]
                values = [v for node in self.few.nodes[first:stop] for v in node.outputs]
                self.values[run, copy] = values
                self.places.update((v, _Place(run, copy, i)) for i, v in enumerate(values))
        for graph_input in self.few.inputs:
            found = self._copy(str(graph_input.target)) if graph_input.kind in ("parameter", "buffer") else None
            if found and graph_input.target not in self.runs[found[0]].shared:
                self.places[graph_input.value] = _Place(*found)

    # -- connections ------------------------------------------------------------------------------------------------

    def _outside(self, value: str, allowed: int = -1) -> str:
        """Checks a value read from outside its run, or from the run ``allowed``: it must come from the last copy."""
        place = self.places.get(value)
        if place and place.run != allowed and (place.copy != COPIES - 1 or place.position < 0):
            raise _NotRepeated
        return value

    def _inside(self, value: str, run: int, copy: int, k: int) -> str:
        """Returns what copy ``k`` reads where ``copy``, the one it is made from, reads ``value``."""
        place = self.places.get(value)
        if place is None or place.run != run:
            return self._outside(value)
        if place.copy == copy:
            return f"{k}:{value}" if copy == 1 and k > 1 else value
        if place.copy != copy - 1 or place.position < 0:
            raise _NotRepeated
        if copy == 0 or k == 1:
            return value
        before = self.values[run, 1]
        if place.position >= len(before):
            raise _NotRepeated
        value = before[place.position]
        return f"{k - 1}:{value}" if k - 1 > 1 else value

    # -- the parts of the graph -------------------------------------------------------------------------------------

    def _inputs(self) -> list[GraphInput]:
        result: list[GraphInput] = []
        pending: list[GraphInput] = []  # those of the middle copy; the other copies' follow once these are complete
        for graph_input in self.few.inputs:
            place = self.places.get(graph_input.value)
            if pending and place != self.places[pending[0].value]:
                result += self._copies_of_inputs(pending)
                pending = []
            if place and place.copy == 1:
                pending.append(graph_input)
            if place and place.copy == COPIES - 1:
                last = self._moved(str(graph_input.target), place.run, place.copy, self.counts[place.run] - 1)
                graph_input = replace(graph_input, target=last)
            result.append(graph_input)
        return [*result, *self._copies_of_inputs(pending)]

    def _copies_of_inputs(self, inputs: Sequence[GraphInput]) -> Iterator[GraphInput]:
        if not inputs:
            return
        run = self.places[inputs[0].value].run
        for k in range(2, self.counts[run] - 1):
            for i in inputs:
                yield replace(i, value=f"{k}:{i.value}", target=self._moved(str(i.target), run, 1, k))

    def _nodes(self) -> list[Node]:
        result: list[Node] = []
        where = {bounds[copy]: (run, copy) for run, bounds in enumerate(self.bounds) for copy in range(COPIES)}
        ends = {bounds[-1] for bounds in self.bounds}
        now: tuple[int, int] | None = None
        for i, node in enumerate(self.few.nodes):
            now = where.get(i, None if i in ends else now)
            if now is None:
                for value in node.inputs:
                    self._outside(value)
                result.append(node)
                continue
            run, copy = now
            if i in where and copy == COPIES - 1:
                for k in range(2, self.counts[run] - 1):
                    result += self._segment(run, 1, k)
            if i in where:
                result += self._segment(run, copy, copy if copy < COPIES - 1 else self.counts[run] - 1)
        return result

    def _segment(self, run: int, copy: int, k: int) -> Iterator[Node]:
        """Makes the segment of copy ``k`` from that of ``copy``."""
        first, stop = self.bounds[run][copy : copy + 2]
        for node in self.few.nodes[first:stop]:
            inputs = tuple([self._inside(v, run, copy, k) for v in node.inputs])
            outputs = node.outputs if copy != 1 or k == 1 else tuple([f"{k}:{v}" for v in node.outputs])
            changes: dict[str, Any] = {"inputs": inputs, "outputs": outputs}
            if copy != k:
                changes["module"] = self._moved(node.module, run, copy, k)
                changes["calls"] = tuple([(self._moved(path, run, copy, k), n) for path, n in node.calls])
                for name in ("mark", "region"):
                    if getattr(node, name) is not None:
                        changes[name] = self._mark(getattr(node, name), run, copy, k)
            yield _changed(node, changes)

    def _updates(self, inputs: Sequence[GraphInput]) -> tuple[tuple[str, str], ...]:
        """Lists the updates in the order of the inputs, as a capture does."""
        made = dict(self.few.updates)
        for name, value in self.few.updates:
            place, of_value = self.places.get(name), self.places.get(value)
            if place is None:
                continue
            if of_value is None or (of_value.run, of_value.copy) != (place.run, place.copy):
                raise _NotRepeated
            if place.copy == 1:
                made.update((f"{k}:{name}", f"{k}:{value}") for k in range(2, self.counts[place.run] - 1))
        return tuple((i.value, made[i.value]) for i in inputs if i.value in made)

    def _with_inputs(self, node: Node, known: dict[str, str]) -> Node:
        """Renames a node's inputs that are graph inputs. Those of other nodes are renamed when these are numbered."""
        inputs = tuple([known.get(value, value) for value in node.inputs])
        return node if inputs == node.inputs else _changed(node, {"inputs": inputs})

    def _moved(self, path: str, run: int, copy: int, k: int) -> str:
        """Translates the path of something in ``copy`` to its path in copy ``k``. Other paths stay."""
        before = self.runs[run].copies[copy]
        return self.runs[run].copies[k] + path[len(before) :] if is_within(path, before) else path

    def _mark(self, mark: Mark, run: int, copy: int, k: int) -> Mark:
        if mark.module_path is None or not is_within(mark.module_path, self.runs[run].copies[copy]):
            return mark
        path = self._moved(mark.module_path, run, copy, k)
        if mark is self.by_path.get(mark.module_path):
            return self.by_path[path]
        return replace(mark, module_path=path)


def _changed(node: Node, changes: dict[str, Any]) -> Node:
    """Computes ``replace(node, **changes)`` ten times as fast. A large model has tens of thousands of nodes."""
    made = object.__new__(Node)
    made.__dict__.update(node.__dict__)
    made.__dict__.update(changes)
    return made


def _plain(graph_input: GraphInput) -> str:
    """Returns the name that a capture gives an input that is not the user's."""
    if graph_input.kind == "constant" and graph_input.value.startswith("c_"):
        return graph_input.value
    return str(graph_input.target).replace(".", "_")


# -- equality ---------------------------------------------------------------------------------------------------------


def same_graphs(a: Graph, b: Graph) -> bool:
    """Tells whether two captures are equal in everything: names, shapes, connections, sources and marks."""
    if a.inputs != b.inputs or a.updates != b.updates or a.out_spec != b.out_spec or len(a.nodes) != len(b.nodes):
        return False
    if a.outputs != b.outputs:
        return False
    return all(_same_nodes(x, y) for x, y in zip(a.nodes, b.nodes, strict=True))


def _same_nodes(a: Node, b: Node) -> bool:
    plain = ("name", "inputs", "outputs", "module", "source", "mark_positions", "mark_count", "autocast", "grad", "op",
             "recompute", "calls")  # fmt: skip
    if any(getattr(a, name) != getattr(b, name) for name in plain) or repr(a.op.args) != repr(b.op.args):
        return False
    return _same_marks(a.mark, b.mark) and _same_marks(a.region, b.region)


def _same_marks(a: Mark | None, b: Mark | None) -> bool:
    if a is b or a is None or b is None:
        return a is b
    return all(getattr(a, f.name) == getattr(b, f.name) for f in fields(Mark))
