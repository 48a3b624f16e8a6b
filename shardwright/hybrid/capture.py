"""Captures the programs of all ranks, once per kind of rank, and compares them.

Ranks are of one kind where their tensors have the same shapes and their questions about their position the same answers.
All ranks must run the same operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.base.torch_private import pytree
from shardwright.capture.capture import capture
from shardwright.errors import CaptureError, StrategyError
from shardwright.hybrid.mesh import CollectiveMesh, tracing
from shardwright.hybrid.owned_slice import owned_slice_of, slice_shape
from shardwright.ir.graph import Constant, Graph, Node
from shardwright.ir.instructions import PerRank
from shardwright.ir.layout import Layout


@dataclass(frozen=True)
class PerRankInput:
    """A tensor input: its global shape, the layout in which ranks give it, and the one that their programs read."""

    shape: tuple[int, ...]
    given: Layout
    used: Layout


@dataclass(frozen=True)
class RankGraphs:
    """Graphs of all ranks: ``graphs[kind[rank]]``. All have the same operators."""

    graphs: tuple[Graph, ...]
    kind: tuple[int, ...]

    @property
    def first(self) -> Graph:
        return self.graphs[0]

    def of(self, rank: int) -> Graph:
        return self.graphs[self.kind[rank]]

    def shapes(self, choose: Callable[[Graph], str]) -> tuple[tuple[int, ...], ...]:
        """Returns the local shape of a value on every rank; ``choose`` picks the value in each graph."""
        found = [graph.metas[choose(graph)].shape for graph in self.graphs]
        return tuple(found[kind] for kind in self.kind)

    def merged(self, choose: Callable[[Graph], Any]) -> Any:
        """Merges a part of all graphs, such as the arguments of a call; what differs becomes a :class:`PerRank`."""
        found = [pytree.tree_flatten(choose(graph)) for graph in self.graphs]
        leaves = [self._leaf(values) for values in zip(*(leaves for leaves, _ in found), strict=True)]
        return pytree.tree_unflatten(leaves, found[0][1])

    def _leaf(self, values: Sequence[Any]) -> Any:
        if all(_same(values[0], value) for value in values[1:]):
            return values[0]
        return PerRank(lambda rank: values[self.kind[rank]])


def capture_ranks(
    root: nn.Module,
    leaves: Sequence[Any],
    spec: Any,
    inputs: Mapping[int, PerRankInput],
    collective_mesh: CollectiveMesh,
    device: torch.device,
) -> RankGraphs:
    """Captures the program of every rank.

    Args:
        root: the module that owns the parameters.
        leaves, spec: the flat inputs and their tree.
        inputs: position among the leaves -> the tensor input at it.
        collective_mesh: the mesh of the user's collectives.
        device: where the program runs.

    Raises:
        CaptureError: a program that a graph cannot hold, or ranks with programs of other operators.
    """
    owned = {name: told for name, p in root.named_parameters() if (told := owned_slice_of(p))}

    def shapes_on(rank: int) -> Any:
        local_shapes = tuple(h.used.local_shape(h.shape, rank) for h in inputs.values())
        return local_shapes, tuple(slice_shape(told, rank) for told in owned.values())

    asked: set[str] = set()
    while True:
        graphs: dict[Any, tuple[int, Graph]] = {}
        known, kind = frozenset(asked), []
        for rank in range(collective_mesh.mesh.size):
            key = (shapes_on(rank), tuple(collective_mesh.position(axis, rank) for axis in sorted(known)))
            if key not in graphs:
                with tracing(collective_mesh, rank) as now, _slices(root, rank):
                    args, kwargs = pytree.tree_unflatten(_local(leaves, inputs, rank), spec)
                    graphs[key] = (len(graphs), capture(root, args, kwargs, device))
                asked |= now.asked
            kind.append(graphs[key][0])
        if asked == known:
            break
    found = RankGraphs(tuple(graph for _, graph in graphs.values()), tuple(kind))
    for other, graph in enumerate(found.graphs):
        _check_same_program(found.first, graph, kind.index(other))
    return found


def _local(leaves: Sequence[Any], inputs: Mapping[int, PerRankInput], rank: int) -> list[Any]:
    """Returns the inputs of one rank's program, as tensors without values."""
    result = list(leaves)
    for position, item in inputs.items():
        leaf: Tensor = leaves[position]
        shape = item.used.local_shape(item.shape, rank)
        result[position] = torch.empty(shape, dtype=leaf.dtype, device="meta").requires_grad_(leaf.requires_grad)
    return result


@contextmanager
def _slices(root: nn.Module, rank: int) -> Iterator[None]:
    """Gives owned parameters, within the block, the shape of a rank's slice, without values."""
    changed: list[tuple[dict[str, Any], str, Any]] = []
    made: dict[int, nn.Parameter] = {}
    try:
        for module in root.modules():
            for name, parameter in module._parameters.items():
                told = owned_slice_of(parameter)
                if parameter is None or told is None:
                    continue
                if id(parameter) not in made:
                    empty = torch.empty(slice_shape(told, rank), dtype=parameter.dtype, device="meta")
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                changed.append((module._parameters, name, parameter))
                module._parameters[name] = made[id(parameter)]
        yield
    finally:
        for table, name, parameter in changed:
            table[name] = parameter


# -- one program ---------------------------------------------------------------------------------------------------------


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and repr(a) == repr(b)


def _check_same_program(first: Graph, other: Graph, rank: int) -> None:
    """Refuses ranks that run other operators: their collectives would wait for each other."""
    for a, b in zip(first.nodes, other.nodes):
        if _outline(a) != _outline(b):
            raise CaptureError(
                f"the ranks run different programs: rank 0 {a.where}, rank {rank} {b.where}; call the same operators on all "
                "ranks, and let rank() decide on numbers only, as in x.narrow(0, rank() * n, n)"
            )
    if len(first.nodes) != len(other.nodes) or [i.value for i in first.inputs] != [i.value for i in other.inputs]:
        raise CaptureError(
            f"the ranks run different programs: {len(first.nodes)} operators on rank 0, {len(other.nodes)} on rank {rank}; "
            "call the same operators on all ranks"
        )
    if first.updates != other.updates:
        raise CaptureError(f"rank 0 and rank {rank} leave other values in buffers: change them alike on all ranks")
    for position, (a, b) in enumerate(zip(first.outputs, other.outputs, strict=True)):
        if isinstance(a, Constant) != isinstance(b, Constant) or (isinstance(a, Constant) and not _same(a.value, b.value)):
            raise StrategyError(
                f"output {position} is {a} on rank 0 and {b} on rank {rank}: the result of a call is one value on all ranks; "
                "leave it out, or return a tensor"
            )
    for name, value in first.constants.items():
        if isinstance(value, Tensor) and not torch.equal(value, other.constants[name]):
            raise CaptureError(
                f"a constant tensor is {value} on rank 0 and {other.constants[name]} on rank {rank}: make it by an operator "
                "that takes the number, torch.full((), rank()) in place of torch.tensor(rank())"
            )


def _outline(node: Node) -> Any:
    """Returns what must be the same on all ranks: everything but numbers and the choice of which value is read."""
    spec = pytree.tree_structure((node.op.args, node.op.kwargs))
    return node.op.target, spec, len(node.inputs), node.outputs, node.autocast, node.grad
