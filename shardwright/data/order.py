"""Order: which samples are in which global batch, and where in it a loader stands. The same on every rank."""

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
    """The order of samples in every epoch, cut into global batches.

    Args:
        length: samples in the data set; ``None`` for a stream.
        given: a function of the epoch that says the order instead of ``shuffle``.

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
        """Returns the indices of an epoch's samples in the order in which they are read; a tensor where they are shuffled."""
        assert self.length is not None
        if self.given is not None:
            return list(self.given(epoch))
        if not self.shuffle:
            return range(self.length)
        generator = torch.Generator().manual_seed(mixed(self.seed, epoch))
        return torch.randperm(self.length, generator=generator)

    def batches(self, epoch: int, skipped: int = 0, samples: Samples | None = None) -> Iterator[list[int]]:
        """Yields the indices of one global batch after another, from the sample at position ``skipped`` on."""
        samples = self.samples(epoch) if samples is None else samples
        for start in range(skipped, len(samples), self.batch_size):
            part = samples[start : start + self.batch_size]
            indices = part.tolist() if isinstance(part, Tensor) else list(part)
            if len(indices) == self.batch_size or not self.drop_last:
                yield indices

    def count(self, samples: int) -> int:
        """Returns how many batches so many samples make."""
        return samples // self.batch_size if self.drop_last else -(-samples // self.batch_size)


@dataclass
class Position:
    """Where a loader stands: an epoch, and how many of its samples have been handed out."""

    epoch: int = 0
    samples: int = 0


def state_of(position: Position, order: Order) -> dict[str, Any]:
    """Returns the state to save: the same on every rank, whatever their number."""
    return {
        "epoch": position.epoch,
        "samples": position.samples,
        "batch": -(-position.samples // order.batch_size),
        "seed": order.seed,
        "shuffle": order.shuffle,
        "length": order.length,
    }


def position_in(state: Any, order: Order) -> Position:
    """Returns the position that a saved state describes; takes its seed over.

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
