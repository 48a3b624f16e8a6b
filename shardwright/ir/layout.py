"""Layout: the placement of a tensor, that is, which rank holds which piece.

It has, for each dim of the tensor, the ordered axes that split it, and the axes on which ranks hold partial values. Every other
axis of the mesh replicates.

Invariants:

- The axes of a dim are an ordered list, the first the most significant. A dim is split by its first axis as
  ``torch.chunk`` would, each piece by the next axis, and so on: so that gathering the last axis of a dim always gives
  the layout without it, and so that the pieces are those of ``torch.distributed.tensor``.
- A dim may carry explicit piece sizes instead (zero allowed), one per piece, in that order.
- An axis appears at most once in a layout.
- The virtual axis moves nothing: it is no axis of the mesh, and every device holds all copies. ``interleaved`` says how many
  there are and which dim they cut.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from shardwright.errors import LayoutError
from shardwright.ir.layout_entries import (
    INTERLEAVED,
    DimSpec,
    Sizes,
    axes_of_entry,
    call_text,
    check_device_matrix,
    parse_entries,
    parse_reductions,
)
from shardwright.ir.mesh import Mesh
from shardwright.ir.pieces import chunk_pieces

Dims = tuple[tuple[str, ...], ...]


class Layout:
    """Placement of a tensor over a device matrix with named axes.

    It is made in two steps, first from a device matrix, then from one entry per dim:

    Args:
        device_matrix: ranks along each axis, e.g. ``(2, 2, 2)``; the last axis varies fastest.
        alias_name: one name per axis, e.g. ``("dp", "sp", "mp")``.
        rank_list: the rank at each position of the device matrix, row-major; default ``0..n-1``.

    Calling it with one entry per dim gives the layout of a tensor. An entry is an alias, ``"None"``, a tuple of aliases
    that split the dim jointly (the leftmost axis of the device matrix is the most significant, in whatever order the
    tuple lists them), or an explicit order such as ``"sp>dp"``.

    The last alias may be ``"interleaved_parallel"``, a virtual axis whose size is no number of devices: the dim that it splits
    is cut, on each device, into that many copies. It takes no part in the placement.

    Raises:
        TypeError: a device matrix, alias or rank list of the wrong type.
        LayoutError: lengths that differ, an unknown or repeated alias, a virtual axis that is not the last.

    >>> layout = Layout((2, 2, 2), ("dp", "sp", "mp"))
    >>> x = layout("mp", ("sp", "dp"))
    >>> x.slices((32, 784))[2]
    (slice(0, 16, None), slice(196, 392, None))
    >>> x.local_shape((32, 784), rank=2)
    (16, 196)
    >>> Layout.parse(str(x)) == x
    True
    """

    __slots__ = ("_hash", "dims", "interleaved", "mesh", "partial", "sizes")

    mesh: Mesh
    dims: Dims | None
    partial: tuple[tuple[str, str], ...]
    sizes: Sizes
    interleaved: tuple[int, int | None] | None  # copies on each device, and the dim they cut; None where there are none

    def __init__(self, device_matrix: Sequence[int], alias_name: Sequence[str], rank_list: Sequence[int] | None = None) -> None:
        check_device_matrix(device_matrix, alias_name, rank_list)
        real = len(alias_name) - (INTERLEAVED in alias_name)
        mesh = Mesh(tuple(alias_name[:real]), tuple(device_matrix[:real]), tuple(rank_list or ()))
        self._set(mesh, None, (), (), (device_matrix[real], None) if real < len(alias_name) else None)

    def _set(
        self,
        mesh: Mesh,
        dims: Dims | None,
        partial: tuple[tuple[str, str], ...],
        sizes: Sizes,
        interleaved: tuple[int, int | None] | None = None,
    ) -> None:
        self.mesh, self.dims, self.partial, self.sizes, self.interleaved = mesh, dims, partial, sizes, interleaved
        self._hash = hash((mesh, dims, partial, sizes))

    @staticmethod
    def of(
        mesh: Mesh,
        dims: Sequence[Sequence[str]],
        partial: Sequence[tuple[str, str]] = (),
        sizes: Sequence[tuple[int, ...] | None] | None = None,
    ) -> Layout:
        """Builds the layout with these ordered axes per dim.

        Args:
            mesh: the mesh that the axes belong to.
            dims: for every dim, the axes that split it, the most significant first.
            partial: ``(axis, "sum" | "max" | "min")`` for every axis with a pending reduction.
            sizes: for every dim, explicit piece sizes or None.
        """
        layout = object.__new__(Layout)
        if len(partial) > 1:
            partial = sorted(partial, key=lambda p: mesh.axes.index(p[0]))
        layout._set(
            mesh,
            tuple(map(tuple, dims)),
            tuple(partial),
            tuple(sizes) if sizes is not None else (None,) * len(dims),
        )
        return layout

    @staticmethod
    def replicated(mesh: Mesh, ndim: int) -> Layout:
        """Returns the layout in which every rank holds the whole tensor."""
        return Layout.of(mesh, ((),) * ndim)

    def __call__(self, *entries: DimSpec) -> Layout:
        """Returns the layout of a tensor with one entry per dim; see the class."""
        dims = [axes_of_entry(entry, position, self.aliases) for position, entry in enumerate(entries)]
        seen: dict[str, int] = {}
        for position, axes in enumerate(dims):
            for axis in axes:
                if axis in seen:
                    raise LayoutError(
                        f"layout{call_text(entries)}: alias {axis!r} is used for dim {seen[axis]} and again for dim "
                        f"{position}; an axis can split one dim only: use 'None' or another alias for one of them"
                    )
                seen[axis] = position
        if INTERLEAVED not in seen:
            return Layout.of(self.mesh, dims)
        assert self.interleaved is not None
        real = tuple(tuple(a for a in axes if a != INTERLEAVED) for axes in dims)
        layout = Layout.of(self.mesh, real)
        layout._set(self.mesh, real, (), layout.sizes, (self.interleaved[0], seen[INTERLEAVED]))
        return layout

    # -- placement ----------------------------------------------------------------------------------------------

    @property
    def bound(self) -> tuple[tuple[str, ...], ...]:
        """The axes of every dim. Raises for a layout that has no dims yet."""
        if self.dims is None:
            raise LayoutError(f"this Layout ({self.mesh}) has no dims yet: call it with one entry a dim, layout('dp', 'None')")
        return self.dims

    @property
    def ndim(self) -> int:
        return len(self.bound)

    @property
    def aliases(self) -> tuple[str, ...]:
        """The axes of the mesh, and the virtual one where there is one."""
        return self.mesh.axes if self.interleaved is None else (*self.mesh.axes, INTERLEAVED)

    @property
    def copies(self) -> int:
        """The number of copies each device cuts its piece into; 1 without a virtual axis.

        >>> layout = Layout((2, 4, 2), ("dp", "mp", "interleaved_parallel"))
        >>> layout(("dp", "interleaved_parallel"), "mp").copies, layout("dp", "mp").copies, layout.mesh.size
        (2, 1, 8)
        """
        return self.interleaved[0] if self.interleaved is not None and self.interleaved[1] is not None else 1

    @property
    def split_axes(self) -> tuple[str, ...]:
        """Every axis that splits a dim, in order of dims."""
        return tuple(a for axes in self.bound for a in axes)

    @property
    def partial_axes(self) -> tuple[str, ...]:
        return tuple(a for a, _ in self.partial)

    @property
    def is_replicated(self) -> bool:
        return not self.partial and not any(self.bound)

    def pieces(self, dim: int, size: int) -> tuple[int, ...]:
        """Computes the sizes of the pieces of ``dim``, the most significant first. ``size`` is its global size.

        Raises:
            LayoutError: explicit piece sizes that do not fit.
        """
        axes = self.bound[dim]
        explicit = self.sizes[dim]
        if explicit is not None:
            if len(explicit) != self.mesh.count(axes) or min(explicit) < 0:
                raise LayoutError(
                    f"piece sizes {explicit} of dim {dim}: give {self.mesh.count(axes)} piece sizes, none negative"
                )
            if sum(explicit) != size:
                raise LayoutError(f"piece sizes {explicit} add up to {sum(explicit)}, but dim {dim} has size {size}")
            return explicit
        return chunk_pieces(size, tuple(self.mesh.axis_size(a) for a in axes))

    def slices(self, shape: Sequence[int]) -> dict[int, tuple[slice, ...]]:
        """Returns the slice of each dim of a tensor of global ``shape``, for every rank."""
        return {rank: tuple(slice(a, b) for a, b in bounds) for rank, bounds in _bounds(self, tuple(shape)).items()}

    def bounds(self, shape: Sequence[int]) -> dict[int, tuple[tuple[int, int], ...]]:
        """Returns ``(start, stop)`` of each dim for every rank: the cached form of :meth:`slices`. Not to be changed."""
        return _bounds(self, tuple(shape))

    def local_shape(self, shape: Sequence[int], rank: int) -> tuple[int, ...]:
        """Returns the shape of the piece that ``rank`` holds of a tensor of global ``shape``.

        Raises:
            LayoutError: the rank is not one of the layout, or the shape does not fit it.
        """
        bounds = _bounds(self, tuple(shape))
        if rank not in bounds:
            raise LayoutError(f"rank {rank} is not in this layout's ranks {sorted(bounds)}")
        return tuple(b - a for a, b in bounds[rank])

    def to_dict(self) -> dict[str, object]:
        """Returns the layout as plain data. ``tensor_map`` counts the axes that split each dim from the right, -1 for none.

        ``interleaved_parallel`` says whether the last axis is the virtual one.

        >>> Layout((2, 4), ("dp", "mp"))("dp", "None").to_dict()["tensor_map"]
        (1, -1)
        """
        position = {a: len(self.aliases) - 1 - i for i, a in enumerate(self.aliases)}
        maps = [tuple(position[a] for a in self._axes_and_copies(dim)) for dim in range(self.ndim)]
        return {
            "device_matrix": (*self.mesh.sizes, *(self.interleaved[:1] if self.interleaved else ())),
            "tensor_map": tuple(-1 if not m else m[0] if len(m) == 1 else m for m in maps),
            "interleaved_parallel": self.interleaved is not None,
            "alias_name": self.aliases,
            "rank_list": list(self.mesh.ranks),
        }

    # -- variations ---------------------------------------------------------------------------------------------

    def without_partial(self) -> Layout:
        """Returns the same pieces with no reduction pending."""
        return self if not self.partial else Layout.of(self.mesh, self.bound, (), self.sizes)

    def with_partial(self, axes: Sequence[str], op: str = "sum") -> Layout:
        """Returns the same pieces, partial over ``axes`` too."""
        have = dict(self.partial)
        have.update({a: op for a in axes})
        return Layout.of(self.mesh, self.bound, tuple(have.items()), self.sizes)

    def normal(self, shape: Sequence[int]) -> Layout:
        """Returns the same placement with redundant notation dropped: explicit sizes equal to the chunks, axes of size 1."""
        return _normal(self, tuple(shape))

    # -- identity and text --------------------------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Layout):
            return NotImplemented
        return self is other or (
            self._hash == other._hash
            and self.dims == other.dims
            and self.partial == other.partial
            and self.sizes == other.sizes
            and self.mesh == other.mesh
            and self.interleaved == other.interleaved
        )

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"Layout({str(self)!r})"

    def __str__(self) -> str:
        """Returns ``mp,(dp,sp) @ dp=2,sp=2,mp=2``: entries per dim, pending reductions, then the mesh. Parses back."""
        axes, found, ranks = str(self.mesh).partition(" ranks=")
        if self.interleaved is not None:
            axes = f"{axes}{',' if axes else ''}{INTERLEAVED}={self.interleaved[0]}"
        return f"{self.short() if self.dims is not None else ''} @ {axes}{found}{ranks}".lstrip()

    def short(self) -> str:
        """Returns the text form without the mesh: ``mp,(dp,sp)``, ``None,tp +sum(dp)``."""
        text = ",".join(self._entry_text(i) for i in range(self.ndim)) or "()"
        for op in ("sum", "max", "min"):
            axes = [a for a, o in self.partial if o == op]
            if axes:
                text += f" +{op}({','.join(axes)})"
        return text

    def _entry_text(self, dim: int) -> str:
        axes = self._axes_and_copies(dim)
        if not axes:
            text = "None"
        elif len(axes) == 1:
            text = axes[0]
        elif axes == tuple(sorted(axes, key=self.aliases.index)):
            text = f"({','.join(axes)})"
        else:
            text = ">".join(axes)
        explicit = self.sizes[dim]
        return text if explicit is None else f"{text}[{' '.join(map(str, explicit))}]"

    def _axes_and_copies(self, dim: int) -> tuple[str, ...]:
        """Returns the axes of a dim, with the virtual one where it cuts this dim."""
        return (*self.bound[dim], INTERLEAVED) if self.interleaved and self.interleaved[1] == dim else self.bound[dim]

    @staticmethod
    def parse(text: str, mesh: Mesh | None = None) -> Layout:
        """Parses the text form of a layout; the inverse of ``str(layout)``.

        Args:
            text: ``mp,(dp,sp) @ dp=2,sp=2,mp=2``.
            mesh: the mesh of a text that names none, such as ``layout.short()``.

        Raises:
            LayoutError: the text cannot be read, or has no mesh.
        """
        dims_text, found, mesh_text = text.partition("@")
        virtual = re.search(rf",?\s*{INTERLEAVED}=(\d+)", mesh_text)
        if virtual:
            mesh_text = mesh_text.replace(virtual[0], "", 1)
        if found:
            mesh = Mesh.parse(mesh_text)
        elif mesh is None:
            raise LayoutError(f"{text!r} has no mesh: write 'dp,None @ dp=2,mp=4'")
        sizes, axes = (int(virtual[1]),) if virtual else (), (INTERLEAVED,) if virtual else ()
        base = Layout((*mesh.sizes, *sizes), (*mesh.axes, *axes), list(mesh.ranks))
        dims_text, *reductions = dims_text.split("+")
        if not dims_text.strip():
            return base
        entries, piece_sizes = parse_entries(dims_text)
        partial = parse_reductions(reductions)
        bound = base(*entries)
        for axis, _ in partial:
            if axis not in base.mesh.axes or axis in bound.split_axes:
                raise LayoutError(f"{axis!r} cannot be partial: it must be an alias of the layout that splits no dim")
        layout = Layout.of(base.mesh, bound.bound, partial, piece_sizes)
        if bound.interleaved is not None:
            layout._set(base.mesh, layout.dims, layout.partial, layout.sizes, bound.interleaved)
        return layout


@lru_cache(maxsize=65536)
def _bounds(layout: Layout, shape: tuple[int, ...]) -> dict[int, tuple[tuple[int, int], ...]]:
    mesh, dims = layout.mesh, layout.bound
    if len(shape) != len(dims):
        raise LayoutError(
            f"layout {layout.short()} has {len(dims)} dims, the shape {tuple(shape)} has {len(shape)}: give one entry a dim"
        )
    starts: list[list[tuple[int, int]]] = []
    for dim, size in enumerate(shape):
        ends, at = [], 0
        for piece in layout.pieces(dim, size):
            ends.append((at, at + piece))
            at += piece
        starts.append(ends)
    result = {}
    for rank in mesh.ranks:
        coords = mesh.coordinates(rank)
        bounds = []
        for dim, axes in enumerate(dims):
            index = 0
            for axis in axes:
                index = index * mesh.axis_size(axis) + coords[axis]
            bounds.append(starts[dim][index])
        result[rank] = tuple(bounds)
    return result


@lru_cache(maxsize=65536)
def _normal(layout: Layout, shape: tuple[int, ...]) -> Layout:
    mesh = layout.mesh
    dims = tuple(tuple(a for a in axes if mesh.axis_size(a) > 1) for axes in layout.bound)
    sizes = []
    for dim, axes in enumerate(dims):
        explicit = layout.sizes[dim]
        if explicit == chunk_pieces(shape[dim], tuple(mesh.axis_size(a) for a in axes)):
            explicit = None
        sizes.append(explicit)
    partial = tuple(p for p in layout.partial if mesh.axis_size(p[0]) > 1)
    if dims == layout.dims and tuple(sizes) == layout.sizes and partial == layout.partial:
        return layout
    return Layout.of(mesh, dims, partial, sizes)
