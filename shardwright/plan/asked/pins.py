"""Turns an operator's layouts in a plan file into the choice that has exactly them.

A strategy says how an operator's inputs are cut and leaves sums to their operator. A pin determines all of a choice: inputs
that are read with sums still pending, outputs that keep them pending or have them scattered, orders of axes, pieces.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from shardwright.errors import LayoutError, Problems
from shardwright.ir.graph import Graph, Node
from shardwright.ir.layout import Layout
from shardwright.ir.marks import Mark
from shardwright.ir.operator import TensorMeta


@dataclass(frozen=True)
class Pin:
    """Layouts in which an operator is to run.

    Args:
        inputs: the layout in which it reads each input, pending sums included.
        outputs: the layout of each output; ``None``: as it follows from the inputs, with sums done.
        source: the ``file:line`` of the entry.
        what: the entry's name in messages.
    """

    inputs: tuple[Layout, ...]
    outputs: tuple[Layout, ...] | None
    source: str
    what: str


def pinned_graph(graph: Graph, pins: Mapping[str, Pin], full_batch: bool) -> Graph:
    """Marks the pinned nodes of a graph, so that planners and readers recognise them.

    Nodes of which every rank can make any piece are not marked: a mark would have them planned as if they could not.
    """
    if not pins:
        return graph
    from shardwright.plan.problem.ready import ready_values  # here: the modes that do not search need none of it

    ready, nodes = ready_values(graph, full_batch), []
    for node in graph.nodes:
        pin = pins.get(node.name)
        if pin is not None and not all(v in ready for v in node.outputs):
            count, old = len(pin.inputs), node.mark or Mark("")
            mark = replace(old, in_strategy=pin.inputs, out_strategy=pin.outputs, source=pin.source, is_pin=False)
            node = replace(node, mark=mark, mark_positions=tuple(range(count)), mark_count=count)
        nodes.append(node)
    return replace(graph, nodes=tuple(nodes))


def check_pin(node: Node, pin: Pin, world_size: int, problems: Problems) -> bool:
    """Checks that a pin has a fitting layout per tensor of its operator.

    Args:
        node: the operator.
        pin: its pin.
        world_size: number of ranks.
        problems: collects what is wrong.
    """
    outputs = node.op.outputs if pin.outputs is not None else ()
    fine = _check_count("inputs", len(pin.inputs), len(node.op.inputs), pin.what, problems)
    fine &= _check_count("outputs", len(pin.outputs or ()), len(outputs), pin.what, problems)
    if not fine:
        return False
    tensors = [*zip(pin.inputs, node.op.inputs), *zip(pin.outputs or (), outputs)]
    names = [f"input {i}" for i in range(len(pin.inputs))] + [f"output {i}" for i in range(len(outputs))]
    return all([check_fits(la, meta, world_size, f"{pin.what} {name}", problems) for name, (la, meta) in zip(names, tensors)])


def _check_count(kind: str, given: int, wanted: int, what: str, problems: Problems) -> bool:
    if given != wanted:
        problems.add(f"{what}: {given} layouts for {wanted} {kind}; give one for each")
    return given == wanted


def check_fits(layout: Layout, meta: TensorMeta, world_size: int, what: str, problems: Problems) -> bool:
    """Checks that a layout has a tensor's dims, matching pieces, and all ranks.

    Args:
        layout: the layout.
        meta: the tensor.
        world_size: number of ranks.
        what: its name in messages.
        problems: collects what is wrong.
    """
    if layout.dims is None or layout.ndim != len(meta.shape):
        count = 0 if layout.dims is None else layout.ndim
        problems.add(f"{what}: the layout has {count} entries for a tensor {list(meta.shape)}; give {len(meta.shape)}")
        return False
    if layout.mesh.size != world_size or sorted(layout.mesh.ranks) != list(range(world_size)):
        problems.add(f"{what}: the mesh {layout.mesh} does not have the ranks 0..{world_size - 1}; give it all of them")
        return False
    try:
        for dim, size in enumerate(meta.shape):
            layout.pieces(dim, size)
    except LayoutError as error:
        problems.add(f"{what}: {error}")
        return False
    return True
