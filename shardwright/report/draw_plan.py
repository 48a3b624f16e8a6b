"""Draws a plan: operators as boxes in their order, with their slice counts, and the moves between them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shardwright.base.text import bytes_text
from shardwright.errors import ShardwrightError
from shardwright.ir.graph import Node, is_configured
from shardwright.ir.layout import Layout
from shardwright.ir.layout_text import counts_of
from shardwright.ir.plan import Plan
from shardwright.ir.step import Step, any_communicates
from shardwright.plan.choose.edges import Edge, edges_of, sent
from shardwright.redistribute.steps import steps_between
from shardwright.report.draw import EDGE, INK, SUFFIXES

COLOURS = {
    "all_gather": "#c62828",
    "all_reduce": "#ef6c00",
    "reduce_scatter": "#6a1b9a",
    "all_to_all": "#1565c0",
    "permute": "#00695c",
    "exchange": "#4e342e",
    "slice": "#2e7d32",
}
STAYS = "#9e9e9e"
CONFIGURED, INFERRED = "#ffe9a8", "#f1f3f6"
MOST, ROWS = 300, 30
WIDTH, HEIGHT, ACROSS, DOWN = 4.4, 0.6, 8.0, 1.0  # of a box, and from one box to the next, in inches


def draw_plan(plan: Plan, path: str | Path) -> None:
    """Draws a plan's operators from top to bottom, with the forward's collectives along edges.

    A box has the slice counts of the operator's inputs and outputs; those that the user configured are yellow. The reduction of
    an operator's own sum is beside its box. An edge has the colour of the collective that redistributes it, and is dashed where
    only its gradient is redistributed. Edges from parameters are left out.

    Args:
        plan: the plan.
        path: where to write; the suffix is ``.png`` or ``.svg``.

    Raises:
        ShardwrightError: another suffix, or a plan of too many operators.
        ImportError: matplotlib is missing; the extra ``draw`` brings it.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ShardwrightError(f"cannot draw a {Path(path).suffix or 'file without a suffix'}: name a .png or .svg file")
    if len(plan.graph.nodes) > MOST:
        raise ShardwrightError(f"a plan of {len(plan.graph.nodes)} operators is too large to draw; {MOST} are the most")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'shardwright[draw]'") from error

    places = _places(plan.graph.nodes)
    columns = 1 + max((x for x, _ in places.values()), default=0)
    rows = 1 + max((y for _, y in places.values()), default=0)
    rc: Any = matplotlib.rc_context
    with rc({"svg.fonttype": "none", "svg.hashsalt": "shardwright", "font.size": 8}):
        figure = Figure(figsize=(columns * ACROSS, rows * DOWN + 1.3))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(-WIDTH / 2 - 0.4, (columns - 1) * ACROSS + ACROSS - WIDTH / 2 - 0.4)
        axes.set_ylim((rows - 1) * DOWN + 0.8, -1.3)
        axes.axis("off")
        kinds = _draw_edges(axes, plan, places)
        for node in plan.graph.nodes:
            kinds |= _draw_box(axes, plan, node, places[node.name])
        _draw_legend(axes, plan, kinds)
        metadata = {"Date": None} if Path(path).suffix.lower() == ".svg" else None
        figure.savefig(path, dpi=110, metadata=metadata)


def _places(nodes: Sequence[Node]) -> dict[str, tuple[int, int]]:
    """Assigns every operator a column and a row; columns have about the same length."""
    columns = max(1, -(-len(nodes) // ROWS))
    each = max(1, -(-len(nodes) // columns))
    return {node.name: divmod(i, each) for i, node in enumerate(nodes)}


def _centre(place: tuple[int, int]) -> tuple[float, float]:
    return place[0] * ACROSS, place[1] * DOWN


def _draw_box(axes: Any, plan: Plan, node: Node, place: tuple[int, int]) -> set[str]:
    from matplotlib.patches import FancyBboxPatch

    x, y = _centre(place)
    choice, configured = plan.choices[node.name], is_configured(node)
    axes.add_patch(
        FancyBboxPatch(
            (x - WIDTH / 2, y - HEIGHT / 2), WIDTH, HEIGHT, boxstyle="round,pad=0.02", zorder=3,
            facecolor=CONFIGURED if configured else INFERRED, edgecolor=INK if configured else EDGE,
            linewidth=2.0 if configured else 0.8,
        )
    )  # fmt: skip
    room = max(8, 58 - len(node.name))
    module = node.module if len(node.module) <= room else "…" + node.module[1 - room :]
    axes.text(
        x, y - 0.13, f"{node.name}   {module}".strip(), ha="center", va="center", color=INK, zorder=4,
        fontweight="bold" if configured else "normal",
    )  # fmt: skip
    text = f"{_counts(choice.inputs)}  →  {_counts(choice.outputs)}"
    axes.text(x, y + 0.13, text, ha="center", va="center", color=INK, zorder=4, fontsize=8 if len(text) < 70 else 6)
    kinds = set()
    for computed, done, meta in zip(choice.computed, choice.outputs, node.op.outputs):
        steps = () if computed.normal(meta.shape) == done.normal(meta.shape) else steps_between(computed, done, meta.shape)
        if steps:
            kinds.add(_main(steps))
            label = _text(steps, meta.shape, meta.dtype.itemsize)
            axes.text(
                x + WIDTH / 2 - 0.1, y + HEIGHT / 2 + 0.16, label, ha="right", va="center", zorder=5,
                color=COLOURS[_main(steps)], fontweight="bold",
            )  # fmt: skip
    return kinds


def _counts(layouts: Sequence[Layout]) -> str:
    return "  ".join(str(counts_of(layout)) for layout in layouts) or "–"


def _draw_edges(axes: Any, plan: Plan, places: dict[str, tuple[int, int]]) -> set[str]:
    from matplotlib.patches import FancyArrowPatch

    kinds: set[str] = set()
    drawn: set[tuple[str, str, Layout]] = set()
    for edge in edges_of(plan):
        if edge.producer is None or (edge.producer.name, edge.reader.name, edge.target) in drawn:
            continue
        drawn.add((edge.producer.name, edge.reader.name, edge.target))
        start, stop = places[edge.producer.name], places[edge.reader.name]
        near = start[0] == stop[0] and stop[1] == start[1] + 1
        colour, dashed, label = _look(edge, kinds)
        (x0, y0), (x1, y1) = _centre(start), _centre(stop)
        if near:
            ends, style = ((x0, y0 + HEIGHT / 2), (x1, y1 - HEIGHT / 2)), "arc3"
        else:
            side = WIDTH / 2 + 0.02
            ends = ((x0 + side, y0 + 0.1), (x1 + (side if start[0] == stop[0] else -side), y1 - 0.1))
            style = f"arc3,rad={-0.9 / (1 + 0.25 * abs(stop[1] - start[1]))}" if start[0] == stop[0] else "arc3"
        arrow = FancyArrowPatch(
            *ends, arrowstyle="-|>", mutation_scale=10, connectionstyle=style, color=colour, zorder=2,
            linestyle="--" if dashed else "-", linewidth=1.0 if colour == STAYS else 1.8,
        )  # fmt: skip
        axes.add_patch(arrow)
        if label:
            at = (x1 - WIDTH / 2 + 0.1, y1 - HEIGHT / 2 - 0.16) if near else (x1 + WIDTH / 2 + 0.3, y1 - 0.1)
            axes.text(*at, label, ha="left", va="center", color=colour, fontsize=8, zorder=5)
    return kinds


def _look(edge: Edge, kinds: set[str]) -> tuple[str, bool, str]:
    """Returns the colour of an edge, whether it is dashed, and its label."""
    moves = edge.redistribution()
    forward = moves.forward
    backward = moves.backward if edge.needs_grad else ()
    inherent = all(step.kind in ("all_reduce", "slice") for step in backward)  # of a gradient that is partial anyway
    if any_communicates(forward):
        kind, dashed, steps = _main(forward), False, forward
    elif backward and (forward or not inherent) and any_communicates(backward):
        kind, dashed, steps = _main(backward), True, backward
    else:
        kind = "slice" if forward else ""
        kinds.update({kind} - {""})
        return COLOURS.get(kind, STAYS), False, ""
    kinds.add(kind)
    label = _text(steps, edge.shape, edge.itemsize)
    return COLOURS[kind], dashed, f"{label} (gradient)" if dashed else label


def _main(steps: Sequence[Step]) -> str:
    """Returns the kind of step that determines the colour: the first that communicates."""
    return next((step.kind for step in steps if step.communicates), "slice")


def _text(steps: tuple[Step, ...], shape: tuple[int, ...], itemsize: int) -> str:
    names = " + ".join(step.kind for step in steps if step.communicates)
    return f"{names} {bytes_text(sent(steps, shape) * itemsize)}"


def _draw_legend(axes: Any, plan: Plan, kinds: set[str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Patch(facecolor=CONFIGURED, edgecolor=INK, label="configured"),
        Patch(facecolor=INFERRED, edgecolor=EDGE, label="inferred"),
        *(Line2D([], [], color=COLOURS[kind], linewidth=2, label=kind) for kind in COLOURS if kind in kinds),
        Line2D([], [], color=STAYS, label="stays"),
    ]
    title = f"{plan.mesh.size} ranks, {plan.mesh}, {plan.mode}"
    axes.legend(
        handles=handles, loc="upper left", ncols=len(handles) if len(handles) < 7 else 5, frameon=False, title=title,
        alignment="left", columnspacing=1.2,
    )  # fmt: skip
