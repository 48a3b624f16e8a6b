"""The tensor that a caller gets for an output that is split: whole as soon as an operator reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from shardwright.agreement.job_watch import note
from shardwright.base.torch_private import DisableTorchFunctionSubclass, pytree, wrapper_tensor
from shardwright.errors import ShardwrightError
from shardwright.ir.layout import Layout
from shardwright.ir.operator import TensorMeta

# What can be told without the values: descriptors of attributes, and methods.
_ATTRIBUTES = ("shape", "dtype", "device", "ndim", "layout", "itemsize", "nbytes")
_METHODS = ("size", "dim", "ndimension", "numel", "nelement", "__len__", "is_floating_point", "is_complex", "element_size")
_KNOWN = {
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES), *(getattr(Tensor, name) for name in _METHODS),
    torch.is_floating_point, torch.is_complex, torch.numel,
}  # fmt: skip
_REQUIRES_GRAD = getattr(Tensor, "requires_grad").__get__  # noqa: B009


class SplitOutput(Tensor):
    """A global tensor of which each rank holds a piece.

    Reading it makes it whole, once: with any operator of torch, by indexing or printing, or by :meth:`full_tensor`. In a job
    every rank has to read it then, as ranks send each other their pieces. Shape, dtype and device are known without. An
    output that nobody reads costs nothing.

    Attributes:
        split: the layout of its pieces.
        pieces: by rank, the piece of each rank that this process runs; with the gradients' graph. Pieces of a split with
            pending sums are summands.
        when_whole: called with the whole tensor when it is made.
    """

    split: Layout
    pieces: Mapping[int, Tensor]
    when_whole: list[Callable[[Tensor], None]]
    _make_whole: Callable[[], Tensor]
    _whole: Tensor | None
    _is_in_graph: bool

    @staticmethod
    def __new__(
        cls: type[SplitOutput], meta: TensorMeta, split: Layout, pieces: Mapping[int, Tensor], make_whole: Callable[[], Tensor]
    ) -> SplitOutput:
        """Makes one.

        Args:
            meta: of the whole tensor.
            split: the layout of the pieces.
            pieces: by rank.
            make_whole: makes the whole tensor of them.
        """
        one = next(iter(pieces.values()))
        made: SplitOutput = wrapper_tensor(cls, meta.shape, dtype=one.dtype, device=one.device)
        made.split, made.pieces, made._make_whole, made._whole = split, pieces, make_whole, None
        made._is_in_graph, made.when_whole = one.requires_grad, []
        return made

    def full_tensor(self) -> Tensor:
        """Returns the whole tensor. In a job, every rank calls it."""
        if self._whole is None:
            note("an output of a net that is made whole where it is read")
            # as if the call had returned it, whatever modes it is read under
            with torch.inference_mode(False), torch.set_grad_enabled(self._is_in_graph):
                self._whole = self._make_whole()
            for act in self.when_whole:
                act(self._whole)
        return self._whole

    def to_local(self, rank: int | None = None) -> Tensor:
        """Returns the piece of a rank.

        Args:
            rank: which one, on simulated ranks; default: the only rank of this process.

        Raises:
            ShardwrightError: the rank is not one of this process.
        """
        if rank is None and len(self.pieces) == 1:
            (rank,) = self.pieces
        if rank is None or rank not in self.pieces:
            raise ShardwrightError(f"to_local({rank}): this process runs the ranks {sorted(self.pieces)}; give one of them")
        return self.pieces[rank]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs a function of torch on whole tensors in the place of split ones."""
        if function in _KNOWN:
            with DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        if function == _REQUIRES_GRAD and type(args[0]) is cls and args[0]._whole is None:
            return args[0]._is_in_graph
        args, kwargs = whole_outputs((args, kwargs or {}))
        return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Refuses what reads the memory of a tensor without going through torch's functions."""
        raise ShardwrightError(f"{function} reads an output that is split over the ranks: give it output.full_tensor()")


def whole_outputs(tree: Any) -> Any:
    """Returns the same nested structure with split outputs made whole."""
    return pytree.tree_map(lambda leaf: leaf.full_tensor() if isinstance(leaf, SplitOutput) else leaf, tree)
