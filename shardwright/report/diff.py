"""Differences between two plans, and what they are worth.

Operators are matched as plan files match them, by module, name and place, so that plans of different graphs compare as far
as they have operators in common. Layouts over different meshes are the same where every rank has the same pieces.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shardwright.base.text import bytes_text, pattern, seconds_text
from shardwright.ir.layout import Layout
from shardwright.ir.layout_text import brief, texts
from shardwright.ir.names import key_pattern, operator_keys
from shardwright.plan.memory import step_memory
from shardwright.plan.price.price_of import price_of, priced_on

if TYPE_CHECKING:
    from shardwright.ir.plan import Plan

WIDTH = 150
Digits = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Difference:
    """One operator, parameter, input or redistribution in which two plans differ; ``None``: one of them lacks it."""

    name: str
    here: str | None
    there: str | None


@dataclass(frozen=True)
class PlanDiff:
    """Differences between two plans; falsy where there are none.

    Args:
        plans: ranks, mesh and mode of both, where they differ.
        operators: layouts as ``inputs -> outputs``, by the names that plan files use.
        parameters, inputs: layouts in which parameters are stored and inputs given.
        edges: redistributions as ``source -> target``, by the operator and the input that reads.
        prices: of both plans, seconds of a step by part, ``seconds`` in all, ``bytes`` that a rank sends and ``memory`` at its
            peak; empty where one of the two cannot be priced.
    """

    plans: tuple[str, str]
    operators: tuple[Difference, ...]
    parameters: tuple[Difference, ...]
    inputs: tuple[Difference, ...]
    edges: tuple[Difference, ...]
    prices: dict[str, tuple[float, float]]

    def __bool__(self) -> bool:
        return bool(self.operators or self.parameters or self.inputs)

    def __str__(self) -> str:
        from rich.console import Console  # here: importing it draws from Python's random generator

        if not self:
            return "the plans are equal"
        console = Console(file=io.StringIO(), width=WIDTH, no_color=True, highlight=False, legacy_windows=False)
        console.print(f"here:  {self.plans[0]}\nthere: {self.plans[1]}", markup=False)
        for title in ("operators", "parameters", "inputs", "edges"):
            found = getattr(self, title)
            if found:
                console.print(_table(title, found))
        if self.prices:
            console.print(_price_table(self.prices))
        text = console.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in text.splitlines())


def diff_plans(here: Plan, there: Plan) -> PlanDiff:
    """Compares two plans: operators, parameters, inputs, redistributions and prices."""
    return PlanDiff(
        (_title(here), _title(there)),
        tuple(_differences(_operators(here), _operators(there))),
        tuple(_differences(_tensors(here, ("parameter", "buffer")), _tensors(there, ("parameter", "buffer")))),
        tuple(_differences(_tensors(here, ("input",)), _tensors(there, ("input",)))),
        tuple(d for d in _differences(_edges(here), _edges(there), optional=True)),
        _prices(here, there),
    )


def _title(plan: Plan) -> str:
    return f"plan for {plan.mesh.size} ranks, mesh {plan.mesh if plan.mesh.axes else '()'}, mode {plan.mode}"


# -- what is compared -----------------------------------------------------------------------------------------------------

Sides = dict[str, tuple[Any, str]]  # by name: what must be equal, and its text


class _Placements:
    """Placements of layouts, each computed once."""

    def __init__(self) -> None:
        self.known: dict[tuple[Layout, tuple[int, ...]], Any] = {}

    def of(self, layout: Layout, shape: tuple[int, ...]) -> Any:
        key = (layout, shape)
        if key not in self.known:
            self.known[key] = placement(layout, shape)
        return self.known[key]


def _operators(plan: Plan) -> Sides:
    keys, places = operator_keys(plan.graph), _Placements()
    result = {}
    for node in plan.graph.nodes:
        choice = plan.choices[node.name]
        tensors = [*zip(choice.inputs, node.op.inputs), *zip(choice.outputs, node.op.outputs)]
        place = tuple(places.of(layout, meta.shape) for layout, meta in tensors)
        result[keys[node.name]] = (place, f"{texts(choice.inputs)} -> {texts(choice.outputs)}".strip())
    return result


def _tensors(plan: Plan, kinds: tuple[str, ...]) -> Sides:
    found = [(i, plan.input_layouts[i.value]) for i in plan.graph.inputs if i.kind in kinds]
    return {str(i.target): (placement(layout, i.meta.shape), brief(layout)) for i, layout in found}


def _edges(plan: Plan) -> Sides:
    """Finds the edges on which something is redistributed, or a gradient is partial."""
    keys, places = operator_keys(plan.graph), _Placements()
    where = dict(plan.input_layouts)
    for node in plan.graph.nodes:
        where.update(zip(node.outputs, plan.choices[node.name].outputs))
    result = {}
    for node in plan.graph.nodes:
        choice = plan.choices[node.name]
        for slot, (value, target, gradient) in enumerate(zip(node.inputs, choice.inputs, choice.partial_gradient)):
            source, shape = where[value], plan.graph.metas[value].shape
            ends = (places.of(source, shape), places.of(target, shape))
            if ends[0] != ends[1] or gradient:
                partial = f", gradient partial over {','.join(gradient)}" if gradient else ""
                place = (*ends, _merged([_digit(target, a) for a in gradient]))
                result[f"{keys[node.name]} input {slot}"] = (place, f"{brief(source)} -> {brief(target)}{partial}")
    return result


def _differences(here: Sides, there: Sides, optional: bool = False) -> Iterator[Difference]:
    """Yields the differences. With ``optional``, a name that only one side has is no difference."""
    gone = "none" if optional else None
    for name in [*here, *(n for n in there if n not in here)]:
        mine, other = here.get(name), there.get(name)
        if mine is None or other is None or mine[0] != other[0]:
            yield Difference(name, mine[1] if mine else gone, other[1] if other else gone)


def placement(layout: Layout, shape: tuple[int, ...]) -> Any:
    """Describes a layout's placement of a tensor. Axis names and the mesh's factors do not matter.

    An axis is a digit of the rank: how far apart its ranks are, and how many. Digits that follow each other are joined.

    >>> fine, coarse = Layout((2, 2), ("dp", "tp")), Layout((4,), ("d0",))
    >>> placement(fine(("dp", "tp")), (8,)) == placement(coarse("d0"), (8,))
    True
    """
    order = () if layout.mesh.ranks == tuple(range(layout.mesh.size)) else layout.mesh.ranks
    dims = []
    for dim, axes in enumerate(layout.bound):
        digits = _merged([_digit(layout, a) for a in axes])
        even = layout.sizes[dim] is None and shape[dim] % max(1, layout.mesh.count(axes)) == 0
        dims.append((digits, None if even else layout.pieces(dim, shape[dim])))
    sums = {op: _merged([_digit(layout, a) for a, o in layout.partial if o == op]) for _, op in layout.partial}
    return tuple(dims), tuple(sorted(sums.items())), order


def _digit(layout: Layout, axis: str) -> tuple[int, int]:
    mesh = layout.mesh
    at = mesh.axes.index(axis)
    return mesh.count(mesh.axes[at + 1 :]), mesh.sizes[at]


def _merged(digits: list[tuple[int, int]]) -> Digits:
    result: list[tuple[int, int]] = []
    for stride, size in digits:
        if size == 1:
            continue
        if result and result[-1][0] == stride * size:
            result[-1] = (stride, result[-1][1] * size)
        else:
            result.append((stride, size))
    return tuple(result)


# -- prices ---------------------------------------------------------------------------------------------------------------


def _prices(here: Plan, there: Plan) -> dict[str, tuple[float, float]]:
    """Prices both plans on the machine of the first, or else of the second."""
    machine = here.machine or there.machine
    try:
        mine = price_of(here) if here.machine == machine else priced_on(here, machine or "cpu-gloo")
        other = price_of(there) if there.machine == machine else priced_on(there, machine or "cpu-gloo")
        memory = (float(step_memory(here).peak), float(step_memory(there).peak))
    except (KeyError, ValueError, NotImplementedError):
        return {}
    parts = {part: (seconds, other.parts.get(part, 0.0)) for part, seconds in mine.parts.items()}
    return {**parts, "seconds": (mine.seconds, other.seconds), "bytes": (mine.bytes, other.bytes), "memory": memory}


def _price_table(prices: dict[str, tuple[float, float]]) -> object:
    table = _empty("a step", "", "here", "there", "difference")
    for name, (mine, other) in prices.items():
        text = seconds_text if name not in ("bytes", "memory") else lambda value: bytes_text(int(value))
        label = {"bytes": "bytes a rank sends", "memory": "memory of a rank", "seconds": "in all"}.get(name, name)
        change = f"{(other - mine) / mine:+.1%}" if mine else ""
        table.add_row(label, text(mine), text(other), "" if mine == other else f"{change}")
    return table


# -- text -----------------------------------------------------------------------------------------------------------------


def _empty(title: str, *columns: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _table(title: str, found: Iterable[Difference]) -> object:
    """Builds a table of differences, with repeated layers in one row."""
    groups: dict[tuple[Any, ...], int] = {}
    for one in found:
        name = key_pattern(one.name) if "/" in one.name else pattern(one.name)
        key = (name, one.here, one.there)
        groups[key] = groups.get(key, 0) + 1
    table = _empty(title, "", "name", "here", "there")
    for (name, mine, other), count in groups.items():
        table.add_row(f"{count} ×" if count > 1 else "", name, *("not there" if t is None else t for t in (mine, other)))
    return table
