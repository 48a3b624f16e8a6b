"""Finds one mesh on which every strategy over the same ranks can be named.

A device matrix over ranks in row-major order cuts them at the products of its trailing sizes. Matrices whose cuts
divide each other share one mesh, refined to all of these cuts: (2, 4) and (4, 2) are both named on 2 * 2 * 2. Matrices
that do not (2 * 3 against 3 * 2) get meshes of their own, and an exact exchange where they meet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh


@dataclass
class _Family:
    """Device matrices over one rank order whose cuts divide each other."""

    ranks: tuple[int, ...]
    cuts: set[int]
    names: dict[tuple[int, int], str] = field(default_factory=dict)

    def accepts(self, cuts: set[int]) -> bool:
        chain = sorted(self.cuts | cuts)
        return all(b % a == 0 for a, b in pairwise(chain))

    def mesh(self) -> Mesh:
        chain = sorted(self.cuts, reverse=True)
        sizes, names, used = [], [], set(self.names.values())
        for high, low in pairwise(chain):
            sizes.append(high // low)
            name = self.names.get((high, low)) or self._part_name(high, low, used)
            used.add(name)
            names.append(name)
        return Mesh(tuple(names), tuple(sizes), self.ranks)

    def _part_name(self, high: int, low: int, used: set[str]) -> str:
        for (outer_high, outer_low), name in self.names.items():
            if outer_high >= high and low >= outer_low:
                return _free(f"{name}.", used)
        return _free("d", used)


def _free(stem: str, used: set[str]) -> str:
    return next(f"{stem}{i}" for i in range(len(used) + 1) if f"{stem}{i}" not in used)


@dataclass
class Refinement:
    """Meshes that name a set of device matrices. ``meshes[0]`` is the main one."""

    size: int
    families: list[_Family] = field(default_factory=list)
    meshes: list[Mesh] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.families.append(_Family(tuple(range(self.size)), {1, self.size}))

    def add(self, sizes: Sequence[int], names: Sequence[str] = (), ranks: tuple[int, ...] | None = None) -> None:
        """Adds the cuts of a device matrix, with axis names if it has any."""
        ranks = ranks or tuple(range(self.size))
        cuts = _cuts(sizes)
        family = next((f for f in self.families if f.ranks == ranks and f.accepts(cuts)), None)
        if family is None:
            family = _Family(ranks, {1, self.size})
            self.families.append(family)
        family.cuts |= cuts
        for i, name in enumerate(names):
            span = (math.prod(sizes[i:]), math.prod(sizes[i + 1 :]))
            if name not in family.names.values():
                family.names.setdefault(span, name)

    def add_if_fits(self, sizes: Sequence[int]) -> None:
        """Adds the cuts of a device matrix to the main mesh, if they fit those there."""
        if self.families[0].accepts(_cuts(sizes)):
            self.families[0].cuts |= _cuts(sizes)

    def finish(self) -> Refinement:
        """Fixes the meshes; nothing can be added after."""
        first, *rest = self.families
        if not (first.cuts - {1, self.size} or first.names) and rest and self.size > 1:
            self.families = [*rest, first] if rest[0].ranks == first.ranks else self.families
        self.meshes = [f.mesh() for f in self.families]
        return self

    def axes_of(self, sizes: Sequence[int], ranks: tuple[int, ...] | None = None) -> tuple[Mesh, list[tuple[str, ...]]]:
        """Returns the mesh that names a device matrix, and the mesh axes of each of its axes."""
        ranks = ranks or tuple(range(self.size))
        cuts = _cuts(sizes)
        for family, mesh in zip(self.families, self.meshes, strict=True):
            if family.ranks == ranks and cuts <= family.cuts:
                chain = sorted(family.cuts, reverse=True)
                spans = dict(zip(pairwise(chain), mesh.axes, strict=True))
                result = []
                for i in range(len(sizes)):
                    high, low = math.prod(sizes[i:]), math.prod(sizes[i + 1 :])
                    result.append(tuple(n for (a, b), n in spans.items() if high >= a and b >= low))
                return mesh, result
        raise AssertionError(f"{sizes} was not added before")

    def refined(self, layout: Layout, shape: Sequence[int]) -> Layout:
        """Returns the same placement on a refined mesh; uneven pieces are kept as they are."""
        mesh, axes = self.axes_of(layout.mesh.sizes, layout.mesh.ranks)
        parts = dict(zip(layout.mesh.axes, axes, strict=True))
        dims = [tuple(p for a in entry for p in parts[a]) for entry in layout.bound]
        sizes = [layout.pieces(d, shape[d]) if entry else None for d, entry in enumerate(layout.bound)]
        partial = [(p, op) for a, op in layout.partial for p in parts[a]]
        return Layout.of(mesh, dims, partial, sizes).normal(tuple(shape))


def _cuts(sizes: Sequence[int]) -> set[int]:
    return {math.prod(sizes[i:]) for i in range(len(sizes) + 1)}
