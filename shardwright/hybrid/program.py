"""Makes one local program of the user's per-rank programs with their collectives.

What the user wrote stays: every operator is a local call, every collective a move. Added is what makes the ranks one model:

- each rank's share of the inputs and of its parameters is cut out where the world holds the whole;
- the gradient of a parameter is summed over all ranks that hold the same part of it;
- a scalar result is the weighted sum of the ranks' scalars, ``loss = sum of weight(rank) * loss(rank)``. All gradients are
  those of that number, so that no gradient has to be scaled. By default the weights are the ranks' shares of the batch: the
  mean over the whole batch, if every rank's loss is the mean over its part;
- other results are joined along dim 0 over the data axes.

Invariants:

- On every rank, a value that needs a gradient has a rank group of its own: its gradient is summed over ranks once, at the
  parameter.
- ``same`` says, for every local value, which ranks provably hold the same; results may differ along data axes only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from shardwright.base.operators import STATISTICS
from shardwright.base.torch_private import pytree
from shardwright.hybrid.call import collective_of, operator
from shardwright.hybrid.capture import PerRankInput, RankGraphs
from shardwright.hybrid.functions import copy_for, drawn, next_seed, scaled_value, shared
from shardwright.hybrid.mesh import CollectiveMesh
from shardwright.hybrid.steps import Collective, kept, laid_out, plan, receivers
from shardwright.hybrid.writer import Writer
from shardwright.ir import rank_groups
from shardwright.ir.graph import Constant, Node
from shardwright.ir.instructions import PerRank, Ref
from shardwright.ir.layout import Layout
from shardwright.ir.operator import Slot, TensorMeta
from shardwright.ir.program import LocalProgram
from shardwright.redistribute.planner import Options
from shardwright.redistribute.steps import redistribution


def local_program(
    ranks: RankGraphs, parameters: Mapping[str, tuple[tuple[int, ...], Layout, Layout]], inputs: Mapping[int, PerRankInput],
    collective_mesh: CollectiveMesh, mean: bool = True,
) -> LocalProgram:  # fmt: skip
    """Makes the local program of a per-rank user program; its moves are not scheduled yet.

    Args:
        ranks: the captured graphs.
        parameters: name -> whole shape, the layout in which it is stored, and the one in which the program reads it.
        inputs: position -> tensor input.
        collective_mesh: the mesh of the user's collectives.
        mean: whether a scalar is averaged over the data axes, or summed.

    Raises:
        StrategyError: a result that is not one value, a collective of tensors of several shapes, and the like.
    """
    writer = _Program(ranks, parameters, inputs, collective_mesh, mean)
    program = writer.run()
    writer.problems.raise_if_any("the program of a rank cannot be run on all")
    return program


class _Program(Writer):
    def __init__(
        self,
        ranks: RankGraphs,
        parameters: Any,
        inputs: Mapping[int, PerRankInput],
        collective_mesh: CollectiveMesh,
        mean: bool,
    ):
        super().__init__(ranks, parameters, inputs, collective_mesh)
        self.mean = mean
        self.statistics: dict[str, str] = {}  # buffer -> its copy on each rank, that an operator changes

    def run(self) -> LocalProgram:
        inputs = tuple(self.input(i) for i in self.graph.inputs)
        for at, node in enumerate(self.graph.nodes):
            self._node(at, node)
        each = enumerate(zip(*(graph.outputs for graph in self.ranks.graphs), strict=True))
        outputs = tuple(self._output(values, f"output {i}") for i, values in each)
        updates = self._updates()
        return LocalProgram(self.mesh.size, inputs, tuple(self.instructions), outputs, updates, self.rank_groups, self.layouts)

    # -- operators --------------------------------------------------------------------------------------------------------

    def _node(self, at: int, node: Node) -> None:
        if node.op.target is operator():
            self._collective(at, node)
            return
        if node.op.moves_statistics:
            self._copy_statistics(node)
        each = zip(*(graph.nodes[at].inputs for graph in self.ranks.graphs), strict=True)
        refs = [Ref(self.operand(values, node.name, node)[0]) for values in each]

        def local(leaf: Any) -> Any:
            return refs[leaf.index] if isinstance(leaf, Slot) else leaf

        merged = self.ranks.merged(lambda graph: (graph.nodes[at].op.args, graph.nodes[at].op.kwargs))
        args, kwargs = pytree.tree_map(local, merged)
        function: Any = node.op.target
        if node.op.draws:
            args = (node.op.target, *self._seed(node, refs), *args)
            function = drawn
        self.call(function, tuple(args), dict(kwargs), node.outputs, node, node.op.returns_sequence)
        self.place.update({value: value for value in node.outputs})

    def _seed(self, node: Node, refs: list[Ref]) -> tuple[Ref, PerRank]:
        """Returns the seed and stream of each rank: ranks that hold the same draw the same numbers, others do not."""
        seed = self.call_one(next_seed, hint="seed", node=node)
        stream = rank_groups.join((0,) * self.mesh.size, *(self.same[ref.name] for ref in refs))
        return Ref(seed), PerRank(lambda rank: stream[rank])

    def _copy_statistics(self, node: Node) -> None:
        """Copies, for every rank, the running statistics that an operator changes in place."""
        for argument in STATISTICS:
            slot = node.op.argument(argument)
            value = node.inputs[slot.index] if isinstance(slot, Slot) else None
            if value is not None and value not in self.statistics:
                here = self.read(value, node.name)
                copy = self.call_one(copy_for, Ref(here), PerRank(lambda rank: rank), hint=value, node=node)
                self.place[value] = self.statistics[value] = copy

    def _collective(self, at: int, node: Node) -> None:
        calls = {collective_of(graph.nodes[at].op.args): None for graph in self.ranks.graphs}
        collective, result = next(iter(calls)), node.outputs[0]
        name, needs_grad = self.operand(tuple(graph.nodes[at].inputs[0] for graph in self.ranks.graphs), node.name, node)
        shapes = self.ranks.shapes(lambda graph: graph.nodes[at].inputs[0])
        groups = self.mesh.groups((collective.axis,))
        if len(calls) > 1 or any(len({shapes[rank] for rank in group}) > 1 for group in groups):
            listed = "; ".join(f"rank {r}: {_said(self.ranks, at, r)} of {list(shapes[r])}" for r in self.everyone[:8])
            self.problems.add(
                f"{node.where}: the ranks along {collective.axis!r} call different things: {listed}; call the same, with "
                "tensors of one shape"
            )
            self._give_up(name, result)
            return
        needs_grad = node.grad and needs_grad
        if collective.op != "sum" and needs_grad:
            self.problems.add(f"{node.where}: {collective.op} has no gradient, and its input needs one; hand in x.detach()")
        position = self.positions(collective.axis)
        if collective.kind == "broadcast":
            length = PerRank(lambda rank: collective.sent_rows(position[rank], shapes[rank][0]))
            name = self.call_one(torch.narrow, Ref(name), 0, 0, length, hint=name, node=node)
        receives = [collective.receives(position[rank]) for rank in self.everyone]
        steps, dtype = plan(collective, self.mesh, shapes), self.graph.metas[result].dtype
        lanes = self.everyone if needs_grad else self._after(collective, self.rank_groups[name])
        edge = f"{collective} at {node.source.partition(': ')[0]}"
        target = self.move(name, steps, dtype, collective.kind, edge, lanes, needs_grad, node, self.new_name(collective.kind))
        self.same[target] = self._after(collective, self.same[name])
        if not all(receives):
            target = self.call_one(kept, Ref(target), PerRank(lambda rank: receives[rank]), hint=collective.kind, node=node)
        self.place[result] = target

    def _give_up(self, name: str, result: str) -> None:
        """Replaces a result after a problem, so that other problems can be found."""
        self.rank_groups[result], self.same[result] = self.rank_groups[name], self.same[name]
        self.place[result] = result

    def _after(self, collective: Collective, before: rank_groups.RankGroups) -> rank_groups.RankGroups:
        """Computes which ranks hold the same after a collective."""
        position = self.positions(collective.axis)
        keys: list[Any] = []
        for rank in self.everyone:
            group = self.mesh.group_of(rank, (collective.axis,))
            held = tuple(before[r] for r in group)
            if collective.kind in ("all_reduce", "all_gather"):
                keys.append(held)
            elif collective.kind == "broadcast":
                keys.append(held[collective.numbers[0]])
            elif collective.kind == "permute":
                keys.append(held[receivers(collective.numbers).index(position[rank])])
            else:
                keys.append((held, position[rank]))
        return rank_groups.number(keys)

    # -- results ----------------------------------------------------------------------------------------------------------

    def _output(self, values: tuple[Any, ...], what: str) -> Any:
        if isinstance(values[0], Constant):
            return values[0]
        name, needs_grad = self.operand(values, "return", None)
        if self.mesh.size == 1:
            return name
        meta = self.graph.metas[values[0]]
        varies = self.varies(name)
        if not meta.shape and (meta.differentiable or not varies):
            return self._scalar(name, meta.dtype, needs_grad) if needs_grad or varies else name
        outside = [axis for axis in varies if axis not in self.collective_mesh.data]
        if outside or not meta.shape:
            self.problems.add(
                f"{what}, {list(meta.shape)} {str(meta.dtype).removeprefix('torch.')}, may differ along {_named(varies)}: a "
                "result is one value, joined along dim 0 over the data axes "
                f"({', '.join(self.collective_mesh.data) or 'none here'}); all_gather or all_reduce it in the program"
            )
            return name
        shapes = tuple(self.ranks.of(rank).metas[values[self.ranks.kind[rank]]].shape for rank in self.everyone)
        return self._joined(name, shapes, varies, meta, needs_grad)

    def _scalar(self, name: str, dtype: torch.dtype, needs_grad: bool) -> str:
        weights = self._weights()
        scaled = self.call_one(torch.mul, Ref(name), PerRank(lambda rank: weights[rank]), hint=name)
        whole = Layout.replicated(self.mesh, 0)
        steps = redistribution(whole.with_partial(self.all_axes), whole, (), (), Options(itemsize=dtype.itemsize))
        total = self.move(scaled, steps, dtype, "return", f"{name} -> return", rank_groups.of_layout(whole), needs_grad)
        self.same[total] = self.rank_groups[total]
        return total

    def _weights(self) -> list[float]:
        """Computes the weight of each rank's scalar."""
        size, data = self.mesh.size, self.mesh.count(self.collective_mesh.data)
        if not self.mean:
            return [data / size] * size
        for item in self.inputs.values():
            if item.shape and set(item.used.bound[0]) == set(self.collective_mesh.data) and data > 1:
                rows = [item.used.local_shape(item.shape, rank)[0] for rank in self.everyone]
                return [n / sum(rows) for n in rows]
        return [1 / size] * size

    def _joined(
        self, name: str, shapes: tuple[tuple[int, ...], ...], axes: tuple[str, ...], meta: TensorMeta, needs_grad: bool
    ) -> str:
        dims = [axes, *[()] * (len(meta.shape) - 1)]
        source, shape = laid_out(self.mesh, dims, shapes)
        holders = self.mesh.size // self.mesh.count(axes)
        if needs_grad and holders > 1:  # each of them gets the whole gradient
            name = self.call_one(shared, Ref(name), 1 / holders, hint=name)
        whole = Layout.replicated(self.mesh, len(shape))
        steps = redistribution(source, whole, shape, (), Options(itemsize=meta.dtype.itemsize))
        if steps.is_identity and max(self.rank_groups[name]) == 0:
            return name
        result = self.move(name, steps, meta.dtype, "return", f"{name} -> return", rank_groups.of_layout(whole), needs_grad)
        self.same[result] = self.rank_groups[result]
        return result

    # -- buffers ----------------------------------------------------------------------------------------------------------

    def _updates(self) -> tuple[tuple[str, str], ...]:
        """Builds the updates of buffers: the mean over the ranks where they differ, as running statistics do."""
        kinds = {i.value: i.kind for i in self.graph.inputs}
        found = []
        for name, value in [*self.graph.updates, *((b, b) for b in self.statistics)]:
            local = self.read(value, "return")
            meta = self.graph.metas[value]
            if kinds[name] != "buffer":
                self.problems.add(f"the program changes {name!r}, {kinds[name]} of the call, in place: return the new value")
            elif self.varies(local) and not meta.differentiable:
                self.problems.add(f"buffer {name!r} of {meta.dtype} gets another value on each rank: all_reduce it first")
            elif self.varies(local):
                local = self._averaged(local, meta)
            found.append((name, local))
        return tuple(found)

    def _averaged(self, name: str, meta: TensorMeta) -> str:
        scaled = self.call_one(scaled_value, Ref(name), 1 / self.mesh.size, hint=name)
        whole = Layout.replicated(self.mesh, len(meta.shape))
        steps = redistribution(whole.with_partial(self.all_axes), whole, meta.shape, (), Options(itemsize=meta.dtype.itemsize))
        total = self.move(scaled, steps, meta.dtype, "return", f"{name} -> buffer", rank_groups.of_layout(whole), False)
        self.same[total] = self.rank_groups[total]
        return total


def _named(axes: tuple[str, ...]) -> str:
    return ", ".join(map(repr, axes))


def _said(ranks: RankGraphs, at: int, rank: int) -> str:
    return str(collective_of(ranks.of(rank).nodes[at].op.args))
