"""Loads batches for a parallel net: each rank reads its own part, in one order, resumable at any batch."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader

from shardwright.data.cut import Cut
from shardwright.data.order import Order, Position, Samples, position_in, state_of
from shardwright.data.reader import Reader, Request, StreamReader, mixed
from shardwright.errors import ArgumentTypeError, WorldError
from shardwright.world.current import World, current_world


class Loader:
    """Batches of a data set, epoch by epoch; made by :func:`shardwright.data.loader`.

    Each iteration is one epoch. An epoch that was left early starts from its beginning, unless :meth:`load_state_dict` has
    set a position in it. At the start of each epoch the ranks of a job compare what they are about to read, so all of them
    iterate.
    """

    def __init__(
        self,
        dataset: Any,
        order: Order,
        net: Any,
        strategy: Any,
        collate: Callable[[list[Any]], Any],
        transform: Callable[[Any], Any] | None,
        seed_samples: bool,
        options: dict[str, Any],
    ):
        self.dataset, self.order, self.net, self._strategy = dataset, order, net, strategy
        self.collate, self.transform, self.seed_samples, self.options = collate, transform, seed_samples, options
        self._position = Position()
        self._goes_on = False  # whether the next iteration starts where the position is
        self._latest: object = None  # the iteration that moves the position
        self._requests: list[Iterator[Request]] = []
        self._kept: tuple[Any, DataLoader[Any]] | None = None  # with persistent workers, and what it was made for

    # -- where it stands --------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """Number of the present epoch, or of the next one after a complete one."""
        return self._position.epoch

    @property
    def strategy(self) -> Any:
        """Dataset strategy that batches are cut by."""
        if self._strategy is not None:
            return self._strategy
        return "full_batch" if self.net is None else self.net.settings.dataset_strategy

    def set_epoch(self, epoch: int) -> None:
        """Sets the next epoch. Without it epochs follow each other. Keeps a loaded position of the same epoch.

        Raises:
            ArgumentTypeError: the epoch is not an int of 0 or more.
        """
        if not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 0:
            raise ArgumentTypeError(f"set_epoch({epoch!r}): give an int, 0 or more")
        if epoch != self._position.epoch:
            self._position, self._goes_on, self._latest = Position(epoch), False, None

    def state_dict(self) -> dict[str, Any]:
        """Returns the position after the batches yielded so far; the same on every rank."""
        return state_of(self._position, self.order)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next iteration continue from a saved state. The number of ranks and the batch size may be others.

        Raises:
            ShardwrightError: not a state of a loader, or of another data set or order.
        """
        self._position, self._goes_on, self._latest = position_in(state, self.order), True, None

    def __len__(self) -> int:
        """Counts the global batches of a whole epoch.

        Raises:
            ArgumentTypeError: a stream, whose length is not known.
        """
        if self.order.length is None:
            raise ArgumentTypeError("a stream has no length")
        return self.order.count(len(self.order.samples(self.epoch)) if self.order.given else self.order.length)

    # -- iterating --------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:
        world = current_world()
        token = self._latest = object()
        start = self._position if self._goes_on else Position(self._position.epoch)
        self._position, self._goes_on = start, False
        samples = None if self.order.length is None else self.order.samples(start.epoch)
        self._agree(world, start, samples)
        strategy = "full_batch" if world.inputs_are_whole else self.strategy
        cut = Cut(strategy, world.rank, world.size)
        batches = self._stream(world, cut, start) if samples is None else self._indexed(cut, start, samples)
        for count, batch in batches:
            if self._latest is token:
                self._position = replace(self._position, samples=self._position.samples + count)
            yield batch
        if self._latest is token:
            self._position = Position(start.epoch + 1)

    def _indexed(self, cut: Cut, start: Position, samples: Samples) -> Iterator[tuple[int, Any]]:
        counts: list[int] = []  # of the batches requested, which workers do ahead of time

        def requests() -> Iterator[Request]:
            for indices in self.order.batches(start.epoch, start.samples, samples):
                first, last = cut.rows(len(indices))
                counts.append(len(indices))
                mine = indices[first:last] or indices[-1:]  # one sample, for its shape, where the rank has none
                yield Request(start.epoch, mine, (first, last), len(indices))

        self._requests[:] = [requests()]
        for number, batch in enumerate(self._dataloader(cut)):
            yield counts[number], batch

    def _dataloader(self, cut: Cut) -> DataLoader[Any]:
        if self._kept is not None and self._kept[0] == (cut, self.order.seed):
            return self._kept[1]
        seed = self.order.seed if self.seed_samples else None
        reader = Reader(self.dataset, self.collate, cut, seed, self.transform)
        made = self._of_torch(reader, sampler=_Latest(self._requests))
        if self.options.get("persistent_workers"):
            self._kept = ((cut, self.order.seed), made)
        return made

    def _stream(self, world: World, cut: Cut, start: Position) -> Iterator[tuple[int, Any]]:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(start.epoch)
        order, seed = self.order, self.order.seed if self.seed_samples else None
        reader = StreamReader(
            self.dataset, self.collate, cut, seed, self.transform, order.batch_size, order.drop_last, start.epoch, start.samples
        )
        position = start.samples
        for count, batch in _ending(self._of_torch(reader)):
            if world.processes > 1:
                found = [numbers[0] for numbers in world.gather_numbers([count])]
                _all_the_same("samples in the batch that begins at sample " + str(position), found)
            if not count:
                return
            yield count, batch
            position += count

    def _of_torch(self, reader: Any, **given: Any) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(mixed(self.order.seed, self.epoch))  # leaves the global one alone
        return DataLoader(reader, batch_size=None, collate_fn=_as_it_is, generator=generator, **self.options, **given)

    def _agree(self, world: World, start: Position, samples: Samples | None) -> None:
        """Compares what ranks are about to read; raises an error on all of them if they differ."""
        if world.processes == 1:
            return
        order = self.order
        text = repr(list(samples)) if order.given is not None and samples is not None else ""
        told = {
            "length of the data set": -1 if order.length is None else order.length,
            "batch_size": order.batch_size,
            "epoch": start.epoch,
            "samples read before": start.samples,
            "seed": order.seed,
            "shuffle": int(order.shuffle),
            "drop_last": int(order.drop_last),
            "check sum of the order": zlib.crc32(text.encode()),
            "check sum of the strategy": zlib.crc32(repr(self.strategy).encode()),
        }
        everyone = world.gather_numbers(list(told.values()))
        for position, name in enumerate(told):
            _all_the_same(name, [numbers[position] for numbers in everyone])

    def __repr__(self) -> str:
        order = self.order
        return f"Loader(batch_size={order.batch_size}, strategy={self.strategy!r}, epoch={self.epoch}, samples={order.length})"


def _all_the_same(name: str, values: Sequence[int]) -> None:
    if len(set(values)) > 1:
        told = ", ".join(f"rank {rank} has {value}" for rank, value in enumerate(values))
        raise WorldError(f"the ranks' loaders differ in the {name}: {told}; give all ranks the same")


class _Latest:
    """Requests of the present epoch, as a sampler: with persistent workers one ``DataLoader`` serves many epochs."""

    def __init__(self, requests: list[Iterator[Request]]):
        self.requests = requests

    def __iter__(self) -> Iterator[Request]:
        return self.requests[0]


def _ending(batches: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """Yields the batches, then a count of 0 that tells other ranks of the end."""
    yield from batches
    yield 0, None


def _as_it_is(batch: Any) -> Any:
    return batch
