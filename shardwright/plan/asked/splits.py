"""Finds the choices that layouts or slice counts stand for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from shardwright.errors import Problems
from shardwright.ir.choice import Choice, make_choice
from shardwright.ir.graph import Node
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.ir.operator import Operator, TensorMeta
from shardwright.ir.pieces import chunk_pieces
from shardwright.ir.signature import Signature, Split
from shardwright.plan.choose.common_mesh import Refinement


def choice_of_layouts(
    op: Operator,
    signature: Signature,
    inputs: Sequence[Layout],
    outputs: Sequence[Layout] | None,
    needs_grad: Sequence[bool],
    what: str,
    problems: Problems,
) -> Choice | None:
    """Finds the choice of an operator whose inputs and outputs have these layouts.

    Args:
        op: the operator.
        signature: its rule's factors.
        inputs, outputs: the layouts; outputs ``None``: as computed, with sums done.
        needs_grad: which inputs need gradients.
        what: the operator's name in messages.
        problems: collects what is wrong.

    Returns:
        The choice; ``None`` where there is none, and then ``problems`` says why.
    """
    found = _Splits(op, signature, what, problems)
    mesh = found.mesh_of([*inputs, *(outputs or ())])
    if mesh is None or not found.read(inputs, outputs or ()):
        return None
    pending = found.pending(inputs)
    if pending is None:
        return None
    choice = make_choice(op, signature, mesh, found.split, needs_grad, pending)
    settled = [layout.without_partial() for layout in choice.computed]
    if outputs is not None:
        settled = [layout.normal(meta.shape) for layout, meta in zip(outputs, op.outputs)]
        if not found.can_give(choice.computed, settled):
            return None
    choice = make_choice(op, signature, mesh, found.split, needs_grad, pending, settled)
    return choice if found.is_given(choice, inputs, settled) else None


@dataclass
class _Splits:
    """Reads an operator's splits from its layouts, and reports contradictions."""

    op: Operator
    signature: Signature
    what: str
    problems: Problems
    split: dict[str, Split] = field(default_factory=dict)
    seen: dict[str, str] = field(default_factory=dict)  # factor -> the dim that said how it is split, or that it is not

    def refuse(self, why: str) -> bool:
        self.problems.add(f"{self.what}: {why}")
        return False

    def mesh_of(self, layouts: Sequence[Layout]) -> Mesh | None:
        meshes = dict.fromkeys(layout.mesh for layout in layouts)
        if len(meshes) == 1:
            return next(iter(meshes))
        self.refuse(f"its layouts are over {len(meshes)} meshes ({' and '.join(map(str, meshes))}); use one for all of them")
        return None

    def read(self, inputs: Sequence[Layout], outputs: Sequence[Layout]) -> bool:
        """Records how each factor is split. Inputs come first; outputs may have sums scattered over their dims."""
        rule, fine = self.signature, True
        metas = self.op.inputs
        for i, layout in enumerate(inputs):
            if i not in rule.late:  # those follow from the output
                fine &= all([self._dim(layout, metas[i], rule.inputs[i], d, f"input {i}") for d in range(layout.ndim)])
        read = set(self.seen)
        for i, layout in enumerate(outputs):
            for d, factors in enumerate(rule.outputs[i]):
                if rule.major(factors) not in read:
                    fine &= self._dim(layout, self.op.outputs[i], rule.outputs[i], d, f"output {i}")
        return fine

    def _dim(self, layout: Layout, meta: TensorMeta, factors: Sequence[tuple[str, ...]], dim: int, tensor: str) -> bool:
        axes, factor = layout.bound[dim], self.signature.major(factors[dim])
        here = f"dim {dim} of {tensor} ({layout.short()})"
        if not axes:
            if factor in self.split:
                told = self.seen[factor]
                return self.refuse(f"{told} is split and {here} is not, but they are the same dim; write both alike")
            if factor is not None:
                self.seen.setdefault(factor, here)
            return True
        if factor is None or not self.signature.splittable(factor):
            why = "has size 1 and is broadcast" if factor is None else "must stay whole for this operator"
            return self.refuse(f"{here} is split, but it {why}; write None there")
        own = self._own(layout, meta.shape[dim], factors[dim], factor, dim)
        if own is None:
            rest = meta.shape[dim] // self.signature.sizes[factor]
            why = f"is cut within runs of {rest} that must stay together; make each piece a multiple of {rest}"
            return self.refuse(f"{here} {why}")
        if self.split.get(factor, own) != own or (factor in self.seen and factor not in self.split):
            return self.refuse(f"{self.seen[factor]} and {here} are the same dim but are split differently; write both alike")
        taken = self.signature.conflicting_factor(factor, axes, self.split)
        if taken is not None:
            return self.refuse(f"{self.seen[taken]} and {here} use one axis for different dims; an axis can split one of them")
        self.split[factor] = own
        self.seen.setdefault(factor, here)
        return True

    def _own(self, layout: Layout, size: int, factors: Sequence[str], factor: str, dim: int) -> Split | None:
        """Returns the split of a dim's largest factor; ``None`` where pieces end within one of its indices."""
        axes, mesh = layout.bound[dim], layout.mesh
        rest = math.prod(self.signature.sizes[f] for f in factors if f != factor)
        pieces = layout.pieces(dim, size)
        if rest and any(p % rest for p in pieces):
            return None
        own = tuple(p // max(1, rest) for p in pieces)
        usual = chunk_pieces(self.signature.sizes[factor], tuple(mesh.axis_size(a) for a in axes))
        return axes, None if own == usual else own

    def pending(self, inputs: Sequence[Layout]) -> dict[int, Layout] | None:
        """Returns the inputs that are read with sums pending; ``None`` where the operator cannot pass them on."""
        held = {i: layout for i, layout in enumerate(inputs) if layout.partial}
        if not held:
            return {}
        groups = self.signature.linear
        if frozenset(held) not in groups:
            which = ", ".join(map(str, held))
            can = " or ".join(",".join(map(str, sorted(g))) for g in groups)
            fix = f"only inputs {can} can, together" if groups else "finish the sums before it"
            self.refuse(f"input {which} has a sum pending, which this operator cannot pass on; {fix}")
            return None
        sums = {layout.partial for layout in held.values()}
        if len(sums) > 1 or any(op != "sum" for _, op in next(iter(sums))):
            self.refuse("its inputs have different reductions pending; give all of them the same sums")
            return None
        used = {a for axes, _ in self.split.values() for a in axes}
        both = used & set(next(iter(held.values())).partial_axes)
        if both:
            self.refuse(f"{', '.join(sorted(both))} has a sum pending and splits a dim as well; an axis does one of the two")
            return None
        return held

    def can_give(self, computed: Sequence[Layout], wanted: Sequence[Layout]) -> bool:
        """Tells whether an operator's outputs can have the wanted layouts: sums pending, done, or scattered."""
        fine = True
        for i, (made, told) in enumerate(zip(computed, wanted)):
            if not _follows(made, told):
                done = made.without_partial().short()
                options = f"{done} or {made.short()}" if made.partial else done
                scattered = ", or done with their axes at the end of a dim" if made.partial else ""
                self.refuse(f"output {i} is {told.short()}, but these inputs make {options}{scattered}; write that, or change "
                            "the inputs")  # fmt: skip
                fine = False
        return fine

    def is_given(self, choice: Choice, inputs: Sequence[Layout], outputs: Sequence[Layout]) -> bool:
        """Tells whether a choice is the one asked for, late inputs included."""
        fine = True
        for i, (needed, told) in enumerate(zip(choice.inputs, inputs)):
            if needed != told.normal(self.op.inputs[i].shape):
                fine = self.refuse(f"input {i} is {told.short()}, but goes with the other tensors only as {needed.short()}; "
                                   "write that")  # fmt: skip
        for i, (made, told) in enumerate(zip(choice.outputs, outputs)):
            if made != told:
                fine = self.refuse(f"output {i} is {told.short()}, but this operator finishes its sums itself; write "
                                   f"{made.short()}")  # fmt: skip
        return fine


def _follows(made: Layout, told: Layout) -> bool:
    """Tells whether one layout is another with some of its pending sums done or scattered."""
    if made == told:
        return True
    sums = set(made.partial_axes)
    for dim, axes in enumerate(told.bound):
        kept = tuple(a for a in axes if a not in sums)
        if kept != made.bound[dim] or (kept == axes and made.sizes[dim] != told.sizes[dim]):
            return False
    return set(told.partial) <= set(made.partial)


@dataclass(frozen=True)
class Checked:
    """A strategy of the right form: slice counts by factor, or Layouts by input.

    Args:
        pinned: where layouts are used as they are (a plan file's, an exact mark's), the name of their source.
    """

    counts: dict[str, int] | None
    layouts: tuple[Layout | None, ...]
    out: tuple[Any, ...] | None
    pinned: str = ""

    def matrix(self, order: Sequence[str], world_size: int) -> tuple[int, ...]:
        """Returns the device matrix of slice counts: the rule's factors in order, then the ranks that repeat the work."""
        assert self.counts is not None
        sizes = [self.counts.get(f, 1) for f in order]
        return (*sizes, world_size // math.prod(sizes))


def _split_of_layouts(
    node: Node, signature: Signature, checked: Checked, refinement: Refinement, what: str, problems: Problems
) -> tuple[Mesh, dict[str, Split]] | None:
    split: dict[str, Split] = {}
    source: dict[str, str] = {}
    meshes = set()
    fine = True
    for i, layout in enumerate(checked.layouts):
        if layout is None:
            continue
        shape = node.op.inputs[i].shape
        refined = refinement.refined(layout, shape)
        meshes.add(refined.mesh)
        for dim, axes in enumerate(refined.bound):
            here = f"dim {dim} of input {i} ({layout.short()})"
            factor = signature.major(signature.inputs[i][dim])
            if not axes:
                if factor in split:
                    problems.add(
                        f"{what}: {source[factor]} is split and {here} is not, but they are the same dim of the "
                        "operator; give both the same axes"
                    )
                    fine = False
                elif factor is not None:
                    source.setdefault(factor, here)
                continue
            if factor is None or not signature.splittable(factor):
                why = "has size 1 and is broadcast" if factor is None else "must stay whole for this operator"
                problems.add(f"{what}: {here} is split, but it {why}; write 'None' there")
                fine = False
                continue
            rest = math.prod(signature.sizes[f] for f in signature.inputs[i][dim] if f != factor)
            pieces = refined.sizes[dim]
            own = (axes, tuple(p // rest for p in pieces) if pieces else None)
            if split.get(factor, own) != own or (factor in source and factor not in split):
                problems.add(
                    f"{what}: {source[factor]} and {here} are the same dim of the operator but are split differently; "
                    "give both the same axes"
                )
                fine = False
                continue
            taken = signature.conflicting_factor(factor, axes, split)
            if taken is not None:
                problems.add(
                    f"{what}: {source[taken]} and {here} use the same axis for different dims of the operator; an axis "
                    "can split one of them only"
                )
                fine = False
                continue
            split[factor] = own
            source[factor] = here
    if len(meshes) > 1:
        problems.add(f"{what}: the Layouts of one operator are over meshes that share no refinement; use one Layout")
        return None
    if not fine:
        return None
    return (meshes.pop() if meshes else refinement.meshes[0]), split
