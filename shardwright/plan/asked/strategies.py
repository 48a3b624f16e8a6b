"""Checks an operator's strategy against its rule and turns it into axes.

Two phases, because all strategies share a mesh: :func:`check_strategy` checks the form and counts slices and says which
device matrix it needs; :func:`resolve_strategy` names the axes once the mesh is refined for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from shardwright.errors import Problems
from shardwright.ir.choice import Choice, make_choice
from shardwright.ir.graph import Node, where_of
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.ir.operator import TensorMeta
from shardwright.ir.pieces import chunk_pieces
from shardwright.ir.signature import Signature, Split
from shardwright.plan.asked.splits import Checked, _split_of_layouts, choice_of_layouts
from shardwright.plan.choose.common_mesh import Refinement


def check_form(strategy: Any, what: str, problems: Problems) -> str | None:
    """Checks that a strategy is a tuple of tuples of positive ints, or of Layouts.

    Returns:
        ``"counts"``, ``"layouts"`` or ``None``.
    """
    if not isinstance(strategy, tuple):
        problems.add(f"{what}: {strategy!r} is a {type(strategy).__name__}; give a tuple with one entry a tensor")
        return None
    kinds = {"layouts" if isinstance(e, Layout) else "counts" if isinstance(e, tuple) else "other" for e in strategy}
    if "other" in kinds:
        bad = next(e for e in strategy if not isinstance(e, (Layout, tuple)))
        problems.add(f"{what}: entry {bad!r} is a {type(bad).__name__}; give a tuple of slice counts or a Layout")
        return None
    if len(kinds) > 1:
        problems.add(f"{what}: {strategy!r} mixes slice counts and Layouts; write all entries as Layouts")
        return None
    if "counts" in kinds:
        for entry in strategy:
            for count in entry:
                if not isinstance(count, int) or isinstance(count, bool):
                    problems.add(f"{what}: {entry!r} holds {count!r}, a {type(count).__name__}; slice counts are ints")
                    return None
                if count < 1:
                    problems.add(f"{what}: {entry!r} holds {count}; a dim is cut into at least 1 slice")
                    return None
    return kinds.pop() if kinds else "counts"


def check_layout(layout: Layout, ndim: int, world_size: int, what: str, problems: Problems) -> bool:
    """Checks that a Layout is bound, has the tensor's dims and covers all ranks.

    Args:
        layout: the layout.
        ndim: dims of the tensor.
        world_size: number of ranks.
        what: its name in messages.
        problems: collects what is wrong.
    """
    if layout.dims is None:
        problems.add(f"{what}: the Layout ({layout.mesh}) has no dims; call it with {ndim} entries")
        return False
    if layout.ndim != ndim:
        problems.add(f"{what}: the layout {layout.short()} has {layout.ndim} dims, the tensor {ndim}; give {ndim} entries")
        return False
    if sorted(layout.mesh.ranks) != list(range(world_size)):
        problems.add(
            f"{what}: the Layout is over {layout.mesh.size} devices {_ranks(layout.mesh)}, the world has ranks "
            f"0..{world_size - 1}; use a device matrix whose product is {world_size}"
        )
        return False
    if layout.partial:
        problems.add(f"{what}: the layout {layout.short()} has pending sums, which a strategy cannot ask for")
        return False
    return True


def _ranks(mesh: Mesh) -> str:
    ranks = list(mesh.ranks)
    return str(ranks) if len(ranks) <= 8 else f"[{ranks[0]}, {ranks[1]}, ..., {ranks[-1]}]"


def check_counts(counts: Sequence[int], ndim: int, world_size: int, what: str, problems: Problems) -> bool:
    """Checks that slice counts fit a tensor's dims and the number of devices.

    Args:
        counts: the slice counts.
        ndim: dims of the tensor.
        world_size: number of ranks.
        what: their name in messages.
        problems: collects what is wrong.
    """
    if len(counts) != ndim:
        problems.add(f"{what}: {tuple(counts)} has {len(counts)} counts for a tensor of {ndim} dims; give one a dim")
        return False
    return check_total(math.prod(counts), str(tuple(counts)), world_size, what, problems)


def check_total(total: int, given: str, world_size: int, what: str, problems: Problems) -> bool:
    """Checks that the product of slice counts divides the number of devices.

    Args:
        total: the product.
        given: the counts, for the message.
        world_size: number of ranks.
        what: their name in messages.
        problems: collects what is wrong.
    """
    if total > world_size:
        problems.add(f"{what}: {given} needs {total} devices, the world has {world_size}; use fewer slices")
        return False
    if world_size % total:
        problems.add(
            f"{what}: {given} uses {total} devices, which does not divide the {world_size} of the world; use a "
            f"product among {[d for d in range(1, world_size + 1) if world_size % d == 0]}"
        )
        return False
    return True


def check_strategy(node: Node, signature: Signature, world_size: int, problems: Problems) -> Checked | None:
    """Checks an operator's strategy against its rule.

    Args:
        node: the operator.
        signature: its rule's factors.
        world_size: number of ranks.
        problems: collects what is wrong.
    """
    mark = node.mark
    assert mark is not None
    what = where_of(node)
    kind = check_form(mark.in_strategy, what, problems)
    if kind is None:
        return None
    if len(mark.in_strategy) != node.mark_count:
        problems.add(
            f"{what}: {len(mark.in_strategy)} strategies {mark.in_strategy} for {node.mark_count} tensor inputs; give "
            "one per input"
        )
        return None
    entries = tuple(mark.in_strategy[p] if p is not None else None for p in node.mark_positions)
    if kind == "layouts":
        checked = _check_layouts(node, entries, world_size, what, problems)
    else:
        checked = _check_slices(node, signature, entries, world_size, what, problems)
    out_ok = _check_out(node, kind, world_size, what, problems)
    return checked if out_ok else None


def _check_layouts(
    node: Node, entries: Sequence[Layout | None], world_size: int, what: str, problems: Problems
) -> Checked | None:
    fine = [
        check_layout(entry, len(meta.shape), world_size, f"{what} input {i}", problems)
        for i, (entry, meta) in enumerate(zip(entries, node.op.inputs, strict=True))
        if entry is not None
    ]
    exact = what if node.mark.exact else ""  # type: ignore[union-attr]
    return Checked(None, tuple(entries), node.mark.out_strategy, exact) if all(fine) else None  # type: ignore[union-attr]


def _check_slices(
    node: Node, signature: Signature, entries: Sequence[Any], world_size: int, what: str, problems: Problems
) -> Checked | None:
    counts: dict[str, int] = {}
    source: dict[str, str] = {}
    fine = True
    for i, (entry, meta) in enumerate(zip(entries, node.op.inputs, strict=True)):
        if entry is None:
            continue
        if len(entry) != len(meta.shape):
            problems.add(
                f"{what} input {i}: {entry} has {len(entry)} counts for a tensor of {len(meta.shape)} dims "
                f"{list(meta.shape)}; give one a dim"
            )
            fine = False
            continue
        for dim, count in enumerate(entry):
            factor = signature.major(signature.inputs[i][dim])
            here = f"dim {dim} of input {i}"
            if factor is None or not signature.splittable(factor):
                if count > 1:
                    why = "has size 1 and is broadcast" if factor is None else "must stay whole for this operator"
                    problems.add(f"{what}: {here} is cut into {count}, but it {why}; write 1 there")
                    fine = False
                continue
            if factor in counts and counts[factor] != count:
                problems.add(
                    f"{what}: {source[factor]} is cut into {counts[factor]} and {here} into {count}, but they are the "
                    f"same dim of the operator; cut both into {max(count, counts[factor])}"
                )
                fine = False
                continue
            counts[factor] = count
            source[factor] = here
    total = math.prod(counts.values())
    given = str(node.mark.in_strategy)  # type: ignore[union-attr]
    fine = check_total(total, given, world_size, what, problems) and fine
    return Checked(counts, (), node.mark.out_strategy) if fine else None  # type: ignore[union-attr]


def _check_out(node: Node, kind: str, world_size: int, what: str, problems: Problems) -> bool:
    out = node.mark.out_strategy  # type: ignore[union-attr]
    if out is None:
        return True
    out_kind = check_form(out, f"{what} out_strategy", problems)
    if out_kind is None:
        return False
    if out_kind != kind:
        problems.add(f"{what}: in_strategy is given as {kind} and out_strategy as {out_kind}; write both the same way")
        return False
    if len(out) != len(node.op.outputs):
        problems.add(f"{what}: {len(out)} entries in out_strategy for {len(node.op.outputs)} outputs; give one per output")
        return False
    for entry, meta in zip(out, node.op.outputs, strict=True):
        if isinstance(entry, Layout):
            if not check_layout(entry, len(meta.shape), world_size, f"{what} out_strategy", problems):
                return False
        elif not check_counts(entry, len(meta.shape), world_size, f"{what} out_strategy", problems):
            return False
    return True


def reserve(checked: Checked, signature: Signature, refinement: Refinement, world_size: int) -> None:
    """Makes room on the mesh for a checked strategy.

    Args:
        checked: the strategy.
        signature: the rule's factors.
        refinement: the meshes so far.
        world_size: number of ranks.
    """
    if checked.counts is not None:
        refinement.add(checked.matrix(signature.order, world_size))
    for layout in (*checked.layouts, *(checked.out or ())):
        if isinstance(layout, Layout):
            refinement.add(layout.mesh.sizes, layout.mesh.axes, layout.mesh.ranks)


def resolve_strategy(
    node: Node,
    signature: Signature,
    checked: Checked,
    refinement: Refinement,
    needs_grad: Sequence[bool],
    problems: Problems,
) -> Choice | None:
    """Finds the choice that a checked strategy asks for, on the refined mesh.

    Args:
        node: the operator.
        signature: its rule's factors.
        checked: the strategy.
        refinement: the finished meshes.
        needs_grad: which inputs need gradients.
        problems: collects what is wrong.
    """
    if checked.pinned:
        return _pinned(node, signature, checked, refinement, needs_grad, problems)
    what = where_of(node)
    found = (
        _split_of_counts(signature, checked, refinement)
        if checked.counts is not None
        else _split_of_layouts(node, signature, checked, refinement, what, problems)
    )
    if found is None:
        return None
    mesh, split = found
    choice = make_choice(node.op, signature, mesh, split, needs_grad)
    if checked.out is None:
        # by default an operator does its own sum, by an all-reduce
        outputs: tuple[Layout, ...] | None = tuple(layout.without_partial() for layout in choice.computed)
    else:
        outputs = _outputs(node, signature, checked, refinement, choice, what, problems)
    return make_choice(node.op, signature, mesh, split, needs_grad, None, outputs) if outputs else None


def _pinned(
    node: Node, signature: Signature, checked: Checked, refinement: Refinement, needs: Sequence[bool], problems: Problems
) -> Choice | None:
    """Finds the choice that a plan file's layouts ask for, on the refined mesh."""

    def refined(layouts: Sequence[Any], metas: Sequence[TensorMeta]) -> list[Layout]:
        return [refinement.refined(layout, meta.shape) for layout, meta in zip(layouts, metas, strict=True)]

    inputs = refined(checked.layouts, node.op.inputs)
    outputs = refined(checked.out, node.op.outputs) if checked.out is not None else None
    return choice_of_layouts(node.op, signature, inputs, outputs, needs, checked.pinned, problems)


def _split_of_counts(signature: Signature, checked: Checked, refinement: Refinement) -> tuple[Mesh, dict[str, Split]]:
    assert checked.counts is not None
    mesh, axes = refinement.axes_of(checked.matrix(signature.order, refinement.size))
    split: dict[str, Split] = {}
    for factor, factor_axes in zip(signature.order, axes, strict=False):
        if factor_axes:
            split[factor] = (factor_axes, flat_pieces(signature.sizes[factor], mesh, factor_axes))
    return mesh, split


def flat_pieces(size: int, mesh: Mesh, axes: tuple[str, ...]) -> tuple[int, ...] | None:
    """Returns the pieces that ``torch.chunk(n)`` makes, for the product n of axes.

    Returns:
        The sizes; ``None`` where the axes, one after the other, cut the same way.
    """
    flat = chunk_pieces(size, (mesh.count(axes),))
    nested = chunk_pieces(size, tuple(mesh.axis_size(a) for a in axes))
    return None if flat == nested else flat


def _outputs(
    node: Node,
    signature: Signature,
    checked: Checked,
    refinement: Refinement,
    choice: Choice,
    what: str,
    problems: Problems,
) -> tuple[Layout, ...] | None:
    """Returns the output layouts asked for: as computed with sums done, or with them scattered over a dim."""
    assert checked.out is not None
    results = []
    for entry, computed, meta in zip(checked.out, choice.computed, node.op.outputs, strict=True):
        legal = _legal_outputs(computed, meta.shape)
        if isinstance(entry, Layout):
            wanted = refinement.refined(entry, meta.shape)
            match = next((o for o in legal if o == wanted), None)
        else:
            match = next((o for o in legal if _counts(o) == entry), None)
        if match is None:
            options = " or ".join(str(_counts(o)) if not isinstance(entry, Layout) else o.short() for o in legal)
            given = entry.short() if isinstance(entry, Layout) else entry
            problems.add(f"{what}: out_strategy {given} is not what these inputs can give; use {options}")
            return None
        results.append(match)
    return tuple(results)


def _legal_outputs(computed: Layout, shape: tuple[int, ...]) -> list[Layout]:
    done = computed.without_partial()
    legal = [done.normal(shape)]
    if computed.partial:
        for dim in range(computed.ndim):
            dims = list(done.bound)
            dims[dim] = (*dims[dim], *computed.partial_axes)
            if done.sizes[dim] is None:
                legal.append(Layout.of(done.mesh, dims, (), done.sizes).normal(shape))
    return legal


def _counts(layout: Layout) -> tuple[int, ...]:
    return tuple(layout.mesh.count(axes) for axes in layout.bound)
