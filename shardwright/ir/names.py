"""Names of operators as plan files and explanations spell them."""

from __future__ import annotations

from shardwright.base.text import pattern
from shardwright.ir.graph import Graph, Node
from shardwright.ir.operator import TensorMeta


def operator_keys(graph: Graph) -> dict[str, str]:
    """Maps every node to how files call its operator: ``layers.0.query/aten.linear``, the second one there with ``#2``.

    >>> import torch
    >>> from shardwright.ir.operator import Operator
    >>> add = Operator(torch.ops.aten.add.Tensor, (), {}, (), ())
    >>> nodes = tuple(Node(name, add, (), (), "block") for name in ("add", "add_1"))
    >>> operator_keys(Graph((), nodes, ()))
    {'add': 'block/aten.add', 'add_1': 'block/aten.add#2'}
    """
    counts: dict[str, int] = {}
    keys = {}
    for node in graph.nodes:
        stem = f"{node.module}/{node.op.name}" if node.module else node.op.name
        counts[stem] = counts.get(stem, 0) + 1
        keys[node.name] = stem if counts[stem] == 1 else f"{stem}#{counts[stem]}"
    return keys


def key_pattern(key: str) -> str:
    """Replaces the numbers of layers in an operator's key by ``*``.

    >>> key_pattern("layers.0.query/aten.linear#2")
    'layers.*.query/aten.linear#2'
    """
    module, slash, rest = key.rpartition("/")
    return f"{pattern(module)}{slash}{rest}"


def shapes_text(node: Node) -> str:
    """Returns the shapes of an operator's inputs and outputs: ``8x64 16x64 -> 8x16``."""
    left, right = (" ".join(map(_shape_text, metas)) for metas in (node.op.inputs, node.op.outputs))
    return f"{left} -> {right}".strip()


def _shape_text(meta: TensorMeta) -> str:
    return "x".join(map(str, meta.shape)) or "()"


# The note of a plan that comes from a file; the path follows.
LOADED = "as saved in "
