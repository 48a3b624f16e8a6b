"""Assignments to ``tensor.data`` in a captured callable: a parameter or buffer gets other values, past autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from shardwright.base.torch_private import pytree
from shardwright.capture.functionalise import is_mutation
from shardwright.capture.fx_nodes import storage_of
from shardwright.capture.recorded import Recorded
from shardwright.capture.refusals import refuse
from shardwright.errors import CaptureError


def give_data(tensor: Tensor, value: Any, is_given: bool) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Carries out ``tensor.data = value`` for an input, parameter or buffer, by a copy.

    Args:
        tensor: a tensor of the capture.
        value: what is assigned.
        is_given: whether it is an input, parameter or buffer.

    Returns:
        Its node, that of the write, and that of the value.

    Raises:
        CaptureError: the value has another shape or dtype, or is not computed; or the tensor is an activation.
    """
    if not is_given:
        raise refuse(
            "tensor.data = ... of an activation cannot be captured: it gets other memory, past autograd and what is made of it",
            "Give the new value a name: h = h + (value - h).detach()",
        )
    recorded = Recorded()
    if not isinstance(value, Tensor) or (value.shape, value.dtype) != (tensor.shape, tensor.dtype):
        now = f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise refuse(
            f"tensor.data = {now} cannot be captured for a tensor of {list(tensor.shape)} {tensor.dtype}: in a graph shape and "
            "dtype stay",
            "Give the new value a name",
        )
    source = recorded.node(value)
    fixed = {storage_of(n.meta["val"]) for n in recorded.graph.nodes if n.op != "call_function" and _tensors(n)}
    if source is None or storage_of(value) in fixed:
        raise refuse(
            "tensor.data = ... of another parameter, buffer or input cannot be captured: both would share their memory",
            "Assign a clone of it, or write: with torch.no_grad(): tensor.copy_(value)",
        )
    first = recorded.node(tensor)
    with torch.no_grad():
        tensor.copy_(value)
    last = recorded.node(tensor)
    assert first is not None
    assert last is not None
    return first, last, source


def check_aliases(graph: fx.Graph, written: fx.Node, since: fx.Node, value: fx.Node, source: str) -> None:
    """Refuses to read, after an assignment to ``.data``, what shares the memory from before, and to write to the value.

    Args:
        graph: the whole export.
        written: the input, parameter or buffer that was assigned to.
        since: the node by which it was written.
        value: what was assigned, whose memory it has then on a single device.
        source: the user's line.

    Raises:
        CaptureError: there is such a reading or write.
    """
    nodes = list(graph.nodes)
    at = nodes.index(since)
    of_value = storage_of(value.meta["val"])
    if any(is_mutation(node.target) and of_value in map(storage_of, _tensors(node)) for node in nodes[at + 1 :]):
        raise CaptureError(
            f"tensor.data = ... cannot be captured, at {source}: the value is written to later, in the same memory\n"
            "  Assign a clone of it"
        )
    memory = storage_of(written.meta["val"])
    alike = {n for n in nodes[:at] if n is not written and memory in map(storage_of, _tensors(n))}
    if any(not alike.isdisjoint(node.all_input_nodes) for node in nodes[at + 1 :]):
        raise CaptureError(
            f"tensor.data = ... cannot be captured, at {source}: a view of the tensor or its .data of before is read later\n"
            "  Read it before, or take a clone of it"
        )


def _tensors(node: fx.Node) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]
