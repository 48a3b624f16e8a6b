"""Names: readable, unique names for the values and nodes of a graph."""

from __future__ import annotations

import keyword
from dataclasses import replace
from typing import Any

from shardwright.ir.graph import Node
from shardwright.ir.operator import Operator


class Names:
    """Names of a graph's values. No name is given twice."""

    def __init__(self) -> None:
        self.taken: dict[str, int] = {}  # name -> how often it has been asked for

    def new(self, hint: str) -> str:
        """Returns a new name that resembles ``hint``."""
        hint = "".join(c if c.isalnum() or c == "_" else "_" for c in hint) or "v"
        if keyword.iskeyword(hint) or hint in ("torch", "many", "each") or not hint[0].isalpha():
            hint = f"v_{hint}"
        name, count = hint, self.taken.get(hint, 0)
        while name in self.taken:
            count += 1
            name = f"{hint}{'_' if hint[-1].isdigit() else ''}{count}"
        self.taken[hint] = count
        self.taken.setdefault(name, 0)
        return name


def numbered(nodes: list[Node], names: Names) -> tuple[list[Node], dict[str, str]]:
    """Renames values in the order in which they are made, without gaps for dropped operators.

    Returns:
        The nodes, and old name -> new name of every value they make.
    """
    known: dict[str, str] = {}
    result = []
    for node in nodes:
        name = names.new(hint_of(node.op))
        outputs = (name,) if len(node.outputs) == 1 else tuple(names.new(f"{name}_o{i}") for i in range(len(node.outputs)))
        known.update(zip(node.outputs, outputs))
        inputs = tuple([known.get(value, value) for value in node.inputs])
        changed = name != node.name or outputs != node.outputs or inputs != node.inputs
        result.append(replace(node, name=name, inputs=inputs, outputs=outputs) if changed else node)
    return result, known


def hint_of(op: Operator) -> str:
    """Returns the name that an operator's values are derived from."""
    target: Any = op.target
    return str(getattr(target, "overloadpacket", target).__name__).strip("_")
