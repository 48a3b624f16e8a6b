"""Draws a layout: the tensor with its pieces, and the device grid, in the same colours."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shardwright.errors import ShardwrightError
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh

Bounds = tuple[tuple[int, int], ...]
Colours = dict[Bounds, tuple[float, float, float]]

SUFFIXES = (".png", ".svg")
TEXT_RANKS = 32  # in a larger grid the cells have no room for slices
NOTHING = (0.93, 0.93, 0.93)
ROOM = (350.0, 230.0)  # points that the drawing of a tensor has across and down, about
INK, EDGE = "#222222", "#555555"


def draw_layout(layout: Layout, shape: Sequence[int], path: str | Path) -> None:
    """Draws where the pieces of a tensor are: at the left the tensor, at the right the device grid.

    A piece has the same colour in both. Of a tensor with more than two dims the first two split ones are drawn.

    Args:
        layout: the layout, with as many dims as ``shape`` has.
        shape: global shape of the tensor.
        path: where to write; the suffix is ``.png`` or ``.svg``.

    Raises:
        ShardwrightError: another suffix, or a layout that does not fit the shape.
        ImportError: matplotlib is missing; the extra ``draw`` brings it.
    """
    draw_layouts([(layout, tuple(shape))], path)


def draw_layouts(tensors: Sequence[tuple[Layout, Sequence[int]]], path: str | Path) -> None:
    """Draws several layouts below each other; see :func:`draw_layout`.

    Raises:
        ShardwrightError: the file has no suffix of a picture. ImportError: matplotlib is missing.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ShardwrightError(f"cannot draw a {Path(path).suffix or 'file without a suffix'}: name a .png or .svg file")
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'shardwright[draw]'") from error

    # Text stays text in an SVG, and the same layout gives the same file.
    rc: Any = matplotlib.rc_context
    with rc({"svg.fonttype": "none", "svg.hashsalt": "shardwright", "font.size": 9}):
        engine = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15)
        figure = Figure(figsize=(12, 4.4 * len(tensors)), layout=engine)
        rows = figure.subplots(len(tensors), 2, squeeze=False, width_ratios=(1, 1.15))
        for (tensor_axes, grid_axes), (layout, shape) in zip(rows, tensors, strict=True):
            _draw_one(tensor_axes, grid_axes, layout, tuple(shape))
        metadata = {"Date": None} if Path(path).suffix.lower() == ".svg" else None
        figure.savefig(path, dpi=150, metadata=metadata)


def _draw_one(tensor_axes: Any, grid_axes: Any, layout: Layout, shape: tuple[int, ...]) -> None:
    bounds = layout.bounds(shape)
    dims = shown_dims(layout)
    pieces: dict[Bounds, list[int]] = {}
    for rank in sorted(bounds):
        pieces.setdefault(tuple(bounds[rank][d] for d in dims), []).append(rank)
    colours = _colours(list(pieces))
    _draw_tensor(tensor_axes, layout, shape, dims, pieces, colours)
    _draw_grid(grid_axes, layout.mesh, bounds, dims, colours)


def shown_dims(layout: Layout) -> tuple[int, ...]:
    """Returns the dims to draw, in order: up to two, split ones before others."""
    chosen = sorted(range(layout.ndim), key=lambda d: (not layout.bound[d], d))[:2]
    return tuple(sorted(chosen))


def _colours(pieces: Sequence[Bounds]) -> Colours:
    """Assigns each piece a colour: the hue changes along the dim with more pieces, the lightness along the other."""
    ndim = len(pieces[0])
    places = [sorted({p[d] for p in pieces}) for d in range(ndim)]
    by_count = sorted(range(ndim), key=lambda d: -len(places[d]))

    def share(piece: Bounds, order: int) -> float:
        if order >= ndim:
            return 0.0
        place = places[by_count[order]]
        return place.index(piece[by_count[order]]) / len(place)

    def colour(piece: Bounds) -> tuple[float, float, float]:
        if any(start == stop for start, stop in piece):
            return NOTHING
        return colorsys.hls_to_rgb(0.58 + share(piece, 0), 0.84 - 0.3 * share(piece, 1), 0.6)

    return {piece: colour(piece) for piece in pieces}


def rank_ranges(ranks: Sequence[int]) -> str:
    """Formats ranks as a short text.

    >>> rank_ranges([0, 1, 2, 3, 6, 8, 9])
    '0–3, 6, 8, 9'
    """
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [f"{r[0]}–{r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs]
    return ", ".join(parts)


def fit(ranks: Sequence[int], room: tuple[float, float]) -> tuple[str, float, int]:
    """Chooses text, font size and rotation of a label that fits in ``room`` (points across and down).

    >>> fit([3], (80, 40)), fit([3], (30, 40)), fit([10, 11, 12, 13], (14, 60))
    (('rank 3', 10, 0), ('3', 10, 0), ('10–13', 10, 90))
    """
    bare = rank_ranges(ranks)
    full = f"rank{'s' if len(ranks) > 1 else ''} {bare}"
    for text, size, rotation in (
        *((full, size, 0) for size in (10, 8)),
        *((bare, size, turn) for size in (10, 8, 6, 5) for turn in (0, 90)),
    ):
        needed = (0.62 * size * len(text) + 4, 1.3 * size)
        across, down = needed if rotation == 0 else needed[::-1]
        if across <= room[0] and down <= room[1]:
            return text, size, rotation
    return "", 5, 0


def _draw_tensor(
    axes: Any,
    layout: Layout,
    shape: tuple[int, ...],
    dims: tuple[int, ...],
    pieces: dict[Bounds, list[int]],
    colours: Colours,
) -> None:
    from matplotlib.patches import Rectangle

    rows, columns = [max(shape[d], 1) for d in dims] if len(dims) == 2 else (1, max(shape[dims[0]], 1) if dims else 1)
    aspect = min(max(rows / columns, 0.45), 1.0) if len(dims) == 2 else 0.2
    width = min(ROOM[0], ROOM[1] / aspect)
    empty: list[int] = []
    for piece, ranks in pieces.items():
        (top, bottom), (left, right) = piece if len(dims) == 2 else ((0, 1), piece[0] if piece else (0, 1))
        if top == bottom or left == right:
            empty += ranks
            continue
        axes.add_patch(
            Rectangle((left, top), right - left, bottom - top, facecolor=colours[piece], edgecolor=EDGE, linewidth=1)
        )
        room = (width * (right - left) / columns, width * aspect * (bottom - top) / rows)
        text, size, rotation = fit(ranks, room)
        middle = ((left + right) / 2, (top + bottom) / 2)
        axes.text(*middle, text, ha="center", va="center", rotation=rotation, fontsize=size, color=INK)
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    axes.set_box_aspect(aspect)
    _ticks(axes, [layout.bound[d] for d in dims], pieces, dims)
    title = f"{layout.short() or 'scalar'}  of  {list(shape)}"
    if len(shape) > 2:
        title += f"\ndims {dims[0]} and {dims[1]}; the others are {'split too' if _hidden(layout, dims) else 'whole'}"
    if empty:
        title += f"\nnothing on ranks {rank_ranges(sorted(empty))}"
    axes.set_title(title, fontsize=11, color=INK)


def _hidden(layout: Layout, dims: tuple[int, ...]) -> bool:
    return any(axes for d, axes in enumerate(layout.bound) if d not in dims)


def _ticks(axes: Any, split: Sequence[tuple[str, ...]], pieces: dict[Bounds, list[int]], dims: tuple[int, ...]) -> None:
    def edges(position: int) -> list[int]:
        found = {end for piece in pieces for end in piece[position]}
        return sorted(found) if len(found) <= 33 else [min(found), max(found)]

    def label(position: int) -> str:
        names = split[position]
        return f"dim {dims[position]}: " + (f"split by {', '.join(names)}" if names else "whole")

    axes.set_xticks(edges(len(dims) - 1) if dims else [])
    axes.set_yticks(edges(0) if len(dims) == 2 else [])
    crowded = len(dims) > 0 and len(edges(len(dims) - 1)) > 10
    axes.tick_params(labelsize=8, colors=EDGE, length=3)
    if crowded:
        axes.tick_params(axis="x", labelrotation=90)
    if dims:
        axes.set_xlabel(label(len(dims) - 1), color=INK)
    if len(dims) == 2:
        axes.set_ylabel(label(0), color=INK)
    for spine in axes.spines.values():
        spine.set_color(EDGE)


def _draw_grid(axes: Any, mesh: Mesh, bounds: dict[int, Bounds], dims: tuple[int, ...], colours: Colours) -> None:
    """Draws the device grid: the last axis to the right, the one before it down, all others as blocks."""
    from matplotlib.patches import Rectangle

    width = mesh.sizes[-1] if mesh.sizes else 1
    height = mesh.sizes[-2] if len(mesh.sizes) > 1 else 1
    blocks = math.prod(mesh.sizes[:-2])
    across = _blocks_across(blocks, width, height)
    gap = 0.0 if blocks == 1 else 0.45
    for position, rank in enumerate(mesh.ranks):
        block, row, column = position // (width * height), position // width % height, position % width
        x = column + (block % across) * (width + gap)
        y = row + (block // across) * (height + gap + 0.35 * (blocks > 1))
        piece = tuple(bounds[rank][d] for d in dims)
        axes.add_patch(Rectangle((x, y), 1, 1, facecolor=colours[piece], edgecolor="white", linewidth=2))
        _cell_text(axes, x, y, rank, bounds[rank], mesh.size)
        if row == 0 and column == 0 and blocks > 1:
            axes.text(x, y - 0.1, _block_name(mesh, rank), ha="left", va="bottom", color=INK, fontsize=10)
        if row == height - 1 and block // across == (blocks - 1) // across and width <= 16:
            axes.text(x + 0.5, y + 1.08, str(column), ha="center", va="top", color=EDGE, fontsize=8)
        if column == 0 and block % across == 0 and len(mesh.sizes) > 1 and height <= 16:
            axes.text(x - 0.08, y + 0.5, str(row), ha="right", va="center", color=EDGE, fontsize=8)
    down = -(-blocks // across)
    axes.set_xlim(-0.3, across * (width + gap) - gap + 0.05)
    axes.set_ylim(down * (height + gap + 0.35 * (blocks > 1)) - gap + 0.1, -0.4)
    axes.set_aspect("equal" if mesh.size <= 64 and len(mesh.sizes) > 1 else "auto")
    if len(mesh.sizes) == 1:
        axes.set_box_aspect(0.2)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel(mesh.axes[-1] if mesh.axes else "", color=INK, labelpad=8)
    axes.set_ylabel(mesh.axes[-2] if len(mesh.axes) > 1 else "", color=INK)
    axes.set_title(f"device grid  {mesh}", fontsize=11, color=INK, pad=10)


def _blocks_across(blocks: int, width: int, height: int) -> int:
    """Chooses the number of blocks per row. The whole is then about twice as wide as high."""
    return min(
        (n for n in range(1, blocks + 1) if blocks % n == 0),
        key=lambda n: (abs(math.log(n * width / (blocks // n * height) / 2)), -n),
    )


def _block_name(mesh: Mesh, rank: int) -> str:
    coordinates = mesh.coordinates(rank)
    return ", ".join(f"{axis} = {coordinates[axis]}" for axis in mesh.axes[:-2])


def _cell_text(axes: Any, x: float, y: float, rank: int, bounds: Bounds, count: int) -> None:
    if count > 512:
        return
    roomy = count <= TEXT_RANKS
    axes.text(
        x + 0.5,
        y + (0.36 if roomy else 0.5),
        f"rank {rank}" if roomy else str(rank),
        ha="center",
        va="center",
        color=INK,
        fontsize=10 if count <= 16 else 8 if roomy else 6,
        fontweight="bold" if roomy else "normal",
    )
    if roomy:
        text = "\n".join(f"{a}:{b}" for a, b in bounds)
        axes.text(x + 0.5, y + 0.68, text, ha="center", va="center", color=INK, fontsize=7 if count <= 16 else 5)
