"""Summary of a plan on one page: what a step costs and where, the memory of a rank, how much of the work is split."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from shardwright.base.operators import without_library
from shardwright.base.text import alike_name, bytes_text, pattern, seconds_text
from shardwright.cost.operations import flops
from shardwright.ir.layout_text import texts
from shardwright.plan.choose.tables import code_of, local_sizes, table_of_choice
from shardwright.plan.memory import step_memory
from shardwright.plan.price.price_of import price_of

if TYPE_CHECKING:
    from shardwright.ir.layout import Layout
    from shardwright.ir.plan import Plan
    from shardwright.plan.price.values import MovePrice

WIDTH = 150
OPTIMAL = 1e-9  # a smaller gap is rounding
_MOST = 5  # rows of the most expensive
_MOST_READERS = 3  # of a redistribution, by name

# By pattern of a name and by operation: names and seconds of those that are alike.
_Found = dict[tuple[str, str], list[tuple[str, float]]]


@dataclass(frozen=True)
class Costly:
    """Operators or redistributions that are alike, in the repeated layers of a model: how many, and seconds of all."""

    name: str
    count: int
    seconds: float
    what: str


@dataclass(frozen=True)
class PlanSummary:
    """A plan on one page.

    Args:
        seconds, parts: seconds of a step, in all and by part.
        bytes: bytes that the busiest rank sends.
        memory, memory_parts, memory_limit: bytes of a rank at the peak of a step; the limit that was asked for, or else the
            memory of the machine's devices, where it is known.
        flops_split: how much of an even split operators reach, on average over FLOPs: 1 where every rank does ``1/n`` of the
            work, ``1/n`` where every rank does all of it.
        parameters_split: the same for the bytes of parameters as they are stored.
        gap: share of the step's time by which the best plan might be better; ``None`` without a search.
        planning: seconds that the search took.
        operators, moves: the most expensive ones.
    """

    title: str
    machine: str
    seconds: float
    parts: dict[str, float]
    bytes: float
    memory: float
    memory_parts: dict[str, float]
    memory_limit: float | None
    flops_split: float
    parameters_split: float
    gap: float | None
    method: str
    planning: float
    operators: tuple[Costly, ...]
    moves: tuple[Costly, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        from rich.console import Console  # here: importing it draws from Python's random generator

        console = Console(file=io.StringIO(), width=WIDTH, no_color=True, highlight=False, legacy_windows=False)
        console.print(_facts(self))
        console.print(_costly("most expensive operators", self.operators, self.seconds))
        if self.moves:
            console.print(_costly("most expensive redistributions", self.moves, self.seconds))
        for note in self.notes:
            console.print(f"note: {note}", markup=False)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in text.splitlines())


def summary_of(plan: Plan) -> PlanSummary:
    """Sums a plan up, priced on its machine."""
    price, search = price_of(plan), plan.search
    limit = plan.memory_limit if plan.memory_limit is not None else price.machine.memory or None
    return PlanSummary(
        f"plan for {plan.mesh.size} ranks, mesh {plan.mesh if plan.mesh.axes else '()'}, mode {plan.mode}",
        price.machine.name,
        price.seconds,
        dict(price.parts),
        price.bytes,
        float(step_memory(plan).peak),
        {name: float(size) for name, size in step_memory(plan).parts.items()},
        limit,
        flops_split(plan),
        parameters_split(plan),
        search.gap if search is not None and search.bound > 0 else None,
        search.method if search is not None else "",
        search.planning if search is not None else 0.0,
        _operators(plan),
        _moves(plan),
        (*plan.notes, *_too_much(step_memory(plan).peak, limit)),
    )


def _too_much(peak: float, limit: float | None) -> Iterable[str]:
    """Yields warnings about a plan that does not fit into memory."""
    if limit is not None and peak > limit:
        yield (
            f"a rank needs {bytes_text(int(peak))} and has {bytes_text(int(limit))}: split more, store parameters in pieces "
            "(.hsdp()), have layers computed again (.recompute('auto')), or use a smaller batch"
        )


# -- how much is split ----------------------------------------------------------------------------------------------------


def flops_split(plan: Plan) -> float:
    """Computes how much of an even split operators reach, on average over FLOPs; 1 where there are none."""
    total = reached = 0.0
    shares: dict[tuple[int, int], tuple[float, float]] = {}
    for node in plan.graph.nodes:
        choice = plan.choices[node.name]
        key = (id(node.op), id(choice))
        if key not in shares:
            work = flops(node.op)
            share = 1.0
            if work:
                signature = plan.signatures[node.name]
                share = float(table_of_choice(node.op, signature, choice.mesh, choice).fraction[0])
            shares[key] = work, share
        work, share = shares[key]
        total += work
        reached += work / (share * plan.mesh.size) if share else work
    return reached / total if total else 1.0


def parameters_split(plan: Plan) -> float:
    """Computes how much of an even split stored parameters reach, on average over bytes."""
    total = reached = 0.0
    for i in plan.graph.inputs:
        if i.kind == "parameter" and i.meta.numel:
            total += i.meta.bytes
            share = piece_share(plan.input_layouts[i.value], i.meta.shape)
            reached += i.meta.bytes / (share * plan.mesh.size)
    return reached / total if total else 1.0


def piece_share(layout: Layout, shape: tuple[int, ...]) -> float:
    """Computes the largest piece's share of a tensor.

    >>> from shardwright.ir.layout import Layout
    >>> piece_share(Layout((2, 4), ("dp", "tp"))("tp", "None"), (6, 2))
    0.3333333333333333
    """
    mesh, total, whole = layout.mesh, 1.0, 1
    codes = np.array(code_of(layout, mesh))
    for dim, size in enumerate(shape):
        explicit = layout.sizes[dim]
        total *= max(explicit) if explicit else float(local_sizes(np.where(codes == dim, 0, -1), (size,), mesh.sizes))
        whole *= size
    return total / max(1, whole)


# -- what costs most ------------------------------------------------------------------------------------------------------


def _operators(plan: Plan) -> tuple[Costly, ...]:
    found: _Found = {}
    for node in plan.graph.nodes:
        price = price_of(plan).operators.get(node.name)
        if price is not None:
            choice = plan.choices[node.name]
            name = _operator(node)
            key = (_pattern(name), f"{texts(choice.inputs)} -> {texts(choice.outputs)}")
            found.setdefault(key, []).append((name, price.seconds))
    return _largest(found)


def _moves(plan: Plan) -> tuple[Costly, ...]:
    modules = {node.name: node for node in plan.graph.nodes}
    makers = {value: node for node in plan.graph.nodes for value in node.outputs}
    names = {i.value: str(i.target) for i in plan.graph.inputs}
    found: _Found = {}
    for move in price_of(plan).moves:
        maker = makers.get(move.value)
        source = _place(maker) if maker else names.get(move.value, move.value)
        readers = dict.fromkeys(_place(modules[r]) if r in modules else r for r in move.readers)
        if maker is not None and source in readers:  # within a module operators are distinguished by their kind
            source = _operator(maker)
            readers = dict.fromkeys(_operator(modules[r]) if r in modules else r for r in move.readers)
        more = len(readers) - _MOST_READERS
        shown = [*list(readers)[:_MOST_READERS], *([f"{more} more"] if more > 0 else [])]
        name = f"{source} to {' and '.join(shown)}" if readers else source
        if move.seconds > 0:
            found.setdefault((_pattern(name), steps_text(move)), []).append((name, move.seconds))
    return _largest(found)


def _place(node: Any) -> str:
    return node.module or without_library(node.op.name)


def _pattern(name: str) -> str:
    """Replaces the numbers in a name of modules and operators by a placeholder."""
    return " ".join("/".join(map(pattern, word.split("/"))) for word in name.split(" "))


def _operator(node: Any) -> str:
    return f"{node.module}/{without_library(node.op.name)}".lstrip("/")


def steps_text(move: MovePrice) -> str:
    """Describes a redistribution, forward and backward, with its bytes."""
    forward, backward = (" + ".join(map(str, steps)) for steps in (move.forward, move.backward))
    return ", ".join(filter(None, (forward, backward and f"backward {backward}", bytes_text(int(move.bytes)))))


def _largest(found: _Found) -> tuple[Costly, ...]:
    rows = [
        Costly(alike_name([name for name, _ in all_of]), len(all_of), sum(seconds for _, seconds in all_of), what)
        for (_, what), all_of in found.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.seconds)[:_MOST])


# -- text -----------------------------------------------------------------------------------------------------------------


def _facts(summary: PlanSummary) -> object:
    from rich.table import Table

    table = Table(title=summary.title, title_justify="left", show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, text in _lines(summary):
        table.add_row(name, text)
    return table


def _lines(summary: PlanSummary) -> Iterable[tuple[str, str]]:
    whole = summary.seconds or 1.0
    parts = ", ".join(f"{name} {seconds_text(s)} ({s / whole:.0%})" for name, s in summary.parts.items() if s)
    yield "machine", summary.machine
    yield "a step", f"{seconds_text(summary.seconds)}: {parts}"
    yield "a rank sends", f"{bytes_text(int(summary.bytes))} a step"
    kept = ", ".join(f"{name} {bytes_text(int(size))}" for name, size in summary.memory_parts.items() if size)
    limit = f" of {bytes_text(int(summary.memory_limit))}" if summary.memory_limit is not None else ""
    yield "a rank holds", f"{bytes_text(int(summary.memory))}{limit} at most: {kept}"
    yield "really split", f"{summary.flops_split:.1%} of FLOPs, {summary.parameters_split:.1%} of parameters"
    if summary.method:
        certified = "nothing certified" if summary.gap is None else gap_text(summary.gap)
        yield "search", f"{summary.method}, {certified}, planned in {seconds_text(summary.planning)}"


def gap_text(gap: float) -> str:
    """Describes how far a plan may be from the best one.

    >>> gap_text(2e-16), gap_text(0.0023)
    ('optimal', 'at most 0.23% from the best')
    """
    if gap < OPTIMAL:
        return "optimal"
    return f"at most {max(gap, 1e-4):.2%} from the best"


def _costly(title: str, rows: Iterable[Costly], whole: float) -> object:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for justify in ("right", "left", "right", "right", "left"):
        table.add_column(justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        times = f"{row.count} ×" if row.count > 1 else ""
        table.add_row(times, row.name, seconds_text(row.seconds), f"{row.seconds / (whole or 1.0):.1%}", row.what)
    return table
