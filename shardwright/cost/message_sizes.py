"""Message sizes: limits by which collectives on gloo cut what they send, which decide memory too.

The distributed world sends by them and the memory model predicts by them, so they are only here. None changes
a result, only time and memory.
"""

from __future__ import annotations

import math

# Bytes of whole tensors that one member may hold for the others, in the algorithms where it gets all of them. Those win where
# messages cost more than bytes do; of large tensors the memory counts, so there they are left out whatever was measured.
MOST_COPIES = 64 << 20

# Bytes of a chunk of a chain: larger ones fill the chain late, smaller ones cost more messages.
CHUNK = 2 << 20
# Chunks of a chain at most: each costs a message on every link, and to fill the chain is a small part of sixteen.
MOST_CHUNKS = 16
# Chunks that a member of a chain may be sent before it takes the first, which is the number of its buffers: one is added while
# the next arrives, and the one after is requested.
WINDOW = 3

# Bytes in flight to a member for its piece: from all others together, and at least from each. Smaller messages cost time: with
# 2 MB each, four ranks are as fast as with whole pieces, with 1 MB up to a tenth slower, with 256 kB up to 1.8 times as slow.
PART, LEAST_PART = 6 << 20, 1 << 20
# Parts of a piece that are requested before the first has arrived: one arrives while the one before is added.
AHEAD = 2

# Elements from which gathered pieces are received in place: for more elements copying them all afterwards costs more than the
# separate messages that this takes.
MANY = 1 << 18

# Bytes of the buffers that are kept for the next time: a smaller one costs almost nothing to allocate again, a larger one would
# take memory from the user's tensors. What MOST_COPIES allows is always kept.
LEAST_KEPT, MOST_KEPT = 1 << 18, 64 << 20


def chunks_of_chain(nbytes: float) -> int:
    """Counts the chunks in which a tensor of so many bytes goes along a chain.

    >>> chunks_of_chain(1 << 20), chunks_of_chain(9 << 20), chunks_of_chain(1 << 30)
    (1, 4, 16)
    """
    return min(MOST_CHUNKS, max(1, int(nbytes // CHUNK)))


def parts_of_piece(nbytes: float, members: int) -> int:
    """Counts the parts in which each other member sends a piece of so many bytes.

    >>> parts_of_piece(3 << 20, 4), parts_of_piece(100 << 20, 4)
    (2, 50)
    """
    return math.ceil(nbytes / max(LEAST_PART, PART // (members - 1)))


def may_hold_copies(nbytes: float, members: int) -> bool:
    """Tells whether one member may hold such a tensor from each other member."""
    return (members - 1) * nbytes <= MOST_COPIES


def is_kept(nbytes: float) -> bool:
    """Tells whether collectives keep a buffer of so many bytes for the next time."""
    return LEAST_KEPT <= nbytes <= MOST_KEPT
