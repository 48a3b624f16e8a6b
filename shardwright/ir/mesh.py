"""Mesh: named axes with sizes over a list of ranks."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from shardwright.errors import ArgumentTypeError, LayoutError


class AxisWords(NamedTuple):
    """Words for the checks' errors: what the caller calls sizes, names, one name, ranks, and the whole."""

    sizes: str
    names: str
    name: str
    ranks: str
    whole: str


_WORDS = AxisWords("Mesh sizes", "Mesh axes", "axis name", "Mesh ranks", "the mesh")
_MOST = 1 << 24  # most ranks of a mesh, because lists of all ranks are made


def check_axes(sizes: object, names: object, words: AxisWords) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Checks sizes and names of axes, and returns them.

    Raises:
        ArgumentTypeError: sizes or names of the wrong type.
        LayoutError: lengths that differ, sizes below 1, names that repeat or are no words, or too many ranks.
    """
    if not isinstance(sizes, tuple):
        raise ArgumentTypeError(f"{words.sizes} must be a tuple of ints, got {sizes!r}: write (2, 4)")
    if not isinstance(names, tuple):
        raise ArgumentTypeError(f"{words.names} must be a tuple of str, got {names!r}: write ('dp', 'mp')")
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool):
            raise ArgumentTypeError(f"{words.sizes} {sizes} holds {size!r}, a {type(size).__name__}, not an int")
        if size < 1:
            raise LayoutError(f"{words.sizes} {sizes} holds {size}; every axis needs at least one rank")
    if math.prod(sizes) > _MOST:
        raise LayoutError(f"{words.sizes} {sizes} are {math.prod(sizes)} ranks, more than the {_MOST} that can be planned for")
    for name in names:
        if not isinstance(name, str):
            raise ArgumentTypeError(f"{words.names} {names} holds {name!r}, a {type(name).__name__}, not a str")
        if name == "None" or not _NAME.fullmatch(name):
            raise LayoutError(f"{words.name} {name!r} is not usable: an {words.name} is a word of its own and not 'None'")
    if len(sizes) != len(names):
        raise LayoutError(
            f"{words.sizes} {sizes} has {len(sizes)} axes, {words.names} {names} names {len(names)}: give one {words.name} "
            "an axis"
        )
    if len(set(names)) != len(names):
        raise LayoutError(f"{words.names} {names} repeats an {words.name}: every axis needs a name of its own")
    return sizes, names


_NAME = re.compile(r"[A-Za-z_][\w.]*")


def check_ranks(ranks: object, count: int, words: AxisWords) -> None:
    """Checks that there are as many different ranks as the axes have places.

    Raises:
        ArgumentTypeError: ranks of the wrong type.
        LayoutError: ranks that repeat, are negative, or are too many or too few.
    """
    if not isinstance(ranks, (list, tuple)):
        raise ArgumentTypeError(f"{words.ranks} must be a list of ints, got {ranks!r}")
    if any(not isinstance(r, int) or isinstance(r, bool) for r in ranks):
        raise ArgumentTypeError(f"{words.ranks} {ranks} holds something that is not an int")
    if len(ranks) != count:
        raise LayoutError(f"{words.ranks} has {len(ranks)} ranks, {words.whole} {count}: list every rank once")
    if len(set(ranks)) != len(ranks) or min(ranks, default=0) < 0:
        raise LayoutError(f"{words.ranks} {ranks} repeats a rank or holds a negative one: list every rank once")


@dataclass(frozen=True)
class Mesh:
    """Named axes over a list of ranks; the last axis varies fastest.

    Args:
        axes: axis names, most significant first.
        sizes: number of ranks along each axis.
        ranks: global rank at each position, row-major; ``None`` means ``0..n-1``.

    Raises:
        LayoutError: names that repeat or are no words, sizes below 1, ranks that do not fit or repeat; an
            :class:`ArgumentTypeError` where something is of the wrong type.

    >>> mesh = Mesh(("dp", "mp"), (2, 2))
    >>> mesh.coordinates(2)
    {'dp': 1, 'mp': 0}
    >>> mesh.groups(("mp",))
    [[0, 1], [2, 3]]
    """

    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_axes(self.sizes, self.axes, _WORDS)
        count = math.prod(self.sizes)
        if self.ranks is None or self.ranks == ():
            object.__setattr__(self, "ranks", tuple(range(count)))
        else:
            check_ranks(self.ranks, count, _WORDS)
            object.__setattr__(self, "ranks", tuple(self.ranks))
        object.__setattr__(self, "_hash", hash((self.axes, self.sizes, self.ranks)))
        object.__setattr__(self, "_size_of", dict(zip(self.axes, self.sizes, strict=True)))
        object.__setattr__(self, "_order", {a: i for i, a in enumerate(self.axes)})

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined,no-any-return]

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    def axis_size(self, axis: str) -> int:
        """Returns the number of ranks along an axis."""
        return self._size_of[axis]  # type: ignore[attr-defined,no-any-return]

    def count(self, axes: Iterable[str]) -> int:
        """Returns the number of ranks spanned by ``axes``: the product of their sizes."""
        return math.prod(self.axis_size(a) for a in axes)

    def ordered(self, axes: Iterable[str]) -> tuple[str, ...]:
        """Returns the same axes in the mesh's order, most significant first."""
        return tuple(sorted(axes, key=self._order.__getitem__))  # type: ignore[attr-defined]

    def coordinates(self, rank: int) -> dict[str, int]:
        """Returns the rank's index along every axis."""
        return dict(zip(self.axes, _coordinate_table(self)[_positions(self)[rank]], strict=True))

    def groups(self, axes: Sequence[str]) -> list[list[int]]:
        """Returns the groups of ranks that differ only along ``axes``.

        Each is in the order of ``axes``, the first most significant.
        """
        return [list(g) for g in _groups(self, tuple(axes))]

    def group_of(self, rank: int, axes: Sequence[str]) -> list[int]:
        """Returns the group over ``axes`` that holds ``rank``."""
        return list(_group_index(self, tuple(axes))[rank])

    def __str__(self) -> str:
        text = ",".join(f"{a}={s}" for a, s in zip(self.axes, self.sizes, strict=True))
        if self.ranks != tuple(range(self.size)):
            text += " ranks=" + ",".join(map(str, self.ranks))
        return text

    @staticmethod
    def parse(text: str) -> Mesh:
        """Parses the text form of a mesh; the inverse of ``str(mesh)``.

        Raises:
            LayoutError: the text cannot be read.

        >>> Mesh.parse("dp=2,mp=4").sizes
        (2, 4)
        """
        axes_text, _, ranks_text = text.partition(" ranks=")
        try:
            pairs = [part.strip().split("=") for part in axes_text.split(",") if axes_text.strip()]
            axes, sizes = tuple(a for a, _ in pairs), tuple(int(s) for _, s in pairs)
            ranks = tuple(int(r) for r in ranks_text.split(",")) if ranks_text else ()
        except ValueError as error:
            raise LayoutError(f"cannot read the mesh {text.strip()!r}: write 'dp=2,mp=4'") from error
        return Mesh(axes, sizes, ranks)


@cache
def _coordinate_table(mesh: Mesh) -> list[tuple[int, ...]]:
    table = []
    for position in range(mesh.size):
        coords, rest = [], position
        for size in reversed(mesh.sizes):
            coords.append(rest % size)
            rest //= size
        table.append(tuple(reversed(coords)))
    return table


@cache
def _positions(mesh: Mesh) -> dict[int, int]:
    return {rank: position for position, rank in enumerate(mesh.ranks)}


@cache
def _groups(mesh: Mesh, axes: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    index = [mesh.axes.index(a) for a in axes]
    groups: dict[tuple[int, ...], list[tuple[tuple[int, ...], int]]] = {}
    for coords, rank in zip(_coordinate_table(mesh), mesh.ranks, strict=True):
        rest = tuple(c for i, c in enumerate(coords) if i not in index)
        groups.setdefault(rest, []).append((tuple(coords[i] for i in index), rank))
    return tuple(tuple(rank for _, rank in sorted(members)) for members in groups.values())


@cache
def _group_index(mesh: Mesh, axes: tuple[str, ...]) -> dict[int, tuple[int, ...]]:
    return {rank: group for group in _groups(mesh, axes) for rank in group}
