"""Largest piece of a tensor, which is the first rank's: its shape."""

from __future__ import annotations

from functools import lru_cache

from shardwright.ir.layout import Layout

Shape = tuple[int, ...]


@lru_cache(maxsize=65536)
def local_shape(layout: Layout, shape: Shape) -> Shape:
    """Computes the shape of the largest piece of a tensor of global ``shape``.

    It is the first rank's, so other ranks need no look.

    >>> local_shape(Layout((2, 4), ("dp", "tp"))("dp", "tp"), (5, 8))
    (3, 2)
    """
    found = []
    for size, axes, explicit in zip(shape, layout.bound, layout.sizes):
        if explicit is None:
            for axis in axes:
                size = -(-size // layout.mesh.axis_size(axis))
        found.append(size if explicit is None else max(explicit))
    return tuple(found)
