"""Finds the choice of an operator that keeps its inputs where they are.

The layouts of its inputs propose axes for its factors. A proposal is accepted where the factor may be split, the axis
is free and the pieces fit; other axes are redistributed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from shardwright.ir.choice import Choice, make_choice
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.ir.operator import Operator
from shardwright.ir.pieces import chunk_pieces
from shardwright.ir.signature import DimFactors, Signature, Split, TensorFactors


def follow(
    op: Operator,
    signature: Signature,
    layouts: Sequence[Layout | None],
    needs_grad: Sequence[bool],
    mesh: Mesh,
    order: Sequence[int] | None = None,
) -> Choice:
    """Finds the choice that redistributes its inputs least.

    Args:
        op: the operator.
        signature: its rule's factors.
        layouts: the layout of each input; ``None`` for one that may be wherever the operator wants it.
        needs_grad: which inputs need gradients.
        mesh: the mesh to use where no input has one.
        order: which inputs to satisfy first; default the largest first.
    """
    given = [i for i, layout in enumerate(layouts) if layout is not None]
    mesh = _mesh_of([(op.inputs[i].numel, layouts[i]) for i in given], mesh)
    if order is None:
        order = sorted(given, key=lambda i: -op.inputs[i].numel)
    split: dict[str, Split] = {}
    for i in order:
        layout = layouts[i]
        if layout is not None and layout.mesh == mesh:
            propose(split, signature, signature.inputs[i], layout, op.inputs[i].shape)
    pending = _pending(signature, layouts, mesh, {a for axes, _ in split.values() for a in axes})
    return make_choice(op, signature, mesh, split, needs_grad, pending)


def choice_for_output(
    op: Operator, signature: Signature, target: Layout, needs_grad: Sequence[bool], index: int = 0
) -> Choice | None:
    """Finds the choice whose output ``index`` has layout ``target``, ``None`` where there is none.

    Args:
        op: the operator.
        signature: its rule's factors.
        target: the layout of the output.
        needs_grad: which inputs need gradients.
        index: of the output.
    """
    split: dict[str, Split] = {}
    propose(split, signature, signature.outputs[index], target, op.outputs[index].shape)
    choice = make_choice(op, signature, target.mesh, split, needs_grad)
    made = choice.computed[index].normal(op.outputs[index].shape)
    return choice if made == target.normal(op.outputs[index].shape) else None


def propose(
    split: dict[str, Split], signature: Signature, factors: TensorFactors, layout: Layout, shape: Sequence[int]
) -> None:
    """Adds to ``split`` the axes that a tensor's layout proposes for its factors, if possible.

    Args:
        split: the splits so far.
        signature: the rule's factors.
        factors: those of the tensor's dims.
        layout: its layout.
        shape: global shape.
    """
    used = {a for axes, _ in split.values() for a in axes}
    for dim, dim_factors in enumerate(factors):
        axes = layout.bound[dim]
        major = signature.major(dim_factors)
        if not axes or major is None or not signature.splittable(major) or major in split or used & set(axes):
            continue
        accepted = _accepted(signature, dim_factors, major, layout, dim, shape[dim])
        if accepted is not None:
            split[major] = accepted
            used.update(accepted[0])


def _accepted(signature: Signature, factors: DimFactors, major: str, layout: Layout, dim: int, size: int) -> Split | None:
    """Returns the axes and pieces of the dim's first factor in a layout: as many axes as fit."""
    rest = math.prod(signature.sizes[f] for f in factors if f != major)
    axes, mesh = layout.bound[dim], layout.mesh
    pieces = layout.pieces(dim, size)
    if all(p % rest == 0 for p in pieces):
        own = tuple(p // rest for p in pieces)
        default = chunk_pieces(signature.sizes[major], tuple(mesh.axis_size(a) for a in axes))
        return axes, (None if own == default else own)
    for count in range(len(axes) - 1, 0, -1):
        fewer = axes[:count]
        if layout.sizes[dim] is None and signature.sizes[major] % mesh.count(fewer) == 0:
            return fewer, None
    return None


def _pending(signature: Signature, layouts: Sequence[Layout | None], mesh: Mesh, used: set[str]) -> Mapping[int, Layout] | None:
    """Returns the inputs whose pending sums the operator can pass on, as it is linear."""
    for group in signature.linear:
        held = [layouts[i] for i in group]
        if any(layout is None or layout.mesh != mesh for layout in held):
            continue
        sums = {layout.partial for layout in held}  # type: ignore[union-attr]
        others = [layouts[i] for i in range(len(layouts)) if i not in group]
        if len(sums) != 1 or any(o is not None and o.partial for o in others):
            continue
        partial = next(iter(sums))
        if partial and all(op == "sum" for _, op in partial) and not used & {a for a, _ in partial}:
            return {i: layouts[i] for i in group}  # type: ignore[misc]
    return None


def _mesh_of(candidates: Sequence[tuple[int, Layout | None]], default: Mesh) -> Mesh:
    """Returns the mesh of the largest input that is split at all."""
    split = [(numel, layout.mesh) for numel, layout in candidates if layout is not None and not layout.is_replicated]
    return max(split, key=lambda item: item[0])[1] if split else default
