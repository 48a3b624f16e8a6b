"""Storages that a rank has in use, the bytes of each part, and the points so far.

A storage counts while somebody holds it, once, however many tensors lie in it.
"""

from __future__ import annotations

from typing import Protocol

from shardwright.cost.message_sizes import is_kept
from shardwright.plan.memory.timeline import Point

PARTS = ("parameters", "optimizer", "gradients", "activations", "transient")


class WhenFree(Protocol):
    """Interface of objects that are told when a storage is free."""

    def is_free(self, storage: Storage) -> None: ...


class Storage:
    """Memory that several tensors may share.

    Args:
        size: bytes.
        part: one of :data:`PARTS`.
        label: the operator, value or parameter it is for.

    Attributes:
        users: number of holders.
        when_free: told when nobody holds it any more.
    """

    __slots__ = ("label", "part", "size", "users", "when_free")

    def __init__(self, size: float, part: str, label: str):
        self.size, self.part, self.label = size, part, label
        self.users = 0
        self.when_free: WhenFree | None = None


class Usage:
    """Bytes in use.

    Attributes:
        parts, total: bytes in use.
        points: of the step so far.
        phase: of points to come.
        kept_scratch: bytes of the scratch buffer that collectives keep for the next time, which are in use too.
    """

    def __init__(self) -> None:
        self.parts = dict.fromkeys(PARTS, 0.0)
        self.total = 0.0
        self.points: list[Point] = []
        self.phase = "forward"
        self.kept_scratch = 0.0
        self._scratch_taken = 0
        self._number = 0

    def next_number(self) -> int:
        """Returns a number larger than all before."""
        self._number += 1
        return self._number

    def hold(self, storage: Storage) -> Storage:
        """Adds a user of a storage."""
        if storage.users == 0:
            self.parts[storage.part] += storage.size
            self.total += storage.size
        storage.users += 1
        return storage

    def drop(self, storage: Storage) -> None:
        """Removes a user of a storage; after the last the storage is free."""
        storage.users -= 1
        if storage.users == 0:
            self.parts[storage.part] -= storage.size
            self.total -= storage.size
            if storage.when_free is not None:
                storage.when_free.is_free(storage)

    def reassign(self, storage: Storage, part: str) -> None:
        """Moves a storage to another part."""
        if storage.users:
            self.parts[storage.part] -= storage.size
            self.parts[part] += storage.size
        storage.part = part

    def point(self, node: str, more: float, part: str = "transient") -> None:
        """Records what is in use while an operator runs that needs ``more`` bytes."""
        parts = dict(self.parts)
        parts[part] += more
        self.points.append(Point(self.phase, node, self.total + more, parts))

    # -- scratch ------------------------------------------------------------------------------------------------------

    def take_scratch(self, size: float) -> float:
        """Takes the kept scratch buffer, or a new one where it is too small; returns its bytes.

        Where somebody uses it already that use is waited for, and nothing is taken.
        """
        if not size or self._scratch_taken:
            return 0.0
        self._scratch_taken += 1
        kept, self.kept_scratch = self.kept_scratch, 0.0
        if kept >= size:
            return kept
        self._count_scratch(-kept)
        self._count_scratch(size)
        return size

    def give_scratch(self, size: float) -> None:
        """Gives scratch back: the larger of it and the kept buffer is kept, and the other is free."""
        if not size:
            return
        self._scratch_taken -= 1
        if size > self.kept_scratch and is_kept(size):
            size, self.kept_scratch = self.kept_scratch, size
        self._count_scratch(-size)

    def _count_scratch(self, size: float) -> None:
        self.parts["transient"] += size
        self.total += size
