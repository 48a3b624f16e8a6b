"""Splits the backward of a micro-batch: gradients of inputs at once, those of weights later, nothing computed twice.

Every call reads a weight through a leaf of its own (:func:`with_own_readings`). So the gradient of such a leaf comes from one
place in autograd's graph: from the nodes of that call, which also hand on the gradient of the input. The first half records the
gradients that arrive at these nodes, and computes nothing for weights. The second half starts from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from shardwright.base.torch_private import pytree
from shardwright.ir.instructions import Call, ProgramInput, Ref
from shardwright.ir.program import LocalProgram


def with_own_readings(program: LocalProgram, names: Sequence[str]) -> tuple[LocalProgram, list[str]]:
    """Gives every call inputs of its own for the held values that it reads.

    Args:
        program: what a micro-batch runs.
        names: the held values.

    Returns:
        The program, with these inputs after its others, and the held value that each of them is.
    """
    held = set(names)
    inputs = {i.name: i for i in program.inputs}
    added: list[ProgramInput] = []
    readings: list[str] = []
    instructions = []
    layouts, groups = dict(program.layouts), dict(program.rank_groups)
    for number, instruction in enumerate(program.instructions):
        read = [name for name in dict.fromkeys(instruction.reads) if name in held]
        if isinstance(instruction, Call) and read and not instruction.written:
            own = {name: f"{name}_read_by_{number}" for name in read}  # moves may have made a value name_number
            for name, new in own.items():
                added.append(replace(inputs[name], name=new, kind="local"))
                groups[new] = groups[name]
                if name in layouts:
                    layouts[new] = layouts[name]
            readings += read
            args, kwargs = pytree.tree_map(lambda leaf, own=own: _renamed(leaf, own), (instruction.args, instruction.kwargs))
            instruction = replace(instruction, args=args, kwargs=kwargs)
        instructions.append(instruction)
    changed = replace(
        program, inputs=(*program.inputs, *added), instructions=tuple(instructions), layouts=layouts, rank_groups=groups
    )
    return changed, readings


def _renamed(leaf: Any, own: Mapping[str, str]) -> Any:
    return Ref(own[leaf.name]) if isinstance(leaf, Ref) and leaf.name in own else leaf


class SplitBackward:
    """The two halves of a backward.

    Args:
        outputs, gradients: what it starts from.
        inputs: the leaves whose gradients others wait for.
        weights: the leaves whose gradients nobody waits for.
    """

    def __init__(
        self, outputs: Sequence[Tensor], gradients: Sequence[Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor]
    ):
        self.outputs, self.gradients, self.inputs = list(outputs), list(gradients), list(inputs)
        graph = _Graph(self.outputs, self.inputs, weights)
        self.nodes = graph.order  # holds them: Python's objects for them are gone otherwise, and others come
        self.at_once: list[Tensor] = []  # weights whose gradient cannot be put off without computing things twice
        self.from_outputs: list[Tensor] = []
        self.from_nodes: dict[tuple[Node, ...], list[Tensor]] = {}
        for weight in weights:
            places = graph.places(weight)
            if places is None:
                self.at_once.append(weight)
            elif places:
                self.from_nodes.setdefault(places, []).append(weight)
            else:
                self.from_outputs.append(weight)
        self.arrived: dict[Node, Sequence[Tensor | None]] = {}

    def first(self) -> list[tuple[Tensor, Tensor | None]]:
        """Computes the gradients of inputs, and of the weights that cannot be put off; returns leaves with gradients."""
        wanted = [*self.inputs, *self.at_once]
        if not wanted or not self.outputs:
            return []
        nodes = {node for places in self.from_nodes for node in places}
        hooks = [node.register_prehook(lambda given, node=node: self._note(node, given)) for node in nodes]
        try:
            found = torch.autograd.grad(self.outputs, wanted, self.gradients, retain_graph=True, allow_unused=True)
        finally:
            for hook in hooks:
                hook.remove()
        if not self.from_outputs:
            self.gradients = []  # the rest starts from what has arrived
        return list(zip(wanted, found, strict=True))

    def _note(self, node: Node, given: Sequence[Tensor | None]) -> None:
        self.arrived[node] = tuple(given)

    def second(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Computes the gradients of the other weights; yields leaves with gradients."""
        if self.from_outputs and self.outputs:
            keeps = bool(self.from_nodes)
            found = torch.autograd.grad(self.outputs, self.from_outputs, self.gradients, retain_graph=keeps, allow_unused=True)
            gradients = list(found)
            del found
            yield from _one_by_one(self.from_outputs, gradients)
        for nodes, weights in self.from_nodes.items():
            edges = [
                (GradientEdge(node, at), gradient)
                for node in nodes
                for at, gradient in enumerate(self.arrived.get(node, ()))
                if gradient is not None
            ]
            if edges:
                starts, given = zip(*edges, strict=True)
                found = torch.autograd.grad(starts, weights, given, retain_graph=True, allow_unused=True)
                gradients = list(found)
                del found
                yield from _one_by_one(weights, gradients)


def _one_by_one(weights: Sequence[Tensor], gradients: list[Tensor]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yields weights with their gradients, and holds none that it has yielded."""
    for weight in reversed(weights):
        yield weight, gradients.pop()


class _Graph:
    """The nodes of autograd that a backward passes, each after those that it hands gradients to."""

    def __init__(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor]):
        self.order: list[Node] = []
        self.parents: dict[Node, list[Node]] = {}
        self.ends = {get_gradient_edge(leaf).node for leaf in inputs}
        self.roots = {get_gradient_edge(tensor).node for tensor in outputs}
        self.leaves = {weight: get_gradient_edge(weight).node for weight in weights}
        self._walk()
        self.number = {node: at for at, node in enumerate(self.order)}
        self.to_inputs = set(self.ends)
        for node in self.order:
            if any(after in self.to_inputs for after in _following(node)):
                self.to_inputs.add(node)

    def _walk(self) -> None:
        seen: set[Node] = set()
        waiting = [(root, iter(_following(root))) for root in self.roots]
        for root, following in waiting:
            if root in seen:
                continue
            seen.add(root)
            stack = [(root, following)]
            while stack:
                node, rest = stack[-1]
                after = next(rest, None)
                if after is None:
                    self.order.append(node)
                    stack.pop()
                    continue
                self.parents.setdefault(after, []).append(node)
                if after not in seen:
                    seen.add(after)
                    stack.append((after, iter(_following(after))))

    def places(self, weight: Tensor) -> tuple[Node, ...] | None:
        """Returns the nodes from which a weight's gradient comes alone; none: from the outputs; ``None``: it cannot."""
        found: set[Node] = set()
        seen, waiting, is_output = {self.leaves[weight]}, [self.leaves[weight]], False
        while waiting:
            node = waiting.pop()
            is_output |= node in self.roots
            for before in self.parents.get(node, ()):
                if before in self.to_inputs:
                    found.add(before)
                elif before not in seen:
                    seen.add(before)
                    waiting.append(before)
        if not found:
            return ()
        if is_output or any(_computes_all(node) for node in found) or self._follow_each_other(found):
            return None
        return tuple(sorted(found, key=self.number.__getitem__))

    def _follow_each_other(self, nodes: set[Node]) -> bool:
        if len(nodes) == 1:
            return False
        least = min(self.number[node] for node in nodes)
        waiting, seen = list(nodes), set()
        while waiting:
            for after in _following(waiting.pop()):
                if after in nodes:
                    return True
                if self.number[after] > least and after not in seen:
                    seen.add(after)
                    waiting.append(after)
        return False


def _following(node: Node) -> list[Node]:
    return [after for after, _ in node.next_functions if after is not None]


def _computes_all(node: Node) -> bool:
    """Tells whether a node computes all of its gradients whenever it computes one: those written in Python do."""
    return isinstance(node, torch.autograd.function.BackwardCFunction)
