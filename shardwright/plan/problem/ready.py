"""Values whose readers can start their moves early."""

from __future__ import annotations

from shardwright.base.operators import may_draw
from shardwright.ir.graph import Graph


def ready_values(graph: Graph, full_batch: bool) -> frozenset[str]:
    """Finds the values any piece of which every rank can make without communication."""
    ready = {
        i.value for i in graph.inputs
        if not i.requires_grad and (i.kind in ("buffer", "constant") or (i.kind == "input" and full_batch))
    }  # fmt: skip
    for node in graph.nodes:
        if not may_draw(node.op.target) and node.mark is None and all(v in ready for v in node.inputs):
            ready.update(node.outputs)
    return frozenset(ready)
