"""Writes the instructions of a local program.

Everything that makes local programs uses a :class:`ProgramBuilder`: the partitioner, for all ranks or for the first one
alone, and ``hybrid/``, which joins per-rank programs of users. :class:`NodeBuilder` receives the lowering of one operator.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import replace
from typing import Any

import torch

from shardwright.base.torch_private import pytree
from shardwright.ir import rank_groups
from shardwright.ir.choice import Choice
from shardwright.ir.graph import Graph, Node
from shardwright.ir.instructions import Autocast, Call, Instruction, Move, PerRank, Ref
from shardwright.ir.largest_piece import local_shape as first_shape
from shardwright.ir.layout import Layout
from shardwright.ir.operator import Slot, TensorMeta
from shardwright.ir.redistribution import Redistribution
from shardwright.ir.signature import Signature
from shardwright.redistribute.planner import Options
from shardwright.redistribute.steps import redistribution
from shardwright.rules.traits import traits_of


class ProgramBuilder:
    """Collects instructions and, for each local value, its rank groups and its layout.

    Args:
        size: number of ranks.
        taken: names that no local value may get.
        first_rank_only: whether the program is made for the first rank only, without looking at the others: then values have
            no rank groups, and arguments are those of the first rank.
    """

    def __init__(self, size: int, taken: Container[str], first_rank_only: bool = False):
        self.size, self.taken, self.first_rank_only = size, taken, first_rank_only
        self.instructions: list[Instruction] = []
        self.rank_groups: dict[str, rank_groups.RankGroups] = {}
        self.layouts: dict[str, Layout] = {}
        self._count = 0

    def new_name(self, hint: str) -> str:
        """Returns a name that no value has yet."""
        while True:
            self._count += 1
            name = f"{hint}_{self._count}"
            if name not in self.rank_groups and name not in self.taken:
                return name

    def rank_groups_of(
        self, leaves: list[Any], lanes: dict[str, rank_groups.RankGroups] | None = None
    ) -> rank_groups.RankGroups:
        """Returns the rank groups of a call with these arguments: ranks with the same arguments compute the same.

        Args:
            leaves: the arguments.
            lanes: the rank groups of the values that it reads; default: those of this builder.
        """
        if self.first_rank_only:
            return ()
        lanes = self.rank_groups if lanes is None else lanes
        known = [lanes[leaf.name] for leaf in leaves if isinstance(leaf, Ref)]
        known += [
            rank_groups.number([_hashable(leaf.of(rank)) for rank in range(self.size)])
            for leaf in leaves
            if isinstance(leaf, PerRank)
        ]
        return rank_groups.join(*known) if known else (0,) * self.size

    def rank_groups_of_layout(self, layout: Layout, partial: tuple[str, ...] = ()) -> rank_groups.RankGroups:
        """Returns the rank groups of a value in a layout. Partial gradients along ``partial`` are kept apart."""
        return () if self.first_rank_only else rank_groups.of_layout(layout, partial)

    def call(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        names: tuple[str, ...],
        lanes: rank_groups.RankGroups,
        sequence: bool = False,
        cause: str = "return",
        node: Node | None = None,
    ) -> tuple[Ref, ...]:
        """Writes a local call.

        Args:
            function: the function to call.
            args, kwargs: its arguments, with references to local values.
            names: the names of its results.
            lanes: the rank groups of its results.
            sequence: whether it returns several.
            cause, node: the graph node that it stands for; without one, no autocast and with gradients.
        """
        cause, autocast, grad = (node.name, node.autocast, node.grad) if node else (cause, None, True)
        for name in names:
            self.rank_groups[name] = lanes
        self.instructions.append(Call(function, args, kwargs, names, sequence, cause, lanes, autocast, grad))
        return tuple(map(Ref, names))

    def move(
        self,
        source: str,
        steps: Redistribution,
        dtype: torch.dtype,
        edge: str,
        needs_grad: bool,
        cause: str | None = None,
        grad: bool = True,
        autocast: Autocast = None,
        name: str | None = None,
        lanes: rank_groups.RankGroups | None = None,
    ) -> str:
        """Writes a move and returns the name of its result.

        Args:
            source: the local value that moves.
            steps: its redistribution.
            dtype: of the value.
            edge: the values between which it stands, for people.
            needs_grad: whether the value needs a gradient.
            cause: the operator that it is counted to.
            grad: whether its reader computes gradients.
            autocast: the autocast to run it under.
            name, lanes: of the result; default: a new name, and the rank groups of the target layout.
        """
        name = name or self.new_name(source.rstrip("0123456789").rstrip("_") or source)
        if lanes is None:
            lanes = self.rank_groups_of_layout(steps.target, steps.partial_gradient)
        self.instructions.append(Move(source, name, steps, dtype, cause or edge, edge, lanes, needs_grad, grad, autocast))
        self.rank_groups[name], self.layouts[name] = lanes, steps.target
        return name


class Moves:
    """Plans moves for a builder, each dtype with the options that fit it.

    Args:
        options: which steps redistributions may use and their costs; the item size is that of each tensor.
        parameters: names of values that are parameters: their moves share messages with others, so only bytes count.
    """

    def __init__(self, builder: ProgramBuilder, options: Options, parameters: Container[str]):
        self.builder, self.parameters = builder, parameters
        self._options = {(options.itemsize, False): options}

    def options_for(self, dtype: torch.dtype, of_parameter: bool = False) -> Options:
        """Returns the steps that a move may use, and their costs."""
        key = (dtype.itemsize, of_parameter)
        if key not in self._options:
            options = next(iter(self._options.values()))
            links = options.links
            if of_parameter:
                axes = tuple((axis, 0.0, bandwidth) for axis, _, bandwidth in links.axes)
                links = replace(links, launch=0.0, latency=0.0, axes=axes)
            self._options[key] = replace(options, links=links, itemsize=key[0])
        return self._options[key]

    def emit(
        self,
        source: str,
        shape: tuple[int, ...],
        before: Layout,
        after: Layout,
        gradient: tuple[str, ...],
        dtype: torch.dtype,
        edge: str,
        node: Node | None,
        needs_grad: bool = True,
        with_gradient: bool = False,
    ) -> str:
        """Writes the move between two layouts; returns the name of its result, or the source where nothing moves.

        Args:
            source: the local value that moves.
            shape: global shape.
            before, after: the layouts.
            gradient: axes over which the gradient at the target is partial.
            dtype: of the value.
            edge: the values between which it stands, for people.
            node: the operator that reads the result.
            needs_grad: whether the value needs a gradient.
            with_gradient: whether another reader computes gradients.
        """
        steps = redistribution(before, after, shape, gradient, self.options_for(dtype, source in self.parameters))
        if steps.is_identity:
            return source
        takes = with_gradient or node is None or node.grad
        cause = node.name if node else edge
        return self.builder.move(source, steps, dtype, edge, needs_grad, cause, takes, _autocast_of_move(node, dtype))


def _autocast_of_move(node: Node | None, dtype: torch.dtype) -> Autocast:
    """Returns the autocast of the operators around a move, so that they share a block.

    It is off where autocast cannot concatenate the dtype.
    """
    autocast = node.autocast if node else None
    if autocast is None or (dtype.is_floating_point and dtype not in (torch.float32, torch.float64, autocast[1])):
        return None
    return autocast


class NodeBuilder:
    """Receives the lowering of one operator; see :class:`shardwright.rules.lowering.Local`."""

    def __init__(self, moves: Moves, graph: Graph, node: Node, choice: Choice, signature: Signature, inputs: tuple[Ref, ...]):
        self.moves, self.builder, self.graph = moves, moves.builder, graph
        self.node, self.choice = node, choice
        self.op, self.signature, self.mesh, self.split = node.op, signature, choice.mesh, choice.split
        self.inputs, self.input_layouts = inputs, choice.inputs
        self.output_layouts, self.settled_layouts = choice.computed, choice.outputs
        # local values that a gradient flows back through: inputs, and results of calls and moves of them
        self.differentiated = {
            ref.name
            for ref, value, meta in zip(inputs, node.inputs, node.op.inputs, strict=True)
            if meta.differentiable and value in graph.needs_grad and graph.needs_grad.intersection(node.outputs)
        }

    # -- emitting -------------------------------------------------------------------------------------------------

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Ref:
        return self._emit(function, args, kwargs, 1, sequence=False)[0]

    def call_many(self, count: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Ref, ...]:
        return self._emit(function, args, kwargs, count, sequence=True)

    def same_call(self, **changes: Any) -> tuple[Ref, ...]:
        def local(leaf: Any) -> Any:
            return self.inputs[leaf.index] if isinstance(leaf, Slot) else leaf

        args, kwargs = pytree.tree_map(local, (list(self.op.args), dict(self.op.kwargs)))
        schema = getattr(self.op.target, "_schema", None)
        for name, value in changes.items():
            position = next((i for i, a in enumerate(schema.arguments) if a.name == name), None) if schema else None
            if position is not None and position < len(args):
                args[position] = value
            else:
                kwargs[name] = value
        return self._emit(self.op.target, tuple(args), kwargs, len(self.op.outputs), self.op.returns_sequence)

    def _emit(self, function: Callable[..., Any], args: Any, kwargs: Any, count: int, sequence: bool) -> tuple[Ref, ...]:
        leaves = pytree.tree_leaves((args, kwargs))
        lanes = self.builder.rank_groups_of(leaves)
        flows = self._check_gradients(function, leaves, lanes)
        hint = self.node.outputs[0] if self.node.outputs else self.node.name
        names = []
        for _ in range(count):
            is_free = count == 1 and hint not in self.builder.rank_groups
            names.append(hint if is_free else self.builder.new_name(hint))
        if flows:
            same = function is self.op.target and count == len(self.op.outputs)
            self.differentiated.update(n for i, n in enumerate(names) if not same or self.op.outputs[i].differentiable)
        return self.builder.call(function, args, kwargs, tuple(names), lanes, sequence, node=self.node)

    def _check_gradients(self, function: Callable[..., Any], leaves: list[Any], lanes: rank_groups.RankGroups) -> bool:
        """Refuses rank groups that share a value but make different parts of its gradient.

        The reduction of that gradient would be missing.

        Returns:
            Whether a gradient flows back through the call, to what the node reads or to a value made from that.
        """
        if not self.node.grad or not traits_of(function).has_gradient:
            return False
        read = {leaf.name for leaf in leaves if isinstance(leaf, Ref)} & self.differentiated
        if not self.builder.first_rank_only:
            for name in sorted(read):
                assert self.builder.rank_groups[name] == lanes, (
                    f"{self.node.where}: {name} is shared along axes where the operator's work differs"
                )
        return bool(read)

    def move(
        self,
        value: Ref,
        shape: tuple[int, ...],
        source: Layout,
        target: Layout,
        partial_gradient: tuple[str, ...] = (),
        dtype: Any = None,
    ) -> Ref:
        edge = f"within {self.node.name}"
        dtype = dtype or torch.float32
        name = self.moves.emit(value.name, shape, source, target, partial_gradient, dtype, edge, self.node)
        return self._moved(value, name)

    def _moved(self, value: Ref, name: str) -> Ref:
        if value.name in self.differentiated:
            self.differentiated.add(name)
        return Ref(name)

    def settle(self, value: Ref, index: int = 0) -> Ref:
        meta, edge = self.op.outputs[index], f"{self.node.name} -> out"
        computed, settled = self.output_layouts[index], self.settled_layouts[index]
        name = self.moves.emit(value.name, meta.shape, computed, settled, (), meta.dtype, edge, self.node)
        return self._moved(value, name)

    # -- reading --------------------------------------------------------------------------------------------------

    def axes_of(self, factor: str) -> tuple[str, ...]:
        return self.split[factor][0] if factor in self.split else ()

    def _meta_and_layout(self, tensor_is_output: bool, index: int) -> tuple[TensorMeta, Layout]:
        meta = (self.op.outputs if tensor_is_output else self.op.inputs)[index]
        return meta, (self.output_layouts if tensor_is_output else self.input_layouts)[index]

    def local_size(self, tensor_is_output: bool, index: int, dim: int) -> PerRank | int:
        meta, layout = self._meta_and_layout(tensor_is_output, index)
        if self.builder.first_rank_only:
            return first_shape(layout, meta.shape)[dim]
        bounds = layout.bounds(meta.shape)
        sizes = {b[dim][1] - b[dim][0] for b in bounds.values()}
        if len(sizes) == 1:
            return sizes.pop()
        return PerRank(lambda rank: bounds[rank][dim][1] - bounds[rank][dim][0])

    def local_shape(self, tensor_is_output: bool, index: int) -> list[PerRank | int]:
        meta, _ = self._meta_and_layout(tensor_is_output, index)
        return [self.local_size(tensor_is_output, index, dim) for dim in range(len(meta.shape))]

    def offset(self, tensor_is_output: bool, index: int, dim: int) -> PerRank:
        if self.builder.first_rank_only:
            return PerRank(lambda rank: 0)
        meta, layout = self._meta_and_layout(tensor_is_output, index)
        bounds = layout.bounds(meta.shape)
        return PerRank(lambda rank: bounds[rank][dim][0])


def _hashable(value: Any) -> Any:
    return value if isinstance(value, (int, float, bool, str, type(None))) else repr(value)
