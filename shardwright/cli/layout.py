"""``shardwright layout``: prints and draws the slice of a tensor that each rank holds, for any layout."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from shardwright.cli.options import _ints, _names, _printed, _UsageError
from shardwright.errors import LayoutError, ShardwrightError
from shardwright.ir.layout import Layout

LAYOUT_HELP = """\
Print which slice of a tensor every rank holds under a layout, and draw it.

A layout has one entry per dim, separated by commas: the alias of an axis, None, several aliases in parentheses that
split the dim jointly (the leftmost axis of the device matrix is the most significant), or an order of your own such
as sp>dp. Piece sizes may follow in brackets: "dp[20 12],None". Quote a layout, so that the shell leaves it alone."""
LAYOUT_EXAMPLES = """\
examples:
  shardwright layout --devices 2,2,2 --axes dp,sp,mp --shape 32,784 "mp,(sp,dp)"
  shardwright layout --devices 2,2,2 --axes dp,sp,mp --shape 32,784 "mp,(sp,dp)" --shape 784,512 "(sp,dp),None"
  shardwright layout --devices 8 --axes tp --shape 512,512 "tp,None" --draw weight.png"""


def add_parser(commands: Any) -> None:
    """Adds the command and its arguments to the command line's commands."""
    parser = commands.add_parser(
        "layout",
        help="print and draw which slice of a tensor every rank holds",
        description=LAYOUT_HELP,
        epilog=LAYOUT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.mixed = True
    parser.set_defaults(command=_layout, name="layout")
    parser.add_argument("--devices", required=True, type=_ints, metavar="2,2,2", help="device matrix: ranks along each axis")
    parser.add_argument("--axes", required=True, type=_names, metavar="dp,sp,mp", help="alias of each axis")
    parser.add_argument("--ranks", type=_ints, metavar="0,2,1,...", help="rank at each position, row-major; default 0,1,...")
    parser.add_argument(
        "--shape",
        required=True,
        type=_ints,
        action="append",
        metavar="32,784",
        help="global shape of the tensor; one for all layouts, or one for each in their order",
    )
    parser.add_argument("--draw", metavar="FILE", help="draw the tensor and the device grid to a .png or .svg file")
    parser.add_argument("layouts", nargs="+", metavar="LAYOUT", help='one entry per dim: "mp,(sp,dp)"')


def _layout(arguments: argparse.Namespace) -> int:
    tensors = _tensors(arguments)
    print(_layout_table(tensors))
    if arguments.draw is not None:
        from shardwright.report.draw import draw_layouts

        try:
            draw_layouts(tensors, arguments.draw)
        except (ShardwrightError, ImportError, OSError) as error:
            raise _UsageError(f"--draw {arguments.draw}: {error}") from None
        print(f"\ndrawn to {arguments.draw}")
    return 0


def _tensors(arguments: argparse.Namespace) -> list[tuple[Layout, tuple[int, ...]]]:
    """Reads the layouts with their shapes, and checks them."""
    texts, shapes = arguments.layouts, arguments.shape
    if len(shapes) not in (1, len(texts)):
        raise _UsageError(f"{len(texts)} layouts and {len(shapes)} shapes: give one --shape for all, or one a layout")
    if any(size < 0 for shape in shapes for size in shape):
        raise _UsageError("--shape holds a negative size")
    shapes = shapes * len(texts) if len(shapes) == 1 else shapes
    try:
        base = Layout(arguments.devices, arguments.axes, arguments.ranks)
    except ShardwrightError as error:
        raise _UsageError(str(error)) from None
    return [(_one_layout(base, text, shape), shape) for text, shape in zip(texts, shapes, strict=True)]


def _one_layout(base: Layout, text: str, shape: tuple[int, ...]) -> Layout:
    try:
        if "@" in text:
            raise LayoutError("the mesh is given by --devices and --axes; leave out '@ ...'")
        layout = Layout.parse(f"{text} @ {base.mesh}") if text.strip() else base()
        layout.slices(shape)
    except ShardwrightError as error:
        raise _UsageError(f"layout {text!r}: {error}") from None
    return layout


def _layout_table(tensors: Sequence[tuple[Layout, tuple[int, ...]]]) -> str:
    from rich.table import Table  # here: importing it draws from Python's random generator

    mesh = tensors[0][0].mesh
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column(f"({', '.join(mesh.axes)})", no_wrap=True)
    for layout, _ in tensors:
        table.add_column(f"slice of {layout.short() or 'the scalar'}", no_wrap=True)
        table.add_column("local shape", no_wrap=True)
    slices = [layout.slices(shape) for layout, shape in tensors]
    for rank in sorted(mesh.ranks):
        row = [str(rank), f"({', '.join(map(str, mesh.coordinates(rank).values()))})"]
        for (layout, shape), held in zip(tensors, slices, strict=True):
            row += [_slice_text(held[rank]), str(list(layout.local_shape(shape, rank)))]
        table.add_row(*row)
    return _printed(*(f"{layout} of {list(shape)}" for layout, shape in tensors), "", table)


def _slice_text(slices: Sequence[slice]) -> str:
    return "[" + ", ".join(f"{s.start}:{s.stop}" for s in slices) + "]"
