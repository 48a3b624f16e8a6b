"""Pieces: the sizes into which a dim is cut."""

from __future__ import annotations

from functools import lru_cache


@lru_cache(maxsize=65536)
def chunk_pieces(size: int, counts: tuple[int, ...]) -> tuple[int, ...]:
    """Computes piece sizes of a dim split by each count in turn, as ``torch.chunk`` splits. Missing pieces are empty.

    >>> chunk_pieces(5, (2, 2))
    (2, 1, 1, 1)
    >>> chunk_pieces(10, (4,))
    (3, 3, 3, 1)
    """
    pieces: tuple[int, ...] = (size,)
    for count in counts:
        pieces = tuple(p for whole in pieces for p in _chunk(whole, count))
    return pieces


def _chunk(size: int, count: int) -> list[int]:
    step = -(-size // count)
    return [max(0, min(step, size - i * step)) for i in range(count)]
