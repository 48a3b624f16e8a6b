"""Simulates what is computed again in the backward pass, as :mod:`shardwright.world.execute.recipes` does it.

A storage that an instruction makes, and that is not kept for the backward pass, has a recipe. Autograd saves a reader of it
in its place: before an operator's backward it is computed again, with all it depends on; it is freed with its last reader.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shardwright.plan.memory.usage import Storage, Usage


class Kept:
    """A storage that autograd keeps."""

    __slots__ = ("storage", "usage")

    def __init__(self, usage: Usage, storage: Storage):
        self.usage, self.storage = usage, usage.hold(storage)

    def take(self) -> None:
        """Takes the storage, which is there."""

    def let_go(self) -> None:
        """Releases the storage."""
        self.usage.drop(self.storage)


class Reader:
    """A need of a recipe: for a result, or with ``None`` for what it saves within."""

    __slots__ = ("has_read", "recipe", "what")

    def __init__(self, recipe: Recipe, what: Storage | None):
        self.recipe, self.what, self.has_read = recipe, what, False
        recipe.readers += 1
        recipe.waiting[what] = recipe.waiting.get(what, 0) + 1

    def take(self) -> None:
        """Computes the value, if it is missing."""
        self.recipe.be_computed()

    def read(self) -> None:
        """Records that the value has been read."""
        if not self.has_read:
            self.has_read = True
            self.recipe.was_read(self.what)

    def let_go(self) -> None:
        """Releases the value."""
        self.read()
        self.recipe.readers -= 1
        self.recipe.end_if_unused()


class Recipe:
    """One instruction that is run again.

    Args:
        usage: what is in use.
        makers: by storage, the recipe that makes it again.
        cause: the operator it is for.
        sources: the storages it reads.
        results: those it makes, which are not kept; the program holds them now.
        peak: bytes at most while it runs.
        inner: bytes that it saves within.
        ahead: the recipes that may run ahead of their readers, in order, where this one may; it appends itself.
        flight: bytes in use while it is on its way ahead of its readers; ``landing``: when it has arrived.
    """

    def __init__(
        self, usage: Usage, makers: dict[Storage, Recipe], cause: str, sources: Iterable[Storage], results: Sequence[Storage],
        peak: float, inner: float = 0.0, ahead: list[Recipe] | None = None, flight: float = 0.0,
        landing: float = 0.0,
    ):  # fmt: skip
        self.usage, self.cause, self.peak, self.flight, self.landing = usage, cause, peak, flight, landing
        self.number = usage.next_number()
        distinct = dict.fromkeys(sources)
        self.sources: list[Kept | Reader] = [Reader(makers[s], s) if s in makers else Kept(usage, s) for s in distinct]
        self.sizes: dict[Storage | None, float] = {None: inner} | {storage: storage.size for storage in results}
        self.readers = 0
        self.waiting: dict[Storage | None, int] = {}  # who have not read yet
        self.held: dict[Storage | None, Storage] | None = None
        self.under_way: Storage | None = None
        self.alive = {storage for storage in results if storage.users}
        self.ahead, self.place = ahead, len(ahead) if ahead is not None else 0
        if ahead is not None:
            ahead.append(self)
        for storage in results:
            if storage.when_free is not None:  # written over another recipe's result
                storage.when_free.is_free(storage)
            makers[storage] = self
            storage.when_free = self

    def is_free(self, storage: Storage) -> None:
        """Records that the program does not need a result any more."""
        self.alive.discard(storage)
        self.end_if_unused()

    def end_if_unused(self) -> None:
        """Releases its sources once nobody can ask any more."""
        if not self.readers and not self.alive:
            sources, self.sources = self.sources, []
            for source in sources:
                source.let_go()

    def was_read(self, what: Storage | None) -> None:
        """Records a read; frees what nobody needs."""
        self.waiting[what] -= 1
        if not self.waiting[what]:
            del self.waiting[what]
            if self.held is not None and what in self.held:
                self.usage.drop(self.held.pop(what))

    def be_computed(self) -> None:
        """Computes this recipe and those it depends on, in the order of the program."""
        found: dict[int, Recipe] = {}
        pending = [self]
        while pending:
            recipe = pending.pop()
            if recipe.held is None and recipe.number not in found:
                found[recipe.number] = recipe
                pending += [source.recipe for source in recipe.sources if isinstance(source, Reader)]
        for number in sorted(found):
            found[number]._compute()

    def _compute(self) -> None:
        wanted = {what: size for what, size in self.sizes.items() if size and what in self.waiting}
        more = self.landing - self.flight if self.under_way else self.peak
        self.usage.point(self.cause, more, "activations")
        self.held = {what: self.usage.hold(Storage(size, "activations", self.cause)) for what, size in wanted.items()}
        if self.under_way is not None:
            self.usage.drop(self.under_way)
            self.under_way = None
        for source in self.sources:
            if isinstance(source, Reader):
                source.read()
        if self.ahead is not None:
            nearest = next((r for r in reversed(self.ahead[: self.place]) if r.waiting), None)
            if nearest is not None and nearest.held is None and nearest.under_way is None:
                nearest.under_way = self.usage.hold(Storage(nearest.flight, "activations", nearest.cause))
