"""Chooses the outputs that a program returns as they are split, to be made whole when they are read."""

from __future__ import annotations

from dataclasses import replace

from shardwright.errors import ShardwrightError
from shardwright.ir.graph import Graph

OUTPUTS = ("whole", "sharded")  # what the setting may be, besides None

# Below it a gather costs little, and one rank may read the output alone.
LARGE = 2**20  # bytes of the whole tensor


def check_output(output: str | None) -> None:
    """Checks the setting.

    Raises:
        ShardwrightError: it is unknown.
    """
    if output is not None and output not in OUTPUTS:
        raise ShardwrightError(f"output={output!r} is unknown; use one of {', '.join(OUTPUTS)}, or leave it out")


def with_outputs_read_later(graph: Graph, output: str | None) -> Graph:
    """Marks the outputs that stay split until they are read.

    Args:
        graph: the graph.
        output: ``"sharded"``: all that have dims. ``None``: beside a loss, those of :data:`LARGE` bytes or more, as a training
            step reads the loss. ``"whole"``: none.
    """
    if output == "whole":
        return graph
    from_nodes = {value for node in graph.nodes for value in node.outputs}
    returned = graph.outputs[: len(graph.outputs) - graph.hidden]
    kept = {o for o in graph.outputs[len(returned) :] if isinstance(o, str)} | {value for _, value in graph.updates}
    found = {o for o in returned if isinstance(o, str) and o in from_nodes and graph.metas[o].shape} - kept
    if output is None:
        if not any(_is_a_loss(graph, o) for o in returned if isinstance(o, str) and o in from_nodes):
            return graph
        found = {o for o in found if graph.metas[o].bytes >= LARGE}
    return replace(graph, read_later=frozenset(found)) if found else graph


def _is_a_loss(graph: Graph, value: str) -> bool:
    meta = graph.metas[value]
    return not meta.shape and meta.dtype.is_floating_point
