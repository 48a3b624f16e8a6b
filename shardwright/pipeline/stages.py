"""Assigns the operators of a graph to stages: by marks on modules, or balanced by cost.

A *row* is a set of ranks that runs stages; with as many stages as rows, stage ``s`` runs on row ``s``. Marks name rows. Where
a schedule gives a row several stages, what is marked with a row that the data has passed already belongs to the next stage of
that row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from shardwright.base.operators import may_draw
from shardwright.errors import Problems
from shardwright.ir.graph import Graph, GraphInput, Node


@dataclass(frozen=True)
class Mark:
    """A row that the user gave a module, and how it was said."""

    row: int
    source: str


@dataclass(frozen=True)
class Placement:
    """Rows of ranks, and the one that runs each stage."""

    rows: int
    row_of_stage: tuple[int, ...]

    @staticmethod
    def of(rows: int, stages_per_row: int = 1, v_shaped: bool = False) -> Placement:
        """Returns the placement of a schedule: stages go round the rows, or down and up again.

        >>> Placement.of(2, 2).row_of_stage, Placement.of(2, 2, v_shaped=True).row_of_stage
        ((0, 1, 0, 1), (0, 1, 1, 0))
        """
        turns = [range(rows) if not v_shaped or turn % 2 == 0 else range(rows - 1, -1, -1) for turn in range(stages_per_row)]
        return Placement(rows, tuple(row for turn in turns for row in turn))


Place = tuple[str, str]  # a module's path and a line of source


@dataclass
class KnownCut:
    """Stages of an earlier cut without marks, which later ones follow: parameters stay where they are.

    Args:
        of_parameter: the stages that read each parameter.
        of_operator: by place, the stages of the operators there, in order.
    """

    of_parameter: dict[str, list[int]] = field(default_factory=dict)
    of_operator: dict[Place, list[int]] = field(default_factory=dict)

    def note(self, graph: Graph, stage_of: Mapping[str, int], readers: Iterable[tuple[str, int]], count: int) -> None:
        """Records a cut.

        Args:
            graph: the whole graph.
            stage_of: the stage of every operator that is not free.
            readers: each parameter with a stage that reads it.
            count: the number of stages; a tail counts as the last.
        """
        for name, stage in readers:
            self.of_parameter.setdefault(name, []).append(min(stage, count - 1))
        for node in graph.nodes:
            if node.name in stage_of:
                self.of_operator.setdefault(place_of(node), []).append(min(stage_of[node.name], count - 1))


def place_of(node: Node) -> Place:
    """Returns where an operator comes from."""
    return node.module, node.source


def is_received(graph_input: GraphInput) -> bool:
    """Tells whether an input of a stage's graph comes from another stage, rather than from the caller."""
    return graph_input.kind == "input" and isinstance(graph_input.target, str)


def free_nodes(graph: Graph) -> frozenset[str]:
    """Returns the operators that every stage can run for itself: what they compute depends on no batch that has passed others.

    They are made of inputs alone, or of parameters alone, or of either with buffers and constants, and draw no random numbers.
    """
    kinds = {i.value: _KINDS.get(i.kind, "constant") for i in graph.inputs if not is_received(i)}
    found = set()
    for node in graph.nodes:
        of_inputs = {kinds.get(value, "computed") for value in node.inputs} - {"constant"}
        if not may_draw(node.op.target) and "computed" not in of_inputs and len(of_inputs) < 2:
            kinds.update(dict.fromkeys(node.outputs, next(iter(of_inputs), "constant")))
            found.add(node.name)
    return frozenset(found)


_KINDS = {"input": "data", "parameter": "state"}


def assign_stages(
    graph: Graph, marks: Mapping[str, Mark], placement: Placement, costs: Mapping[str, float],
    known: KnownCut | None = None,
) -> dict[str, int]:  # fmt: skip
    """Returns the stage of every operator that is not free; see :func:`free_nodes`.

    Args:
        graph: the graph.
        marks: row by module path. An operator has that of the innermost marked module around it, another one that of what it
            reads.
        placement: which row runs which stage.
        costs: seconds per operator, for a cut without marks.
        known: an earlier cut without marks, which is followed if there is one.

    Raises:
        StrategyError: marks that contradict each other or the direction of the data, rows that do not exist, stages without
            work.
    """
    free = free_nodes(graph)
    nodes = [node for node in graph.nodes if node.name not in free]
    if not marks and known is not None and known.of_operator:
        return _as_before(graph, nodes, known)
    if not marks:
        return _balanced(nodes, len(placement.row_of_stage), costs)
    problems = Problems()
    _check_marks(marks, placement, problems)
    stages = {} if problems.lines else _by_marks(nodes, marks, placement, problems)
    problems.raise_if_any("the stages cannot be followed")
    return stages


def _as_before(graph: Graph, nodes: Sequence[Node], known: KnownCut) -> dict[str, int]:
    """Puts operators where they were, or where their parameters are already."""
    reads = {i.value: known.of_parameter.get(str(i.target), ()) for i in graph.inputs if i.kind == "parameter"}
    stage_of_value: dict[str, int] = {}
    found: dict[str, int] = {}
    times: Counter[Place] = Counter()
    for node in nodes:
        least = max((stage_of_value[v] for v in node.inputs if v in stage_of_value), default=-1)
        place = place_of(node)
        before = known.of_operator.get(place, ())
        if before:
            least = max(least, before[min(times[place], len(before) - 1)])
        own = [min((s for s in reads[v] if s >= least), default=least) for v in node.inputs if reads.get(v)]
        if own or least >= 0:
            found[node.name] = max(least, *own) if own else least
        if node.name in found:
            stage_of_value.update(dict.fromkeys(node.outputs, found[node.name]))
        times[place] += 1
    _fill_in(nodes, found)
    return found


def _fill_in(nodes: Sequence[Node], found: dict[str, int]) -> None:
    """Puts what is made before any operator that has a stage where it is read first."""
    wanted: dict[str, int] = {}
    for node in reversed(nodes):
        stage = found.setdefault(node.name, min((wanted[v] for v in node.outputs if v in wanted), default=0))
        for value in node.inputs:
            wanted[value] = min(stage, wanted.get(value, stage))


def _check_marks(marks: Mapping[str, Mark], placement: Placement, problems: Problems) -> None:
    for path, mark in marks.items():
        if mark.row >= placement.rows:
            problems.add(
                f"{mark.source} puts {path or 'the model'} on stage {mark.row}, and there are {placement.rows}: 0 to "
                f"{placement.rows - 1}"
            )
        outer = next((marks[p] for p in _paths_around(path) if p in marks), None)
        if outer is not None and outer.row != mark.row and not any(o != path and o.startswith(path) for o in marks):
            problems.add(
                f"{mark.source} puts {path} on stage {mark.row}, within a module that is on stage {outer.row} "
                f"({outer.source}): mark one of them"
            )


def _paths_around(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)] + ([""] if path else [])


def mark_of(node: Node, marks: Mapping[str, Mark]) -> Mark | None:
    """Returns the mark of the innermost marked module around an operator."""
    return next((marks[p] for p in [node.module, *_paths_around(node.module)] if p in marks), None)


def _by_marks(nodes: Sequence[Node], marks: Mapping[str, Mark], placement: Placement, problems: Problems) -> dict[str, int]:
    stage_of_value: dict[str, int] = {}
    found: dict[str, int] = {}
    maker: dict[str, Node] = {}
    for node in nodes:
        before = [stage_of_value[v] for v in node.inputs if v in stage_of_value]
        mark, least = mark_of(node, marks), max(before, default=-1)
        if mark is None:
            if not before:
                continue
            stage = least
        else:
            later = [s for s, row in enumerate(placement.row_of_stage) if row == mark.row and s >= least]
            if not later:
                reads = next(maker[v] for v in node.inputs if stage_of_value.get(v) == least)
                problems.add(
                    f"{node.where} is on stage {mark.row} ({mark.source}) and reads what {reads.where} makes on a later stage: "
                    "stages have to increase along the data; move the module to that stage, or a schedule with several stages "
                    "per rank: interleave=True"
                )
                return found
            stage = later[0]
        found[node.name] = stage
        stage_of_value.update(dict.fromkeys(node.outputs, stage))
        maker.update(dict.fromkeys(node.outputs, node))
    _fill_in(nodes, found)
    empty = sorted(set(range(len(placement.row_of_stage))) - set(found.values()))
    if empty:
        names = ", ".join(f"{path or 'the model'}: {mark.row}" for path, mark in list(marks.items())[:8])
        problems.add(f"no operator is on stage {', '.join(map(str, empty))} (marks: {names}): mark a module for each, or fewer")
    return found


def _balanced(nodes: Sequence[Node], count: int, costs: Mapping[str, float]) -> dict[str, int]:
    """Cuts the operators, in their order, into stages whose most expensive one is cheapest."""
    if len(nodes) < count:
        problems = Problems()
        problems.add(f"{len(nodes)} operators cannot make {count} stages: give fewer stages")
        problems.raise_if_any("the stages cannot be followed")
    seconds = [costs.get(node.name, 0.0) for node in nodes]
    low, high = max(max(seconds), sum(seconds) / count), sum(seconds)
    for _ in range(60):
        middle = (low + high) / 2
        if len(_fill(seconds, middle)) <= count:
            high = middle
        else:
            low = middle
    starts = _fill(seconds, high * (1 + 1e-12))
    while len(starts) < count:  # cut the longest stages that can be cut
        ends = [*starts[1:], len(nodes)]
        at = max(range(len(starts)), key=lambda i: (ends[i] - starts[i] > 1, sum(seconds[starts[i] : ends[i]])))
        starts.insert(at + 1, (starts[at] + ends[at]) // 2)
    found, stage = {}, -1
    for position, node in enumerate(nodes):
        if stage + 1 < count and position == starts[stage + 1]:
            stage += 1
        found[node.name] = stage
    return found


def _fill(seconds: Sequence[float], most: float) -> list[int]:
    """Returns where stages start if each is filled up to ``most`` seconds."""
    starts, total = [0], 0.0
    for position, own in enumerate(seconds):
        if total and total + own > most:
            starts.append(position)
            total = 0.0
        total += own
    return starts
