"""Recorded: what the export in progress has recorded so far, and which of its nodes a tensor stands for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from shardwright.base.torch_private import FakeTensor, disable_current_modes, recorded_node, tracer_of_export, track_as


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
        """Returns the node whose value a tensor is; ``None`` for a constant."""
        return recorded_node(tensor, self.tracer)

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
