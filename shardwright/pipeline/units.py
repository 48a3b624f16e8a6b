"""Units of work: the micro-batches that a batch is cut into, and the slices of the sequence that each of them is cut into.

A unit is a place on two axes in front of a stage's mesh, ``micro`` and ``slice``, whose places run one after the other. Unit
``u`` is slice ``u % slices`` of micro-batch ``u // slices``. Where a model joins samples and positions to one dim of *rows*, a
unit has some positions of every one of its samples, which are not next to each other in the rows of the whole batch: layouts
count such rows unit by unit, and what reads or makes rows of the whole batch goes through this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor

from shardwright.ir.graph import Node
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.ir.pieces import chunk_pieces

MICRO, SLICE = "micro", "slice"
UNITS = (MICRO, SLICE)
WORDS = {MICRO: "batch", SLICE: "sequence"}
NEVER_MEET = "micro-batches pass one after the other and never meet"
NEVER_MEET_SLICES = "slices of the sequence pass one after the other, and only causal attention reads earlier ones"


def unit_mesh(mesh: Mesh, micro: int, slices: int = 1) -> Mesh:
    """Returns the mesh with the axes of units in front.

    >>> unit_mesh(Mesh(("tp",), (2,)), 3)
    Mesh(axes=('micro', 'tp'), sizes=(3, 2), ranks=(0, 1, 2, 3, 4, 5))
    >>> unit_mesh(Mesh((), ()), 2, slices=3)
    Mesh(axes=('micro', 'slice'), sizes=(2, 3), ranks=(0, 1, 2, 3, 4, 5))
    """
    ranks = tuple(place * mesh.size + rank for place in range(micro * slices) for rank in mesh.ranks)
    axes, sizes = (UNITS, (micro, slices)) if slices > 1 else ((MICRO,), (micro,))
    return Mesh((*axes, *mesh.axes), (*sizes, *mesh.sizes), ranks)


def slice_sizes(length: int, slices: int) -> tuple[int, ...]:
    """Returns the sizes of the slices of a sequence, the longer ones first.

    >>> slice_sizes(7, 3)
    (3, 2, 2)
    """
    return tuple(length // slices + (at < length % slices) for at in range(slices))


def unit_axes(axes: Sequence[str]) -> tuple[str, ...]:
    """Returns those of some axes that are of units."""
    return tuple(axis for axis in axes if axis in UNITS)


def unit_dims(layout: Layout) -> dict[str, int]:
    """Returns the dims that units cut, by axis."""
    return {axis: dim for dim, axes in enumerate(layout.bound) for axis in unit_axes(axes)}


def unit_pieces(layout: Layout, dim: int, size: int) -> tuple[int, ...]:
    """Returns how many of a dim's entries each place on its unit axes has."""
    axes, found = layout.bound[dim], dict[tuple[int, ...], int]()
    places = product(*(range(layout.mesh.axis_size(axis)) for axis in axes))
    for place, piece in zip(places, layout.pieces(dim, size), strict=True):
        key = tuple(at for at, axis in zip(place, axes, strict=True) if axis in UNITS)
        found[key] = found.get(key, 0) + piece
    return tuple(found.values())


def pieces_at(layout: Layout, dim: int, size: int, place: Mapping[str, int]) -> tuple[int, ...]:
    """Returns the sizes of the pieces of a dim that one unit has.

    Args:
        layout: over units and ranks.
        dim, size: the dim.
        place: of the unit, by axis.
    """
    axes = layout.bound[dim]
    places = product(*(range(layout.mesh.axis_size(axis)) for axis in axes))
    return tuple(
        piece
        for own, piece in zip(places, layout.pieces(dim, size), strict=True)
        if all(place.get(axis, at) == at for axis, at in zip(axes, own, strict=True))
    )


def with_units(layout: Layout, cut: Layout, shape: Sequence[int]) -> Layout:
    """Returns a layout over ranks whose dims units cut first, as they do in another layout.

    Args:
        layout: on units and ranks, of which no unit axis splits a dim.
        cut: the other layout.
        shape: global shape.
    """
    dims, sizes = list(layout.bound), list(layout.sizes)
    for dim in set(unit_dims(cut).values()):
        ways = tuple(layout.mesh.axis_size(axis) for axis in dims[dim])
        sizes[dim] = tuple(
            p for piece in unit_pieces(cut, dim, shape[dim]) for p in (chunk_pieces(piece, ways) if ways else (piece,))
        )
        dims[dim] = (*unit_axes(cut.bound[dim]), *dims[dim])
    return Layout.of(layout.mesh, dims, layout.partial, sizes)


def start_slices(cut: Cut, value: str, shape: Sequence[int]) -> None:
    """Cuts a value into slices at the dim that is known to be its sequence.

    Args:
        cut: gets the layout.
        value, shape: the value.
    """
    mesh, dim = unit_mesh(Mesh((), ()), cut.micro, cut.slices), cut.starts[value]
    whole, known = Layout.replicated(mesh, len(shape)), cut.layouts.get(value)
    layout = whole if known is None else with_units(whole, known, shape)
    sizes = slice_sizes(shape[dim], cut.slices)
    sliced = Layout.of(
        mesh,
        [(SLICE,) if at == dim else () for at in range(len(shape))],
        (),
        [sizes if at == dim else None for at in range(len(shape))],
    )
    cut.layouts[value] = with_units(layout, sliced, shape).normal(shape)


@dataclass
class Cut:
    """Layouts that say where units cut the values of a graph, as far as it is known.

    Args:
        layouts: by value, the layout on units and ranks that has its pieces, of which only the unit axes count.
        micro, slices: numbers of micro-batches, and of slices of each.
        samples: by value whose sliced dim is one of rows, the number of samples that these are of.
        starts: the dims at which free values are cut along the sequence that nothing else says it of.
        ends: operators whose results carry the sequence, and that nothing follows it through.
    """

    layouts: dict[str, Layout] = field(default_factory=dict)
    micro: int = 1
    slices: int = 1
    samples: dict[str, int] = field(default_factory=dict)
    starts: dict[str, int] = field(default_factory=dict)
    ends: list[Node] = field(default_factory=list)

    @property
    def units(self) -> int:
        """The number of units."""
        return self.micro * self.slices

    def copy(self) -> Cut:
        """Returns a cut of its own that knows the same."""
        return Cut(dict(self.layouts), self.micro, self.slices, dict(self.samples), self.starts, self.ends)

    def dims(self, value: str) -> dict[str, int]:
        """Returns the dims of a value that units cut, by axis."""
        layout = self.layouts.get(value)
        return {} if layout is None else unit_dims(layout)

    def dim(self, value: str) -> int | None:
        """Returns the dim of a value that micro-batches cut."""
        return self.dims(value).get(MICRO)

    def sums(self, value: str) -> tuple[str, ...]:
        """Returns the axes of units over which a value is a sum."""
        layout = self.layouts.get(value)
        return () if layout is None else unit_axes(layout.partial_axes)

    # -- one unit -----------------------------------------------------------------------------------------------------

    def place(self, unit: int) -> dict[str, int]:
        """Returns the place of a unit, by axis."""
        return {MICRO: unit // self.slices, SLICE: unit % self.slices}

    def shape_of(self, value: str, shape: Sequence[int], unit: int) -> tuple[int, ...]:
        """Returns the shape that a unit has of a value.

        Args:
            value: the value.
            shape: that of the whole batch.
            unit: the number of the unit.
        """
        found = list(shape)
        for dim in set(self.dims(value).values()):
            found[dim] = sum(pieces_at(self.layouts[value], dim, shape[dim], self.place(unit)))
        return tuple(found)

    def piece_of(self, value: str, whole: Tensor, unit: int) -> Tensor:
        """Returns the part of a gradient of the whole batch that belongs to a unit.

        Args:
            value: the value that it is of.
            whole: the gradient.
            unit: the number of the unit.
        """
        dims, place = self.dims(value), self.place(unit)
        if any(place[axis] for axis in UNITS if axis not in dims and axis not in self.sums(value)):
            return torch.zeros_like(whole[tuple(slice(n) for n in self.shape_of(value, whole.shape, unit))])  # another has it
        for dim in sorted(set(dims.values())):
            if value in self.samples and dims.get(SLICE) == dim:
                samples, columns = self.grid(value, dim, whole.shape[dim])
                own = (_range(samples, place[MICRO]), _range(columns, place[SLICE]))
                whole = rows_of_unit(whole, dim, self.samples[value], *own)
            else:
                axis = next(axis for axis, own in dims.items() if own == dim)
                whole = whole.narrow(dim, *_range(unit_pieces(self.layouts[value], dim, whole.shape[dim]), place[axis]))
        return whole

    def joined(self, value: str, each: Sequence[Tensor]) -> Tensor:
        """Joins what units have of a value to that of the whole batch."""
        dims, sums = self.dims(value), self.sums(value)
        micro = []
        for at in range(0, len(each), self.slices):
            parts, dim = each[at : at + self.slices], dims.get(SLICE)
            if dim is not None and value in self.samples:
                samples, columns = self.grid(value, dim, sum(piece.shape[dim] for piece in each))
                own = samples[at // self.slices]
                found = [part.unflatten(dim, (own, size)) for part, size in zip(parts, columns, strict=True)]
                micro.append(torch.cat(found, dim + 1).flatten(dim, dim + 1))
            else:
                micro.append(_joined(parts, dim, SLICE in sums))
        return _joined(micro, dims.get(MICRO), MICRO in sums)

    def grid(self, value: str, dim: int, size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the samples of each micro-batch, and how many rows each slice has of every sample.

        Args:
            value: one with rows.
            dim, size: that of the rows.
        """
        return grid_of_rows(unit_pieces(self.layouts[value], dim, size), self.slices, self.samples[value])


def grid_of_rows(pieces: Sequence[int], slices: int, samples: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the samples of each micro-batch, and how many rows each slice has of every sample.

    Args:
        pieces: the rows of every unit.
        slices: their number.
        samples: their number, of the whole batch.

    >>> grid_of_rows((6, 3, 2, 1), 2, 4)
    ((3, 1), (2, 1))
    """
    each = sum(pieces) // samples if samples else 0  # rows of a sample
    own = [sum(pieces[at : at + slices]) // each if each else 0 for at in range(0, len(pieces), slices)]
    first = next((at for at, count in enumerate(own) if count), None)
    columns = [0] * slices if first is None else [pieces[first * slices + at] // own[first] for at in range(slices)]
    return tuple(own), tuple(columns)


def rows_of_unit(whole: Tensor, dim: int, samples: int, own: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """Returns a unit's rows: of its samples those of its positions.

    Args:
        whole: rows of the whole batch.
        dim: the dim of rows.
        samples: number of samples in the batch.
        own: the first of the unit's samples, and their number.
        columns: the first row that it has of every sample, and their number.

    >>> rows_of_unit(torch.arange(6), 0, 2, (0, 2), (1, 2))
    tensor([1, 2, 4, 5])
    """
    grid = whole.unflatten(dim, (samples, whole.shape[dim] // max(samples, 1)))
    return grid.narrow(dim, *own).narrow(dim + 1, *columns).flatten(dim, dim + 1)


def _range(pieces: Sequence[int], at: int) -> tuple[int, int]:
    return sum(pieces[:at]), pieces[at]


def _joined(parts: Sequence[Tensor], dim: int | None, is_sum: bool) -> Tensor:
    if dim is not None:
        return torch.cat(list(parts), dim)
    total = parts[0].clone()
    for other in parts[1:] if is_sum else ():
        total += other
    return total
