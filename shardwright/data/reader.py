"""Readers read, collate and cut the samples of a request, in worker processes or in this one.

They hold plain data and know nothing of process groups. Random numbers that a data set draws come from the seed, the epoch
and the sample, so that they are the same on every rank that reads the sample, in any process, resumed or not.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from shardwright.data.cut import Cut


class Request(NamedTuple):
    """Samples to read for one global batch of ``total``: its positions ``rows``, at ``indices`` of the data set."""

    epoch: int
    indices: list[int]
    rows: tuple[int, int]
    total: int


class Reader(Dataset[Any]):
    """Reads samples by index, collates them and cuts them."""

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], Any],
        cut: Cut,
        seed: int | None,
        transform: Callable[[Any], Any] | None = None,
    ):
        self.dataset, self.collate, self.cut, self.transform = dataset, collate, cut, transform
        self.seed = None if is_plain(dataset) and transform is None else seed

    def __getitem__(self, request: Request) -> Any:
        if self.seed is None:
            samples = self._all(request)
        else:
            with random_state_kept():
                samples = self._all(request)
        return self.cut(self.collate(samples), request.rows, request.total)

    def _all(self, request: Request) -> list[Any]:
        many = getattr(self.dataset, "__getitems__", None)
        if many is None:
            return [self._one(index, request.epoch) for index in request.indices]
        if self.seed is not None:
            seed_all(mixed(self.seed, request.epoch, request.indices[0]))
        samples = list(many(request.indices))
        return samples if self.transform is None else [self.transform(sample) for sample in samples]

    def _one(self, index: int, epoch: int) -> Any:
        if self.seed is not None:
            seed_all(mixed(self.seed, epoch, index))
        sample = self.dataset[index]
        return sample if self.transform is None else self.transform(sample)


class StreamReader(IterableDataset[Any]):
    """Reads a stream of samples from its first one; keeps, collates and cuts the samples of this rank.

    Yields pairs: the number of samples in the global batch, and the rank's inputs.
    """

    def __init__(
        self,
        stream: Iterable[Any],
        collate: Callable[[list[Any]], Any],
        cut: Cut,
        seed: int | None,
        transform: Callable[[Any], Any] | None,
        batch_size: int,
        drop_last: bool,
        epoch: int,
        skipped: int,
    ):
        self.stream, self.collate, self.cut, self.seed, self.transform = stream, collate, cut, seed, transform
        self.batch_size, self.drop_last, self.epoch, self.skipped = batch_size, drop_last, epoch, skipped

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        own: Any = None  # the random state in which the stream goes on
        with self._random(own) as kept:
            stream = iter(self.stream)
            for _ in islice(stream, self.skipped):
                pass
            own = kept()
        position = self.skipped
        while True:
            with self._random(own) as kept:
                samples = list(islice(stream, self.batch_size))
                own = kept()
                if not samples or (self.drop_last and len(samples) < self.batch_size):
                    return
                rows = self.cut.rows(len(samples))
                mine = self._transformed(samples[rows[0] : max(rows[1], rows[0] + 1)] or samples[-1:], position + rows[0])
                result = self.cut(self.collate(mine), rows, len(samples))
            yield len(samples), result
            position += len(samples)

    @contextlib.contextmanager
    def _random(self, state: Any) -> Iterator[Callable[[], Any]]:
        if self.seed is None:
            yield lambda: None
            return
        with random_state_kept():
            if state is None:
                seed_all(mixed(self.seed, self.epoch, -1))
            else:
                _restore(state)
            yield _states

    def _transformed(self, samples: Sequence[Any], position: int) -> list[Any]:
        if self.transform is None:
            return list(samples)
        results = []
        for number, sample in enumerate(samples):
            if self.seed is not None:
                seed_all(mixed(self.seed, self.epoch, position + number))
            results.append(self.transform(sample))
        return results


def is_plain(dataset: Any) -> bool:
    """Tells whether reading a data set draws no random numbers: it holds tensors, or is a subset of such a set."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return type(dataset) is TensorDataset


def mixed(*numbers: int) -> int:
    """Mixes several numbers into one of 63 bits (splitmix64). Neighbours have nothing in common.

    >>> mixed(0, 1) != mixed(1, 0)
    True
    """
    value = 0
    for number in numbers:
        value = (value + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        value ^= value >> 31
    return value >> 1


def seed_all(seed: int) -> None:
    """Seeds the generators that data sets draw from: those of torch on the CPU, of NumPy and of Python."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Restores all generators after the block, which may seed them and draw from them."""
    before = _states()
    try:
        yield
    finally:
        _restore(before)


def _states() -> Any:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _restore(states: Any) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
