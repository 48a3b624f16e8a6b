"""Order of samples: which are in which global batch, and where a loader stands. The same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardwright.data.reader import mixed
from shardwright.errors import ShardwrightError

OrderFunction = Callable[[int], Sequence[int]]
Samples = Sequence[int] | Tensor


@dataclass
class Order:
    """Order of samples in every epoch, cut into global batches.

    Args:
        length: samples in the data set; ``None`` for a stream.
        batch_size: samples per global batch.
        shuffle: whether each epoch has another order.
        seed: determines the orders of epochs.
        drop_last: whether a shorter last batch is left out.
        given: a function of the epoch that returns the order, instead of ``shuffle``.

    >>> [indices for indices in Order(5, 2, False, 0, False).batches(epoch=0)]
    [[0, 1], [2, 3], [4]]
    """

    length: int | None
    batch_size: int
    shuffle: bool
    seed: int
    drop_last: bool
    given: OrderFunction | None = None

    def samples(self, epoch: int) -> Samples:
        """Returns the indices of an epoch's samples in the order of reading; a tensor where they are shuffled."""
        assert self.length is not None
        if self.given is not None:
            return list(self.given(epoch))
        if not self.shuffle:
            return range(self.length)
        generator = torch.Generator().manual_seed(mixed(self.seed, epoch))
        return torch.randperm(self.length, generator=generator)

    def batches(self, epoch: int, skipped: int = 0, samples: Samples | None = None) -> Iterator[list[int]]:
        """Yields the indices of each global batch, from the sample at position ``skipped`` on."""
        samples = self.samples(epoch) if samples is None else samples
        for start in range(skipped, len(samples), self.batch_size):
            part = samples[start : start + self.batch_size]
            indices = part.tolist() if isinstance(part, Tensor) else list(part)
            if len(indices) == self.batch_size or not self.drop_last:
                yield indices

    def count(self, samples: int) -> int:
        """Counts the batches that so many samples make."""
        return samples // self.batch_size if self.drop_last else -(-samples // self.batch_size)


@dataclass
class Position:
    """Position of a loader: an epoch, and how many of its samples have been yielded."""

    epoch: int = 0
    samples: int = 0


def state_of(position: Position, order: Order) -> dict[str, Any]:
    """Builds the state to save, which is the same on every rank, whatever their number."""
    return {
        "epoch": position.epoch,
        "samples": position.samples,
        "batch": -(-position.samples // order.batch_size),
        "seed": order.seed,
        "shuffle": order.shuffle,
        "length": order.length,
    }


def position_in(state: Any, order: Order) -> Position:
    """Reads the position from a saved state. Sets the order's seed to the saved one.

    Raises:
        ShardwrightError: no such state, or one of another data set or order.
    """
    wanted = {"epoch", "samples", "seed", "shuffle", "length"}
    if not isinstance(state, dict) or not wanted <= state.keys():
        given = sorted(state) if isinstance(state, dict) else repr(state)
        raise ShardwrightError(f"load_state_dict({given}): give what state_dict() of a loader returned, with {sorted(wanted)}")
    for name, here, change in (("length", order.length, "the data set"), ("shuffle", order.shuffle, "shuffle=")):
        if state[name] != here:
            raise ShardwrightError(
                f"load_state_dict: the state was saved with {name} {state[name]}, this loader has {here}: the rest of the "
                f"epoch would be other samples. Change {change} back, or start at an epoch with set_epoch({state['epoch'] + 1})"
            )
    order.seed = int(state["seed"])
    return Position(int(state["epoch"]), int(state["samples"]))
