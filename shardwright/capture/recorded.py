"""Recorded: what the export in progress has recorded so far, and which of its nodes a tensor stands for."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from shardwright.base.operators import RETURNS_ARGUMENT
from shardwright.base.torch_private import FakeTensor, disable_current_modes, recorded_node, tracer_of_export, track_as
from shardwright.capture.fx_nodes import storage_of


def _is_same(one: fx.Node, other: fx.Node) -> bool:
    """Tells whether two nodes have values of the same memory, shape and strides."""
    a, b = one.meta.get("val"), other.meta.get("val")
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or storage_of(a) != storage_of(b):
        return False
    return (a.shape, a.stride(), a.storage_offset(), a.dtype) == (b.shape, b.stride(), b.storage_offset(), b.dtype)


class Recorded:
    """The export in progress.

    Raises:
        LookupError: none is.
    """

    def __init__(self) -> None:
        self.tracer: Any = tracer_of_export()
        if self.tracer is None:
            raise LookupError("nothing is being exported")
        self.graph: fx.Graph = self.tracer.graph
        self.root: Any = self.tracer.root

    def node(self, tensor: Tensor) -> fx.Node | None:
        """Returns the first node whose value a tensor is; ``None`` for a constant.

        An operator that returned the tensor itself is not what made it.
        """
        node = recorded_node(tensor, self.tracer)
        while node is not None:
            made_by = node.args[0] if node.target is operator.getitem else node
            packet = getattr(getattr(made_by, "target", None), "overloadpacket", None)
            if packet not in RETURNS_ARGUMENT:
                break
            before = next((n for n in made_by.all_input_nodes if _is_same(n, node)), None)  # type: ignore[union-attr]
            if before is None:
                break
            node = before
        return node

    def tensor(self, node: fx.Node, needs_gradient: bool) -> Tensor:
        """Makes a tensor that stands for the value of a node.

        Args:
            node: a node of the export.
            needs_gradient: whether the tensor says that it has a gradient.
        """
        value = node.meta["val"]
        assert isinstance(value, FakeTensor), (node, value)
        with disable_current_modes(), value.fake_mode:
            made = torch.empty_strided(tuple(value.shape), tuple(value.stride()), dtype=value.dtype, device=value.device)
        if needs_gradient and (made.is_floating_point() or made.is_complex()):
            made.requires_grad_()
        track_as(made, node, self.tracer)
        return made
