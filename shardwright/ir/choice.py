"""Choice: one assignment of axes to an operator's factors, with the layouts that follow from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.ir.operator import Operator
from shardwright.ir.signature import Signature, Split


@dataclass(frozen=True)
class Choice:
    """One way to run an operator.

    Args:
        split: factor -> (axes, explicit piece sizes or None); split factors only.
        inputs: layout each input is needed in.
        partial_gradient: for each input, the axes over which its gradient is partial at this operator.
        computed: layout of each output as computed, pending sums included.
        outputs: layout of each output as it leaves the operator, after the operator's own reductions.
    """

    mesh: Mesh
    split: Mapping[str, Split]
    inputs: tuple[Layout, ...]
    partial_gradient: tuple[tuple[str, ...], ...]
    computed: tuple[Layout, ...]
    outputs: tuple[Layout, ...]

    @property
    def axes(self) -> tuple[str, ...]:
        """Every axis along which the operator's ranks do different work."""
        return self.mesh.ordered({a for axes, _ in self.split.values() for a in axes})


def make_choice(
    op: Operator,
    signature: Signature,
    mesh: Mesh,
    split: Mapping[str, Split],
    needs_grad: Sequence[bool],
    pending: Mapping[int, Layout] | None = None,
    outputs: Sequence[Layout] | None = None,
) -> Choice:
    """Builds the choice that splits factors as ``split`` says.

    Args:
        op, signature: the operator and its rule.
        mesh: the mesh that the axes belong to.
        split: factor -> (axes, explicit piece sizes or None).
        needs_grad: for each input, whether a gradient flows back through it.
        pending: inputs that are read with pending sums; the outputs then have these sums pending too.
        outputs: layouts in which the outputs leave the operator, where they differ from the computed ones.
    """
    inputs, computed = signature.layouts(mesh, split)
    active = {a for axes, _ in split.values() for a in axes}
    if pending:
        sums = tuple(a for layout in pending.values() for a in layout.partial_axes)
        active.update(sums)
        inputs = tuple(
            layout.with_partial(pending[i].partial_axes) if i in pending else layout for i, layout in enumerate(inputs)
        )
        computed = tuple(layout.with_partial(sums) for layout in computed)
    settled = tuple(outputs) if outputs is not None else computed
    if signature.late and settled[0].partial:
        settled = (settled[0].without_partial(), *settled[1:])
    needs, gradients = [], []
    for i, layout in enumerate(inputs):
        working = active
        if i in signature.late and computed[0] != settled[0]:
            layout = late_layout(signature, i, settled[0], op)
            working = set(settled[0].split_axes)
        own = {*layout.split_axes, *layout.partial_axes}
        needs.append(layout)
        gradients.append(mesh.ordered(working - own) if needs_grad[i] else ())
    return Choice(mesh, dict(split), tuple(needs), tuple(gradients), computed, settled)


def late_layout(signature: Signature, index: int, output: Layout, op: Operator) -> Layout:
    """Returns the layout of an input that is combined with the reduced output. Its dims are split as the output's.

    Args:
        signature: the operator's rule.
        index: position of the input.
        output: layout of the reduced output.
        op: the operator.
    """
    where = {factors: dim for dim, factors in enumerate(signature.outputs[0]) if factors}
    dims, sizes = [], []
    for factors in signature.inputs[index]:
        dim = where.get(factors)
        dims.append(output.bound[dim] if dim is not None else ())
        sizes.append(output.sizes[dim] if dim is not None else None)
    return Layout.of(output.mesh, dims, (), sizes).normal(op.inputs[index].shape)
