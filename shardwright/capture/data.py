"""Assignments to ``tensor.data`` in a captured callable: the tensor gets other values, and keeps its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from shardwright.base.opaque import WRITTEN_PAST_AUTOGRAD
from shardwright.base.torch_private import pytree, track_as
from shardwright.capture.fx_nodes import storage_of
from shardwright.capture.recorded import Recorded
from shardwright.capture.refusals import refuse
from shardwright.errors import CaptureError


def give_data(tensor: Tensor, value: Any, is_given: bool) -> tuple[fx.Node, fx.Node] | None:
    """Carries out ``tensor.data = value``.

    Args:
        tensor: a tensor of the capture.
        value: what is assigned.
        is_given: whether it is an input, parameter or buffer, whose values change for the caller too.

    Returns:
        For what is given, its node and that of the write.

    Raises:
        CaptureError: the value has another shape or dtype.
    """
    recorded = Recorded()
    if not isinstance(value, Tensor) or (value.shape, value.dtype) != (tensor.shape, tensor.dtype):
        now = f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise refuse(
            f"tensor.data = {now} cannot be captured for a tensor of {list(tensor.shape)} {tensor.dtype}: in a graph shape and "
            "dtype stay",
            "Give the new value a name",
        )
    if is_given:
        with torch.no_grad():
            first = recorded.node(tensor)
            tensor.copy_(value)
        last = recorded.node(tensor)
        assert first is not None
        assert last is not None
        return first, last
    made = WRITTEN_PAST_AUTOGRAD(tensor, value.detach())
    node = recorded.node(made)
    assert node is not None
    track_as(tensor, node, recorded.tracer)
    return None


def check_aliases(graph: fx.Graph, written: fx.Node, since: fx.Node, source: str) -> None:
    """Refuses to read, after an assignment to ``.data``, another tensor with the memory that the assigned one had.

    Args:
        graph: the whole export.
        written: the input, parameter or buffer that was assigned to.
        since: the node by which it was written.
        source: the user's line.

    Raises:
        CaptureError: such a tensor is read. It would have the new values, and has the old ones on a single device.
    """
    memory = storage_of(written.meta["val"])
    nodes = list(graph.nodes)
    at = nodes.index(since)
    alike = {n for n in nodes[:at] if n is not written and memory in map(storage_of, _tensors(n))}
    if any(not alike.isdisjoint(node.all_input_nodes) for node in nodes[at + 1 :]):
        raise CaptureError(
            f"tensor.data = ... cannot be captured, at {source}: a view of the tensor or its .data of before is read later\n"
            "  Read it before, or take a clone of it"
        )


def _tensors(node: fx.Node) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]
