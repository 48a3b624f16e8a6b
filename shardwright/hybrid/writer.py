"""Builds the local program of a per-rank user program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from shardwright.base.torch_private import pytree
from shardwright.errors import Problems
from shardwright.hybrid.capture import PerRankInput, RankGraphs
from shardwright.hybrid.functions import chosen
from shardwright.hybrid.mesh import CollectiveMesh
from shardwright.ir import rank_groups
from shardwright.ir.graph import GraphInput, Node
from shardwright.ir.instructions import PerRank, ProgramInput, Ref
from shardwright.ir.layout import Layout
from shardwright.ir.operator import TensorMeta
from shardwright.ir.redistribution import Redistribution
from shardwright.partition.builder import ProgramBuilder
from shardwright.redistribute.planner import Options
from shardwright.redistribute.steps import redistribution


class Writer:
    """Builds a local program from the graphs of each kind of rank: inputs, and instructions with their rank groups.

    Args:
        parameters: name -> whole shape, the layout in which it is stored, and the one in which the program reads it.
    """

    def __init__(self, ranks: RankGraphs, parameters: Any, inputs: Mapping[int, PerRankInput], collective_mesh: CollectiveMesh):
        self.ranks, self.graph, self.mesh, self.collective_mesh = ranks, ranks.first, collective_mesh.mesh, collective_mesh
        self.parameters, self.inputs = parameters, inputs
        self.problems = Problems()
        self.builder = ProgramBuilder(self.mesh.size, self.graph.metas)
        self.instructions, self.rank_groups = self.builder.instructions, self.builder.rank_groups
        self.same: dict[str, rank_groups.RankGroups] = {}
        self.layouts: dict[str, Layout] = {}  # of inputs, as they come and as they are read
        self.place: dict[str, str] = {}  # graph value -> local value
        self.shapes: dict[str, tuple[int, ...]] = {}  # graph input -> whole shape
        self.waiting: dict[str, tuple[Layout, Layout]] = {}  # graph input not read yet -> as stored, as read
        self.chosen: dict[Any, str] = {}  # values that each kind of rank reads -> local value
        self.everyone = tuple(range(self.mesh.size))
        self.all_axes = tuple(a for a, size in zip(self.mesh.axes, self.mesh.sizes, strict=True) if size > 1)

    # -- inputs -----------------------------------------------------------------------------------------------------------

    def input(self, graph_input: GraphInput) -> ProgramInput:
        name, shape = graph_input.value, graph_input.meta.shape
        stored = used = Layout.replicated(self.mesh, len(shape))
        if graph_input.kind == "parameter":
            shape, stored, used = self.parameters[str(graph_input.target)]
        elif graph_input.kind == "input":
            item = self.inputs[int(graph_input.target)]
            shape, stored, used = item.shape, item.given, item.used
        stored, used = stored.normal(shape), used.normal(shape)
        self.shapes[name], self.waiting[name], self.layouts[name] = shape, (stored, used), stored
        self.rank_groups[name] = self.same[name] = rank_groups.of_layout(stored)
        meta = TensorMeta(shape, graph_input.meta.dtype, (), graph_input.meta.device)
        return ProgramInput(name, graph_input.kind, graph_input.target, meta, stored)

    def read(self, value: str, reader: str) -> str:
        """Returns the local value that holds a value of the graph; the first use of an input writes its move."""
        if value not in self.place:
            stored, used = self.waiting.pop(value)
            needs_grad = value in self.graph.needs_grad
            gradient = tuple(a for a in self.all_axes if a not in used.split_axes) if needs_grad else ()
            dtype = self.graph.metas[value].dtype
            steps = redistribution(stored, used, self.shapes[value], gradient, Options(itemsize=dtype.itemsize))
            self.place[value] = value
            if not steps.is_identity:
                lanes = rank_groups.of_layout(steps.target, steps.partial_gradient)
                edge = f"{value} -> {reader}"
                self.place[value] = self.move(value, steps, dtype, reader, edge, lanes, needs_grad)
                self.same[self.place[value]] = rank_groups.of_layout(steps.target)
                self.layouts[self.place[value]] = steps.target
        return self.place[value]

    def operand(self, values: tuple[str, ...], reader: str, node: Node | None) -> tuple[str, bool]:
        """Returns the local value that each kind of rank reads, and whether it needs a gradient."""
        needs_grad = any(value in self.graph.needs_grad for value in values)
        if len(set(values)) == 1:
            return self.read(values[0], reader), needs_grad
        key = (values, node is None or node.grad)
        if key not in self.chosen:
            distinct, kind = list(dict.fromkeys(values)), self.ranks.kind
            refs = [Ref(self.read(value, reader)) for value in distinct]
            index = PerRank(lambda rank: distinct.index(values[kind[rank]]))
            self.chosen[key] = self.call_one(chosen, index, *refs, hint=distinct[0], node=node)
        return self.chosen[key], needs_grad

    # -- instructions -----------------------------------------------------------------------------------------------------

    def new_name(self, hint: str) -> str:
        number = 1
        while f"{hint}_{number}" in self.rank_groups or f"{hint}_{number}" in self.graph.metas:
            number += 1
        return f"{hint}_{number}"

    def move(
        self, source: str, steps: Redistribution, dtype: torch.dtype, cause: str, edge: str, lanes: rank_groups.RankGroups,
        needs_grad: bool, node: Node | None = None, name: str | None = None,
    ) -> str:  # fmt: skip
        """Writes a move and returns the name of its result.

        Args:
            source: the local value that moves.
            steps: its redistribution.
            dtype: of the value.
            cause: the operator that it is counted to.
            edge: the values between which it stands, for people.
            lanes: the rank groups of the result.
            needs_grad: whether the value needs a gradient.
            node: the graph node that it stands for.
            name: the name of the result; default: a new one.
        """
        name = name or self.new_name(source)
        grad, autocast = (node.grad, node.autocast) if node else (True, None)
        return self.builder.move(source, steps, dtype, edge, needs_grad, cause, grad, autocast, name, lanes)

    def call(self, function: Any, args: Any, kwargs: Any, names: tuple[str, ...], node: Node | None, sequence: bool) -> None:
        """Writes a local call.

        Args:
            function: the function to call.
            args, kwargs: its arguments, with references to local values.
            names: the names of its results.
            node: the graph node that it stands for.
            sequence: whether it returns several results.
        """
        leaves = pytree.tree_leaves((args, kwargs))
        lanes, same = self.builder.rank_groups_of(leaves), self.builder.rank_groups_of(leaves, self.same)
        self.same.update(dict.fromkeys(names, same))
        self.builder.call(function, args, kwargs, names, lanes, sequence, node=node)

    def call_one(self, function: Any, *args: Any, hint: str, node: Node | None = None) -> str:
        name = self.new_name(hint)
        self.call(function, args, {}, (name,), node, sequence=False)
        return name

    # -- looking ----------------------------------------------------------------------------------------------------------

    def positions(self, axis: str) -> list[int]:
        return [self.collective_mesh.position(axis, rank) for rank in self.everyone]

    def varies(self, name: str) -> tuple[str, ...]:
        """Returns the axes along which ranks may hold different values."""
        same = self.same[name]
        return tuple(a for a in self.all_axes if any(len({same[r] for r in g}) > 1 for g in self.mesh.groups((a,))))
