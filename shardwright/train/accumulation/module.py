"""Gradient accumulation: a batch in several parts, one after the other, and one reduction of the gradients for all.

The local program is cut in two. The operators that read parameters only, their gathers and the sums of their gradients run
once per step. The rest runs forward and backward for every micro-batch, as part of the forward, so that only one
micro-batch's activations are held at a time; gradients add up where the two parts meet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.base.torch_private import pytree
from shardwright.capture.session import current_session
from shardwright.errors import ArgumentTypeError, ShardwrightError


class GradAccumulation(nn.Module):
    """A network that takes its batch in several parts; its result is the mean of theirs.

    Within :class:`shardwright.AutoParallel` the forward pass of each part is followed by its backward pass, and gradients
    are reduced over ranks once; the backward pass of the call's result then delivers them. Elsewhere it is a plain loop.

    Args:
        network: its result is the loss, a scalar, or a tuple whose first element is the loss; tensors beside it are
            concatenated along dim 0, and have no gradient.
        micro_size: number of parts. Every tensor input whose dim 0 is as long as the first one's is cut along it.
        reduction: ``"mean"`` of the losses; where each is a mean over its part, that is the mean over the batch.
            ``"sum"``: their sum.

    Raises:
        ShardwrightError: a number out of range (``ArgumentTypeError``: not a number); at a call, a batch that it does not
            divide.

    >>> model = GradAccumulation(nn.Sequential(nn.Flatten(), nn.Linear(4, 1)), 2, reduction="sum")
    >>> model.micro_size
    2
    """

    wraps_network = True  # checkpoints have the network's own names

    def __init__(self, network: nn.Module, micro_size: int, reduction: str = "mean"):
        super().__init__()
        if not isinstance(network, nn.Module):
            raise ArgumentTypeError(f"GradAccumulation({network!r}): give a module")
        if not isinstance(micro_size, int) or isinstance(micro_size, bool):
            raise ArgumentTypeError(f"GradAccumulation(micro_size={micro_size!r}): give a whole number")
        if micro_size <= 0:
            raise ShardwrightError(f"GradAccumulation(micro_size={micro_size}): give the number of parts, 1 or more")
        if reduction not in ("mean", "sum"):
            raise ShardwrightError(f"GradAccumulation(reduction={reduction!r}): give 'mean' or 'sum'")
        self.network, self.micro_size, self.reduction = network, micro_size, reduction
        self._is_given_a_part = False  # while it is captured by itself

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_given_a_part and current_session() is not None:
            return self.network(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        found = []
        for part in self.parts(leaves):
            part_args, part_kwargs = pytree.tree_unflatten(part, spec)
            (loss, *beside), out_spec = pytree.tree_flatten(self.network(*part_args, **part_kwargs))
            found.append(([loss, *(b.detach() if isinstance(b, Tensor) else b for b in beside)], out_spec))
        results = [self.joined([leaves for leaves, _ in found], position) for position in range(len(found[0][0]))]
        return pytree.tree_unflatten(results, found[0][1])

    def parts(self, leaves: Sequence[Any]) -> list[list[Any]]:
        """Returns the flat inputs of every micro-batch.

        Raises:
            ShardwrightError: there is no tensor to cut, or its dim 0 is no multiple of ``micro_size``.
        """
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim]
        if not tensors:
            raise ShardwrightError("GradAccumulation was called without a tensor to cut along dim 0")
        batch = tensors[0].shape[0]
        if batch % self.micro_size:
            raise ShardwrightError(
                f"GradAccumulation(micro_size={self.micro_size}): dim 0 of the inputs is {batch}, which {self.micro_size} does "
                f"not divide; use a batch that is a multiple of {self.micro_size}"
            )
        size = batch // self.micro_size
        return [
            [
                leaf[i * size : (i + 1) * size] if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == batch else leaf
                for leaf in leaves
            ]
            for i in range(self.micro_size)
        ]

    def joined(self, results: Sequence[Sequence[Any]], position: int) -> Any:
        """Joins one result of the parts: scalars are averaged or added, other tensors concatenated."""
        values = [leaves[position] for leaves in results]
        if not isinstance(values[0], Tensor):
            return values[0]
        if values[0].ndim:
            return torch.cat(values)
        total = values[0]
        for value in values[1:]:
            total = total + value
        return total / self.micro_size if self.reduction == "mean" else total


@contextmanager
def given_a_part(module: GradAccumulation | None) -> Iterator[None]:
    """Makes the module, within the block, take its inputs as one micro-batch."""
    if module is None:
        yield
        return
    module._is_given_a_part = True
    try:
        yield
    finally:
        module._is_given_a_part = False


# -- the program in two parts ----------------------------------------------------------------------------------------------


# -- running -----------------------------------------------------------------------------------------------------------------
