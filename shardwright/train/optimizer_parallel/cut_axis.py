"""Rewrites a plan for a mesh in which one axis is split in two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from shardwright.errors import ShardwrightError
from shardwright.ir.choice import Choice
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.ir.operator import TensorMeta
from shardwright.ir.plan import Plan


def cut_axis(
    plan: Plan, axis: str, sizes: tuple[int, int], mesh: Mesh | None = None
) -> tuple[Plan, Callable[[Layout], Layout]]:
    """Rewrites a plan for a mesh whose ``axis`` is ``<axis>0`` above ``<axis>1``; every piece stays where it is.

    Args:
        plan: the plan.
        axis: the axis to split.
        sizes: of the two parts; their product is the size of the axis.
        mesh: the mesh that has the axis, where the plan has several over its ranks; default: that of most operators.

    Returns:
        The plan, and a function that turns a layout of the old mesh into the same one of the new.

    Raises:
        ShardwrightError: a dim is split unevenly over the axis: the parts would have other pieces than the whole.
    """
    mesh = mesh or plan.mesh
    assert sizes[0] * sizes[1] == mesh.axis_size(axis), (axis, sizes)
    refined, parts = _refined(mesh, axis, sizes)

    def translate(layout: Layout) -> Layout:
        if layout.mesh != mesh:
            return layout
        dims = [_renamed(axes, axis, parts) for axes in layout.bound]
        partial = [(part, op) for name, op in layout.partial for part in _renamed((name,), axis, parts)]
        return Layout.of(refined, dims, partial, layout.sizes)

    def checked(layout: Layout, meta: TensorMeta, where: str) -> Layout:
        found = translate(layout)
        for dim, size in enumerate(meta.shape):
            if axis in layout.bound[dim] and found.pieces(dim, size) != layout.pieces(dim, size):
                raise ShardwrightError(
                    f"{where} splits dim {dim} of {size} over {axis!r} unevenly, {layout.pieces(dim, size)}, which in parts "
                    f"of {sizes[0]} and {sizes[1]} would be {found.pieces(dim, size)}; make the size a multiple of "
                    f"{mesh.axis_size(axis)}, or leave the axis whole"
                )
        return found

    choices = dict(plan.choices)
    for node in plan.graph.nodes:
        choice = choices[node.name]
        if choice.mesh == mesh:
            choices[node.name] = _choice(choice, refined, axis, parts, node.op.inputs, node.op.outputs, checked, node.where)
    metas = plan.graph.metas
    inputs = {name: checked(layout, metas[name], f"the input {name}") for name, layout in plan.input_layouts.items()}
    return replace(plan, mesh=refined if mesh == plan.mesh else plan.mesh, choices=choices, input_layouts=inputs), translate


def _refined(mesh: Mesh, axis: str, sizes: tuple[int, int]) -> tuple[Mesh, tuple[str, str]]:
    taken = set(mesh.axes)
    parts = (f"{axis}0", f"{axis}1")
    while taken & set(parts):
        parts = (f"{parts[0]}_", f"{parts[1]}_")
    at = mesh.axes.index(axis)
    axes = (*mesh.axes[:at], *parts, *mesh.axes[at + 1 :])
    return Mesh(axes, (*mesh.sizes[:at], *sizes, *mesh.sizes[at + 1 :]), mesh.ranks), parts


def _renamed(axes: Sequence[str], axis: str, parts: tuple[str, str]) -> tuple[str, ...]:
    return tuple(part for name in axes for part in (parts if name == axis else (name,)))


def _choice(
    choice: Choice,
    mesh: Mesh,
    axis: str,
    parts: tuple[str, str],
    inputs: Sequence[TensorMeta],
    outputs: Sequence[TensorMeta],
    checked: Callable[[Layout, TensorMeta, str], Layout],
    where: str,
) -> Choice:
    def each(layouts: Sequence[Layout], metas: Sequence[TensorMeta]) -> tuple[Layout, ...]:
        return tuple(checked(layout, meta, where) for layout, meta in zip(layouts, metas, strict=True))

    return Choice(
        mesh,
        {factor: (_renamed(axes, axis, parts), sizes) for factor, (axes, sizes) in choice.split.items()},
        each(choice.inputs, inputs),
        tuple(_renamed(axes, axis, parts) for axes in choice.partial_gradient),
        each(choice.computed, outputs),
        each(choice.outputs, outputs),
    )
