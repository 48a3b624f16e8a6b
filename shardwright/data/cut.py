"""Cuts batches: which samples of a global batch a rank reads, and which slices of collated tensors are its inputs.

The dataset strategy of the net cuts a batch. Slices of dim 0 are samples, so a rank reads only those; slices of other dims
are cut out of tensors that are collated from whole samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardwright.base.torch_private import pytree
from shardwright.data.strategy import layouts_of
from shardwright.errors import LayoutError, StrategyError
from shardwright.ir.layout import Layout
from shardwright.ir.pieces import chunk_pieces


@dataclass(frozen=True)
class Cut:
    """One rank's part of every global batch; plain data, so that it can be sent to worker processes.

    Args:
        strategy: a checked dataset strategy; ``"full_batch"`` for a caller who gives whole batches.
        rank, size: of the world.

    >>> cut = Cut(((2, 1), (2,)), rank=1, size=2)
    >>> cut.rows(5)
    (3, 5)
    >>> cut([torch.zeros(2, 4), torch.zeros(2)], (3, 5), 5)[0].shape
    torch.Size([2, 4])
    """

    strategy: Any
    rank: int
    size: int

    def rows(self, count: int) -> tuple[int, int]:
        """Returns the range of samples that this rank reads of ``count``: first, and last exclusive.

        Raises:
            StrategyError: a Layout says how many samples each rank has, and they do not add up to ``count``.
        """
        if self.strategy == "full_batch" or not self.strategy:
            return 0, count
        if self.strategy == "data_parallel":
            ends = chunk_pieces(count, (self.size,))
            return sum(ends[: self.rank]), sum(ends[: self.rank + 1])
        wanted = [self._range(layout, count) for layout in self._layouts()]
        some = [(first, last) for first, last in wanted if last > first] or wanted[:1]
        return min(first for first, _ in some), max(last for _, last in some)

    def _layouts(self, ndims: list[int] | None = None) -> list[Layout]:
        if ndims is None:
            ndims = [entry.ndim if isinstance(entry, Layout) else len(entry) for entry in self.strategy]
        return layouts_of(self.strategy, ndims, [True] * len(ndims), self.size)

    def _range(self, layout: Layout, count: int) -> tuple[int, int]:
        if not layout.ndim or not layout.bound[0]:
            return 0, count
        rows = Layout.of(layout.mesh, layout.bound[:1], (), layout.sizes[:1])
        try:
            return rows.bounds((count,))[self.rank][0]
        except LayoutError as error:
            raise StrategyError(f"a batch of {count} samples: {error}; use drop_last=True") from error

    def __call__(self, batch: Any, rows: tuple[int, int], count: int) -> Any:
        """Cuts this rank's inputs out of a collated batch.

        Args:
            batch: any nesting of tensors and other things, made of the samples ``rows`` (one sample where there are none).
            count: samples in the global batch.

        Raises:
            StrategyError: another number of tensors than the strategy has entries, of dims, or of samples in dim 0.
        """
        if self.strategy == "full_batch":
            return batch
        leaves, spec = pytree.tree_flatten(batch)
        positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        if self.strategy == "data_parallel":
            if rows[0] == rows[1]:  # made of one sample, for its shape
                leaves = [leaf[:0] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == 1 else leaf for leaf in leaves]
            return pytree.tree_unflatten(leaves, spec)
        for position, layout in zip(positions, self._layouts([leaves[p].ndim for p in positions])):
            leaves[position] = self._piece(leaves[position], layout, rows, count)
        return pytree.tree_unflatten(leaves, spec)

    def _piece(self, tensor: Tensor, layout: Layout, rows: tuple[int, int], count: int) -> Tensor:
        shape, offset = list(tensor.shape), 0
        if layout.ndim and layout.bound[0]:
            read = max(1, rows[1] - rows[0])
            if shape[0] != read:
                raise StrategyError(
                    f"dataset_strategy cuts dim 0 as {layout.short()}, but a batch of {read} samples became a tensor "
                    f"{shape}; let the collate_fn put samples along dim 0, or leave dim 0 whole"
                )
            shape[0], offset = count, rows[0]
        bounds = layout.bounds(shape)[self.rank]
        index = tuple(
            slice(first - offset, last - offset) if d == 0 else slice(first, last) for d, (first, last) in enumerate(bounds)
        )
        piece = tensor[index] if bounds else tensor
        return piece if piece.shape == tensor.shape else piece.clone(memory_format=torch.contiguous_format)
