"""Explains why an operator runs as it does, what that costs, and its alternatives."""

from __future__ import annotations

import difflib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from shardwright.base.text import bytes_text, pattern, seconds_text
from shardwright.errors import ShardwrightError
from shardwright.ir.graph import Node
from shardwright.ir.layout import Layout
from shardwright.ir.layout_text import brief, counts_of, texts
from shardwright.ir.names import LOADED, key_pattern, operator_keys
from shardwright.plan.price.alternatives import Alternative, Repricer
from shardwright.plan.price.price_of import price_of

if TYPE_CHECKING:
    from shardwright.cost.communication import CollectivePrice
    from shardwright.ir.choice import Choice
    from shardwright.ir.plan import Plan
    from shardwright.plan.price.values import MovePrice, OperatorPrice

WIDTH = 150
_CLOSE = 5  # names that an error suggests

_BY_MODE = {
    "semi_auto": "nothing asks for it: it follows parameters that are laid out and operators that are configured, or is data "
    "parallel",
    "data_parallel": "data parallel: the batch is split over all ranks",
    "sharding_propagation": "propagated from the operators that are configured",
}


@dataclass(frozen=True)
class Movement:
    """Redistribution next to an operator. ``side``: ``reads`` or ``hands on``."""

    side: str
    value: str
    move: MovePrice


@dataclass(frozen=True)
class Stored:
    """Parameter that an operator reads: the layout it is stored in, and the bytes of it that a rank holds."""

    name: str
    shape: tuple[int, ...]
    layout: Layout
    bytes: float


@dataclass(frozen=True)
class OperatorExplanation:
    """One operator, or several of repeated layers that are alike.

    Args:
        name: as in plan files; with ``*`` for the numbers of layers where it stands for several ``nodes``.
        why: the reason for its choice.
        price: ``None`` for an operator that costs nothing, as every rank makes its own piece of it.
        own: the collectives that it runs itself, after computing and before its results are read, in words.
        alternatives: other choices, and their prices with everything else unchanged.
    """

    name: str
    nodes: tuple[str, ...]
    where: str
    why: str
    inputs: tuple[Layout, ...]
    outputs: tuple[Layout, ...]
    price: OperatorPrice | None
    own: str
    moves: tuple[Movement, ...]
    parameters: tuple[Stored, ...]
    alternatives: tuple[Alternative, ...]

    @property
    def seconds(self) -> float:
        """Seconds of one of them, with every redistribution next to it, shared ones included."""
        return (self.price.seconds if self.price else 0.0) + sum(m.move.seconds for m in self.moves)


@dataclass(frozen=True)
class Explanation:
    """Result of :func:`explain`; prints as text."""

    asked: str
    operators: tuple[OperatorExplanation, ...]

    def __str__(self) -> str:
        return "\n\n".join(_text(one) for one in self.operators)


def explain(plan: Plan, name: str) -> Explanation:
    """Explains the operators of a module, a node, or those that a pattern fits.

    Args:
        plan: the plan.
        name: the path of a module (with all below it), the name of a node, of an operator as in plan files, or of a parameter,
            for the operators that read it; or a pattern for these, as in ``fnmatch``.

    Raises:
        ShardwrightError: nothing has this name.
    """
    keys = operator_keys(plan.graph)
    found = _named(plan, name, keys)
    repricer = Repricer(plan)
    groups: dict[Any, list[tuple[Node, _Facts]]] = {}
    facts = _PlanFacts(plan, repricer)
    for node in found:
        fact = facts.of(node)
        groups.setdefault((key_pattern(keys[node.name]), *fact.alike), []).append((node, fact))
    explained = []
    for members in groups.values():
        node, fact = members[0]
        choice = plan.choices[node.name]
        several = len(members) > 1
        explained.append(
            OperatorExplanation(
                key_pattern(keys[node.name]) if several else keys[node.name],
                tuple(n.name for n, _ in members),
                node.op.name if several else node.where,
                fact.why,
                choice.inputs,
                choice.outputs,
                price_of(plan).operators.get(node.name),
                _own(choice, price_of(plan).operators.get(node.name)),
                fact.moves,
                fact.parameters,
                tuple(repricer.alternatives(node)),
            )
        )
    return Explanation(name, tuple(explained))


# -- names ----------------------------------------------------------------------------------------------------------------


def _named(plan: Plan, name: str, keys: dict[str, str]) -> list[Node]:
    """Finds the nodes that a name stands for, in the order in which they run."""
    reads = {i.value: str(i.target) for i in plan.graph.inputs if i.kind in ("parameter", "buffer")}
    names = {
        node.name: (node.name, keys[node.name], node.module, *(reads[v] for v in node.inputs if v in reads))
        for node in plan.graph.nodes
    }
    found = [n for n in plan.graph.nodes if name in names[n.name] or (name and n.module.startswith(f"{name}."))]
    if not found:
        found = [n for n in plan.graph.nodes if any(fnmatchcase(known, name) for known in names[n.name])]
    if not found:
        paths = {".".join(n.module.split(".")[:i]) for n in plan.graph.nodes for i in range(1, n.module.count(".") + 2)}
        known = sorted(({text for group in names.values() for text in group} | paths) - {""})
        close = difflib.get_close_matches(name, known, _CLOSE, 0.5) or [p for p in known if p.endswith(name.split(".")[-1])]
        hint = f"close to it: {', '.join(close[:_CLOSE])}" if close else f"there are, for example, {', '.join(known[:_CLOSE])}"
        raise ShardwrightError(f"nothing in the plan is called {name!r}: give a module, an operator, a parameter or a pattern; "
                               f"{hint}")  # fmt: skip
    return found


# -- facts ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Facts:
    """Facts of one node: what is shown, and what distinguishes it from others."""

    why: str
    moves: tuple[Movement, ...]
    parameters: tuple[Stored, ...]
    alike: tuple[Any, ...]


class _PlanFacts:
    """Looks up facts in a plan and its price."""

    def __init__(self, plan: Plan, repricer: Repricer):
        self.plan, self.repricer = plan, repricer
        self.inputs = {i.value: i for i in plan.graph.inputs}
        self.of_value: dict[str, list[MovePrice]] = {}
        for move in price_of(plan).moves:
            self.of_value.setdefault(move.value, []).append(move)
        self.loaded = next((note for note in plan.notes if note.startswith(LOADED)), "")
        self.ruleless = {note.partition(" has no rule")[0] for note in plan.notes if " has no rule" in note}

    def of(self, node: Node) -> _Facts:
        choice = self.plan.choices[node.name]
        moves = tuple(self._moves(node))
        parameters = tuple(self._parameters(node))
        why = self._why(node)
        stored = tuple((p.shape, p.layout) for p in parameters)
        steps = tuple((m.side, m.move.source, m.move.target, m.move.gradient, len(m.move.readers)) for m in moves)
        return _Facts(why, moves, parameters, (why, choice.inputs, choice.outputs, node.op.inputs, stored, steps))

    def _moves(self, node: Node) -> Iterable[Movement]:
        for value in dict.fromkeys(node.inputs):
            for move in self.of_value.get(value, ()):
                if node.name in move.readers:
                    yield Movement("reads", self._name(value), move)
        for value in node.outputs:
            for move in self.of_value.get(value, ()):
                yield Movement("hands on", value, move)

    def _name(self, value: str) -> str:
        return str(self.inputs[value].target) if value in self.inputs and self.inputs[value].kind != "input" else value

    def _parameters(self, node: Node) -> Iterable[Stored]:
        for value in dict.fromkeys(node.inputs):
            i = self.inputs.get(value)
            price = price_of(self.plan).parameters.get(str(i.target)) if i is not None and i.kind == "parameter" else None
            if i is not None and price is not None:
                yield Stored(str(i.target), i.meta.shape, self.plan.input_layouts[value], price.bytes)

    def _why(self, node: Node) -> str:
        mark, plan = node.mark, self.plan
        if self.loaded:
            return self.loaded
        if mark is not None and mark.is_pin:
            return f"a layout is pinned here: {mark.name}{_at(mark.source)}"
        if mark is not None and mark.in_strategy is not None and plan.mode != "data_parallel":
            return f"the strategy of {mark.name}{_at(mark.source)}" if mark.name else f"pinned{_at(mark.source)}"
        if not self.repricer.is_priced(node):
            return "every rank can make any piece of it without communication: it is made where it is wanted"
        if node.where in self.ruleless:
            return "the operator has no rule: it runs whole on every rank"
        if node.region is not None and plan.mode != "data_parallel":
            return f"it stands inside {node.region.name}{_at(node.region.source)} and follows what comes in"
        if plan.search is not None:
            return f"chosen by the search ({plan.search.method})"
        return _BY_MODE.get(plan.mode, f"planned in mode {plan.mode}")


def _own(choice: Choice, price: OperatorPrice | None) -> str:
    """Describes the collectives that an operator runs on its sums before its outputs are read."""
    if price is None:
        return ""
    both = zip(choice.computed, choice.outputs)
    changed = "; ".join(f"{brief(computed)} -> {brief(outputs)}" for computed, outputs in both if computed != outputs)
    forward, backward = map(_steps, price.own)
    steps = ", ".join(filter(None, (forward, backward and f"backward {backward}")))
    return ": ".join(filter(None, (changed, steps)))


def _steps(steps: Iterable[CollectivePrice]) -> str:
    return " + ".join(f"{s} {bytes_text(int(s.bytes))} {seconds_text(s.seconds)}" for s in steps)


def _at(source: str) -> str:
    return f" at {source}" if source else ""


# -- text -----------------------------------------------------------------------------------------------------------------


def _text(one: OperatorExplanation) -> str:
    from rich.console import Console  # here: importing it draws from Python's random generator

    console = Console(file=io.StringIO(), width=WIDTH, no_color=True, highlight=False, legacy_windows=False)
    times = f"{len(one.nodes)} × " if len(one.nodes) > 1 else ""
    console.print(f"{times}{one.name}: {one.where}", markup=False)
    console.print(f"why: {one.why}", markup=False)
    console.print(_layout_table(one))
    if one.price is not None:
        console.print(_price_table(one, one.price))
    if one.alternatives:
        console.print(_alternative_table(one.alternatives))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


def _table(*columns: str, title: str | None = None) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _layout_table(one: OperatorExplanation) -> object:
    table = _table("", "layout", "slices")
    for side, layouts in (("reads", one.inputs), ("hands on", one.outputs)):
        for layout in layouts:
            table.add_row(side, brief(layout), _counts(layout))
    for stored in one.parameters:
        table.add_row(f"stored {pattern(stored.name) if len(one.nodes) > 1 else stored.name}", brief(stored.layout),
                      f"{_counts(stored.layout)} of {list(stored.shape)}, {bytes_text(int(stored.bytes))} a rank")  # fmt: skip
    return table


def _counts(layout: Layout) -> str:
    """Formats slice counts, and for pending sums the number of terms."""
    counts = counts_of(layout)
    ways = layout.mesh.count(layout.partial_axes)
    text = f"({', '.join(map(str, counts))}{',' if len(counts) == 1 else ''})"
    return text if ways == 1 else f"{text}, {ways} summands"


def _price_table(one: OperatorExplanation, price: OperatorPrice) -> object:
    table = _table("a step", "seconds", "what")
    for name, seconds, what in (
        ("forward", price.forward, ""), ("backward", price.backward, ""), ("own collectives", price.collectives, one.own)
    ):  # fmt: skip
        if seconds:
            table.add_row(name, seconds_text(seconds), what)
    for found in one.moves:
        move = found.move
        forward = _steps(move.forward) or ("nothing" if move.source == move.target else "slice")
        what = f"{found.value}: {brief(move.source)} -> {brief(move.target)}: {forward}"
        what += f", backward {_steps(move.backward)}" if move.backward else ""
        others = len(move.readers) - 1
        what += f", shared with {others} more" if found.side == "reads" and others > 0 else ""
        what += ", in collectives shared with other parameters" if move.shared else ""
        what += ", partly hidden" if move.is_hidden else ""
        table.add_row(found.side, seconds_text(move.seconds), what)
    if price.kept:
        table.add_row("keeps", bytes_text(int(price.kept)), "for the backward, besides its inputs")
    return table


def _alternative_table(found: Sequence[Alternative]) -> object:
    table = _table("instead", "it reads", "and hands on", "in slices", title="with everything else as it is")
    for one in found:
        table.add_row(
            f"{'+' if one.more >= 0 else '−'}{seconds_text(abs(one.more))}",
            texts(one.inputs),
            texts(one.outputs),
            " ".join(_counts(layout) for layout in one.inputs),
        )
    return table
