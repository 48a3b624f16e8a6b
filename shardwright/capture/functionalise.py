"""Functionalise: rewrites in-place operators so that every value is made once and never changed.

Export keeps in-place operators and views as the user wrote them. Here a write to a value makes a new value; a write
through a view is scattered back into the value it views; and a view that is read after such a write is made again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from shardwright.errors import CaptureError

aten = torch.ops.aten


@dataclass
class Tracked:
    """One tensor of the exported graph: its current value and how to make it again from the tensor it views."""

    value: str
    meta: Tensor
    parent: fx.Node | None = None
    remake: tuple[Any, tuple[Any, ...], dict[str, Any], int | None] | None = None
    version: int = 0  # version of the parent it was made from
    writes: int = 0


def is_mutation(target: Any) -> bool:
    """Whether an overload writes to its first argument."""
    schema = getattr(target, "_schema", None)
    return bool(schema and any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments))


def functional_overload(target: Any) -> tuple[Any, str]:
    """The overload that computes what an in-place overload writes."""
    packet, overload = target.overloadpacket.__name__, target._overloadname
    if (packet, overload) == ("bernoulli_", "float"):
        overload = "p"
    for name in (packet.rstrip("_"), packet.rstrip("_") + "_functional"):
        found = getattr(aten, name, None)
        if found is not None and overload in found.overloads():
            candidate = getattr(found, overload)
            if not is_mutation(candidate):
                return candidate, name
    raise CaptureError(
        f"the in-place operator {target} has no form that leaves its input alone; use one that returns a new tensor"
    )


def scatter_back(node: fx.Node, which: int | None, parent: Tensor) -> Callable[[Callable[..., Any], Any, Any], Any]:
    """How a new value of a view becomes a new value of the tensor it views.

    Returns:
        A function of ``(emit, value of the parent, new value of the view)``.
    """
    name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
    args: list[Any] = [*node.args[1:]]
    shape = list(parent.shape)

    def argument(position: int, key: str, default: Any) -> Any:
        return args[position] if position < len(args) else node.kwargs.get(key, default)

    if name in ("view", "reshape", "_unsafe_view", "squeeze", "unsqueeze", "flatten", "unflatten", "view_as"):
        return lambda emit, base, new: emit(aten.reshape.default, new, shape)
    if name in ("alias", "detach", "contiguous", "to", "lift_fresh", "clone"):
        return lambda emit, base, new: new
    if name in ("transpose", "t", "swapaxes", "numpy_T", "mT"):
        d0, d1 = (args[0], args[1]) if name in ("transpose", "swapaxes") else (-2, -1)
        return lambda emit, base, new: emit(aten.transpose.int, new, d0, d1) if len(shape) > 1 else new
    if name == "permute":
        order = [d % len(shape) for d in args[0]]
        inverse = [order.index(i) for i in range(len(shape))]
        return lambda emit, base, new: emit(aten.permute.default, new, inverse)
    if name == "select":
        return lambda emit, base, new: emit(aten.select_scatter.default, base, new, args[0], args[1])
    if name in ("slice", "narrow"):
        dim = argument(0, "dim", 0)
        if name == "narrow":
            start, end, step = args[1], args[1] + args[2], 1
        else:
            start, end, step = argument(1, "start", None), argument(2, "end", None), argument(3, "step", 1)
        return lambda emit, base, new: emit(aten.slice_scatter.default, base, new, dim, start, end, step)
    if name in ("split", "chunk", "split_with_sizes", "tensor_split", "unbind") and which is not None:
        dim = argument(0, "dim", 0) if name == "unbind" else argument(1, "dim", 0)
        if name == "unbind":
            return lambda emit, base, new: emit(aten.select_scatter.default, base, new, dim, which)
        sizes = [p.shape[dim] for p in node.meta["val"]]
        start = sum(sizes[:which])
        return lambda emit, base, new: emit(aten.slice_scatter.default, base, new, dim, start, start + sizes[which], 1)
    if name == "diagonal":
        rest = [argument(0, "offset", 0), argument(1, "dim1", 0), argument(2, "dim2", 1)]
        return lambda emit, base, new: emit(aten.diagonal_scatter.default, base, new, *rest)
    raise CaptureError(f"a write through {node.target} cannot be captured; write to a tensor that is no such view")
