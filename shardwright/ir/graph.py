"""Graph: an operator-level program on global tensors, captured from a callable.

Invariants: no value changes after it is made (in-place operators have been rewritten); nodes are in the order they run; the
outputs and the buffer updates are values of the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from shardwright.ir.marks import Mark
from shardwright.ir.operator import Operator, TensorMeta


@dataclass(frozen=True)
class GraphInput:
    """One tensor that enters a graph: ``kind`` is ``parameter``, ``buffer``, ``constant`` or ``input``.

    ``target`` is the qualified name of a parameter, buffer or constant, or the position among the flat user inputs.
    ``is_made_to_require`` tells whether the callable itself calls ``requires_grad_`` of an input.
    """

    value: str
    kind: str
    target: str | int
    meta: TensorMeta
    requires_grad: bool = False
    is_made_to_require: bool = False


@dataclass(frozen=True)
class Node:
    """One operator call. ``inputs`` and ``outputs`` name values; see :class:`Operator` for the arguments.

    ``mark`` is the user's request for this operator, ``region`` the marked function or module that contains it.
    ``mark_positions[i]`` is the position of the operator's ``i``-th input among the ``mark_count`` tensors that the user passed
    to the marked function. ``recompute`` is whether the user wants its result computed again in the backward pass; ``None`` if
    the user did not say. ``calls`` has path and call number of each module around it that is called more than once; first
    calls are left out.

    ``copy`` is the group of copies and the number within it, if the operator runs for one of several copies of a batch.
    ``carries_batch``: the user says that dim 0 of its outputs is the batch, or a copy's part of it.
    """

    name: str
    op: Operator
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    module: str = ""
    source: str = ""
    mark: Mark | None = None
    mark_positions: tuple[int | None, ...] = ()
    mark_count: int = 0
    region: Mark | None = None
    autocast: tuple[Any, ...] | None = None
    grad: bool = True
    recompute: bool | None = None
    copy: tuple[int, int] | None = None
    carries_batch: bool = False
    calls: tuple[tuple[str, int], ...] = ()

    @property
    def where(self) -> str:
        """The operator as the user would name it: its mark's name or module path, operator and source line."""
        name = (self.mark.name if self.mark and self.mark.name else "") or self.module
        text = f"{name} ({self.op.name})" if name else self.op.name
        return f"{text} at {self.source}" if self.source else text


@dataclass(frozen=True)
class Graph:
    """One operator-level program on global tensors.

    Args:
        inputs: the tensors that enter.
        nodes: the operator calls, in the order they run.
        outputs: the flat outputs: value names, or constants wrapped in :class:`Constant`.
        updates: ``(buffer name, value)`` pairs: buffers that the program leaves changed.
        assignments: attributes of modules that the callable assigns in every call. Where tensors are among them, the result
            of the graph is a pair: what the callable returns, and those tensors in their order.
        numbers: constants that are computed anew in every call, of numbers that the callable reads: formula and dtype.
        impossible_marks: errors in strategies of modules and functions that do not depend on the devices.
        hidden: how many of the last outputs callers do not get: tensors that attributes are assigned or Python decides by.
        read_later: outputs that a program returns as they are split, to be made whole when they are read.
    """

    inputs: tuple[GraphInput, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Any, ...]
    updates: tuple[tuple[str, str], ...] = ()
    out_spec: Any = None
    constants: dict[str, Any] = field(default_factory=dict, compare=False)
    metas: dict[str, TensorMeta] = field(default_factory=dict, compare=False)
    needs_grad: frozenset[str] = frozenset()
    assignments: tuple[Any, ...] = field(default=(), compare=False)
    impossible_marks: tuple[str, ...] = field(default=(), compare=False)
    numbers: dict[str, tuple[Any, Any]] = field(default_factory=dict, compare=False)
    hidden: int = 0
    read_later: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for graph_input in self.inputs:
            self.metas[graph_input.value] = graph_input.meta
        for node in self.nodes:
            self.metas.update(zip(node.outputs, node.op.outputs, strict=True))
        object.__setattr__(self, "needs_grad", frozenset(NeedsGradient().of(self.inputs, self.nodes)))

    @property
    def made_whole(self) -> list[str]:
        """Values that a program makes whole on every rank: outputs, except those that are read later, and updates."""
        names = [o for o in self.outputs if isinstance(o, str) and o not in self.read_later]
        return [*names, *(value for _, value in self.updates)]

    def __str__(self) -> str:
        lines = [f"{i.value}: {i.kind} {i.target} {list(i.meta.shape)}" for i in self.inputs]
        for node in self.nodes:
            args = ", ".join([*(repr(a) for a in node.op.args), *(f"{k}={v!r}" for k, v in node.op.kwargs.items())])
            for i, value in reversed(list(enumerate(node.inputs))):
                args = args.replace(f"${i}", value)
            shapes = " ".join(str(list(m.shape)) for m in node.op.outputs)
            lines.append(f"{', '.join(node.outputs)} = {node.op.name}({args})  # {shapes} {node.module}".rstrip())
        lines.append(f"return {', '.join(str(o) for o in self.outputs)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Constant:
    """An output of the captured callable that is not a tensor."""

    value: Any

    def __str__(self) -> str:
        return repr(self.value)


class NeedsGradient:
    """Finds the values that a gradient flows back through. Inputs and nodes may be added between calls."""

    def __init__(self) -> None:
        self.values: set[str] = set()
        self.inputs = self.nodes = 0  # numbers of those seen so far

    def of(self, inputs: Sequence[GraphInput], nodes: Sequence[Node]) -> set[str]:
        """Returns the values that need a gradient, given all inputs and nodes so far."""
        self.values.update(i.value for i in inputs[self.inputs :] if i.requires_grad)
        for node in nodes[self.nodes :]:
            if not node.grad or not node.op.has_gradient:
                continue
            if any(value in self.values for value in node.inputs):
                self.values.update(v for v, meta in zip(node.outputs, node.op.outputs, strict=True) if meta.differentiable)
        self.inputs, self.nodes = len(inputs), len(nodes)
        return self.values


def is_configured(node: Node) -> bool:
    """Tells whether the user gave an operator a strategy, or pinned a layout there."""
    return node.mark is not None and node.mark.in_strategy is not None


def where_of(node: Node) -> str:
    """Describes an operator for the user, with the line where it runs. Without one, its strategy's line is used."""
    mark = node.mark or node.region
    if mark is None:
        return node.where
    name = f"{node.module}.{mark.name}" if node.module else mark.name
    line = node.source or mark.source
    return f"{name} ({node.op.name})" + (f" at {line}" if line else "")
