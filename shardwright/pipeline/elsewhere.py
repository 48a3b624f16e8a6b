"""Results that other ranks hold: they have a shape and a gradient here, and no values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from shardwright.errors import WorldError

_READS = frozenset(
    {Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__array__}
)
_MESSAGE = (
    "{}: this result of a pipeline is on the ranks of its last stage only; read it there, or give every rank all results: "
    ".pipeline(..., output_broadcast=True)"
)


class Elsewhere(Tensor):
    """A result that the ranks of another stage hold, on the meta device. What is computed of it is elsewhere too.

    >>> import torch
    >>> (torch.ones(2, 3, device="meta").as_subclass(Elsewhere) * 2).sum(0)
    Elsewhere(shape=[3], dtype=torch.float32)
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Computes with shapes.

        Raises:
            WorldError: values are asked for.
        """
        if func is Tensor.__repr__:
            return f"Elsewhere(shape={list(args[0].shape)}, dtype={args[0].dtype})"
        name = getattr(func, "__name__", "an operator")
        if func in _READS:
            raise WorldError(_MESSAGE.format(name))
        try:
            return super().__torch_function__(func, types, tuple(args), dict(kwargs or {}))
        except (RuntimeError, NotImplementedError) as error:  # such as an operator that reads a tensor of another device too
            raise WorldError(_MESSAGE.format(name)) from error
