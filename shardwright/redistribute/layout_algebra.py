"""Layout algebra: small functions on layouts and steps for the planner."""

from __future__ import annotations

from collections.abc import Sequence

from shardwright.ir.layout import Layout


def _refines(fine: Layout, coarse: Layout, dim: int, shape: tuple[int, ...]) -> bool:
    """Tells whether pieces of ``fine`` along ``dim`` group into those of ``coarse``. Explicit sizes may not."""
    if fine.bound[dim][: len(coarse.bound[dim])] != coarse.bound[dim]:
        return False
    if fine.sizes[dim] is None and coarse.sizes[dim] is None:
        return True
    small, large = fine.pieces(dim, shape[dim]), coarse.pieces(dim, shape[dim])
    each = len(small) // len(large)
    return all(sum(small[i * each : (i + 1) * each]) == large[i] for i in range(len(large)))


def _one_to_one(now: Layout, after: Layout, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Returns the dims between which one run of axes moves from end to end. Nothing else may change."""
    changed = [d for d in range(now.ndim) if now.bound[d] != after.bound[d] or now.sizes[d] != after.sizes[d]]
    if len(changed) != 2:
        return None
    for source, target in (changed, changed[::-1]):
        run = now.bound[source][len(after.bound[source]) :]
        moves = run and after.bound[source] + run == now.bound[source] and now.bound[target] + run == after.bound[target]
        if moves and _refines(now, after, source, shape) and _refines(after, now, target, shape):
            return source, target
    return None


def _with_dim(now: Layout, target: Layout, dim: int, axes: tuple[str, ...], reduced: Sequence[str] = ()) -> Layout:
    """Returns ``now`` with other axes for one dim. It takes the target's explicit sizes if they are for these axes."""
    dims, sizes = list(now.bound), list(now.sizes)
    dims[dim] = axes
    sizes[dim] = target.sizes[dim] if now.mesh == target.mesh and axes == target.bound[dim] else None
    return Layout.of(now.mesh, dims, [p for p in now.partial if p[0] not in reduced], sizes)


def _replicating(layout: Layout) -> tuple[str, ...]:
    """Returns the axes along which ranks hold the same."""
    busy = {*layout.split_axes, *layout.partial_axes}
    return tuple(a for a in layout.mesh.axes if a not in busy and layout.mesh.axis_size(a) > 1)


def _with_suffixes(now: Layout, target: Layout, later: Sequence[str]) -> Layout | None:
    """Returns the target with some leaving axes still at the end of their dims. None if that has no notation."""
    dims, sizes = list(target.bound), list(target.sizes)
    for dim, axes in enumerate(now.bound):
        suffix = tuple(a for a in axes if a in later)
        if suffix:
            if sizes[dim] is not None:
                return None
            dims[dim] += suffix
    return Layout.of(now.mesh, dims, target.partial, sizes)


def _pending(now: Layout, target: Layout) -> dict[str, str]:
    """Returns the reductions that are still to be done."""
    kept = target.partial_axes if now.mesh == target.mesh else ()
    return {axis: op for axis, op in now.partial if axis not in kept}


def _first_op(pending: dict[str, str]) -> str:
    return next(op for op in ("sum", "max", "min") if op in pending.values())


def _runs(axes: Sequence[str], pending: dict[str, str]) -> list[tuple[str, ...]]:
    """Splits ``axes`` into maximal runs that are all pending or all replicated."""
    runs: list[tuple[str, ...]] = []
    for axis in axes:
        if runs and (runs[-1][0] in pending) == (axis in pending):
            runs[-1] = (*runs[-1], axis)
        else:
            runs.append((axis,))
    return runs
