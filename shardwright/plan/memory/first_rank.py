"""First rank: the local program as one rank runs it, made without looking at the others.

The first rank has the largest pieces of every tensor. What the partitioner decides is the same for all ranks; left out is
the proof that no rank's values vary where a layout says that ranks replicate, which takes as long as there are ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shardwright.capture.graph import Node
from shardwright.cost.memory import local_shape
from shardwright.partition.partitioner import _Local, _Partitioner, scheduled
from shardwright.partition.program import Call, LocalProgram
from shardwright.plan.plan import Plan
from shardwright.redistribute.planner import Options
from shardwright.rules.lowering import PerRank, Ref


def first_rank_program(plan: Plan, options: Options) -> LocalProgram:
    """The scheduled program of the first rank; ``lanes`` of what calls make are empty.

    Args:
        options: what redistributions may use, as the partitioner is given them.
    """
    program = _FirstRankPartitioner(plan.graph, plan, options).unscheduled()
    for change in plan.passes:
        program = change(program)
    return scheduled(program, plan.schedule)


class _FirstRankPartitioner(_Partitioner):
    def _node(self, node: Node) -> None:
        self.node = node
        choice, signature = self.plan.choices[node.name], self.plan.signatures[node.name]
        refs = tuple(
            Ref(self.value_in(value, layout, gradient, node.name))
            for value, layout, gradient in zip(node.inputs, choice.inputs, choice.partial_gradient)
        )
        local = _FirstRankLocal(self, node, choice, signature, refs)
        results = signature.lowering(local) if signature.lowering else local.same_call()
        results = (results,) if isinstance(results, Ref) else tuple(results)
        for value, ref, computed, settled, meta in zip(node.outputs, results, choice.computed, choice.outputs, node.op.outputs):
            now = settled if signature.late else computed
            self.layouts[ref.name] = now.normal(meta.shape)
            self.place[value] = ref.name
            if now != settled:
                self.place[value] = self.emit_move(ref.name, meta.shape, now, settled, (), meta.dtype, node.name)


class _FirstRankLocal(_Local):
    """What a lowering writes to: sizes are those of the first rank, offsets 0."""

    def _emit(self, function: Callable[..., Any], args: Any, kwargs: Any, count: int, sequence: bool) -> tuple[Ref, ...]:
        parent, node = self.parent, self.node
        hint = node.outputs[0] if node.outputs else node.name
        names = []
        for _ in range(count):
            name = hint if hint not in parent.lanes and count == 1 else parent.new_name(hint)
            names.append(name)
            parent.lanes[name] = ()
        parent.instructions.append(
            Call(function, args, kwargs, tuple(names), sequence, node.name, (), node.autocast, node.grad)
        )
        return tuple(map(Ref, names))

    def local_size(self, tensor_is_output: bool, index: int, dim: int) -> int:
        meta = (self.op.outputs if tensor_is_output else self.op.inputs)[index]
        layout = (self.output_layouts if tensor_is_output else self.input_layouts)[index]
        return local_shape(layout, meta.shape)[dim]

    def offset(self, tensor_is_output: bool, index: int, dim: int) -> PerRank:
        return PerRank(lambda rank: 0)
