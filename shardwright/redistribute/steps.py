"""Redistribution: the steps that turn one layout of a tensor into another, forward and backward.

A step is one collective over some axes of a mesh, or a local slice. Each step carries the layout before and after it,
which says all an executor needs: every rank's bounds.

The planner here never gathers what it then throws away: where a chain of all-gather, slice, all-to-all,
reduce-scatter and all-reduce would move more than must move, it uses one exact exchange instead.

The backward of a redistribution is the redistribution of the gradient. The gradient of a value has the value's pieces;
where the value was partial its gradient is replicated; and it is partial over the axes along which the ranks that read
the value went on to do different things. So both directions come from one planner of values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from shardwright.layout import Layout


@dataclass(frozen=True)
class Step:
    """One step of a redistribution.

    Args:
        kind: ``all_reduce``, ``reduce_scatter``, ``all_gather``, ``all_to_all``, ``slice`` or ``exchange``.
        axes: mesh axes the step communicates over, most significant first; empty for ``exchange``.
        source: layout before the step.
        target: layout after it.
        dims: the dims it changes: one for gather, slice and reduce-scatter, ``(from, to)`` for all-to-all.
    """

    kind: str
    axes: tuple[str, ...]
    source: Layout
    target: Layout
    dims: tuple[int, ...] = ()
    op: str = "sum"

    @property
    def groups(self) -> list[list[int]]:
        """The groups of ranks that communicate."""
        if self.kind == "exchange":
            return [sorted(self.source.mesh.ranks)]
        return self.source.mesh.groups(self.axes)

    def __str__(self) -> str:
        if self.kind == "exchange":
            return f"exchange({self.source.short()} -> {self.target.short()})"
        dims = f", dim {'->'.join(map(str, self.dims))}" if self.dims else ""
        return f"{self.kind}({','.join(self.axes)}{dims})"


@dataclass(frozen=True)
class Redistribution:
    """The steps from ``source`` to ``target``, and those that bring the gradient back.

    Args:
        shape: global shape.
        partial_gradient: axes of the target's mesh over which the gradient at the target is partial.
    """

    source: Layout
    target: Layout
    shape: tuple[int, ...]
    partial_gradient: tuple[str, ...]
    forward: tuple[Step, ...]
    backward: tuple[Step, ...]

    @property
    def is_identity(self) -> bool:
        return not self.forward and not self.backward

    def __str__(self) -> str:
        forward = " + ".join(map(str, self.forward)) or "identity"
        backward = " + ".join(map(str, self.backward)) or "identity"
        return f"{forward} | {backward}"


@lru_cache(maxsize=65536)
def redistribution(
    source: Layout, target: Layout, shape: tuple[int, ...], partial_gradient: tuple[str, ...] = ()
) -> Redistribution:
    """Plans a redistribution of a tensor of global ``shape``.

    >>> base = Layout((2, 2), ("dp", "mp"))
    >>> str(redistribution(base("dp", "None"), base("None", "None"), (4, 4), ("dp",)))
    'all_gather(dp, dim 0) | reduce_scatter(dp, dim 0)'
    """
    source, target = source.normal(shape), target.normal(shape)
    partial_gradient = tuple(a for a in partial_gradient if target.mesh.axis_size(a) > 1)
    forward = steps_between(source, target, shape)
    gradient = target.without_partial().with_partial(partial_gradient)
    backward = steps_between(gradient, source.without_partial(), shape)
    return Redistribution(source, target, shape, partial_gradient, forward, backward)


@lru_cache(maxsize=65536)
def steps_between(source: Layout, target: Layout, shape: tuple[int, ...]) -> tuple[Step, ...]:
    """The steps that turn values laid out as ``source`` into ``target``.

    Partial axes of ``target`` must be partial in ``source``: a pending reduction is done or kept, never invented.
    """
    source, target = source.normal(shape), target.normal(shape)
    if source == target:
        return ()
    assert set(target.partial) <= set(source.partial) or source.mesh == target.mesh, (source, target)
    if source.mesh != target.mesh:
        assert not target.partial, "a pending reduction cannot cross to another mesh"
        return _across_meshes(source, target, shape)
    return _Chain(source, target, shape).plan()


def _across_meshes(source: Layout, target: Layout, shape: tuple[int, ...]) -> tuple[Step, ...]:
    steps = []
    if source.partial:
        reduced = source.without_partial()
        steps.append(Step("all_reduce", source.partial_axes, source, reduced, (), source.partial[0][1]))
        source = reduced
    if source.bounds(shape) != target.bounds(shape):
        steps.append(Step("exchange", (), source, target))
    return tuple(steps)


class _Chain:
    """Builds the steps between two layouts of one mesh, keeping the current layout as it goes."""

    def __init__(self, source: Layout, target: Layout, shape: tuple[int, ...]):
        self.now, self.target, self.shape = source, target, shape
        self.steps: list[Step] = []
        missing = set(target.partial) - set(source.partial)
        assert not missing, f"cannot make {missing} partial: {source} -> {target}"

    def plan(self) -> tuple[Step, ...]:
        self.split_where_nothing_leaves()
        self.reduce()
        self.all_to_all()
        if any(self.leaving(d) for d in range(self.now.ndim)):
            if self.only_gathers():
                self.gather()
            else:
                self.add("exchange", (), self.target)
        if self.now != self.target:
            self.split_where_nothing_leaves()
        if self.now != self.target:
            self.add("exchange", (), self.target)
        return tuple(self.steps)

    # -- the parts, in the order they run: what shrinks the tensor comes first ------------------------------------

    def split_where_nothing_leaves(self) -> None:
        """Slices dims by replicated axes and reduce-scatters them by partial ones, in the target's order."""
        for dim in range(self.now.ndim):
            if self.leaving(dim) or not self.refines(self.target, self.now, dim):
                continue
            entering = self.target.bound[dim][len(self.now.bound[dim]) :]
            pending = dict(self.now.partial)
            for kept in self.target.partial_axes:
                pending.pop(kept, None)
            if self.target.sizes[dim] is not None:
                # explicit sizes exist for the whole list of axes only
                runs = [entering] if entering else []
                if entering and 0 < sum(a in pending for a in entering) < len(entering):
                    continue
            else:
                runs = _runs(entering, pending)
            for run in runs:
                if any(a in self.now.split_axes for a in run):
                    break
                after = self.with_dim(dim, self.now.bound[dim] + run, drop_partial=run)
                if run[0] in pending:
                    if any(pending[a] != "sum" for a in run):
                        break
                    self.add("reduce_scatter", run, after, (dim,))
                else:
                    self.add("slice", run, after, (dim,))

    def reduce(self) -> None:
        kept = set(self.target.partial_axes)
        for op in ("sum", "max", "min"):
            axes = tuple(a for a, o in self.now.partial if o == op and a not in kept)
            if axes:
                partial = tuple(p for p in self.now.partial if p[0] not in axes)
                self.add("all_reduce", axes, Layout.of(self.now.mesh, self.now.bound, partial, self.now.sizes), (), op)

    def all_to_all(self) -> None:
        """Axes that leave the end of one dim for the end of another, where nothing else happens to the two."""
        for source in range(self.now.ndim):
            run = self.leaving(source)
            if not run:
                continue
            for target in range(self.now.ndim):
                stays = self.now.bound[target] + run == self.target.bound[target]
                if target == source or self.leaving(target) or not stays:
                    continue
                if self.target.bound[source] != self.now.bound[source][: -len(run)]:
                    continue
                if not (self.refines(self.now, self.target, source) and self.refines(self.target, self.now, target)):
                    continue
                dims, sizes = list(self.now.bound), list(self.now.sizes)
                dims[source], sizes[source] = self.target.bound[source], self.target.sizes[source]
                dims[target], sizes[target] = self.target.bound[target], self.target.sizes[target]
                after = Layout.of(self.now.mesh, dims, self.now.partial, sizes)
                self.add("all_to_all", run, after, (source, target))
                break

    def only_gathers(self) -> bool:
        """Whether all that is left is to gather: the exact exchange serves everything else."""
        return all(
            self.target.bound[d] == self.now.bound[d][: len(self.target.bound[d])] and self.refines(self.now, self.target, d)
            for d in range(self.now.ndim)
        )

    def gather(self) -> None:
        for dim in range(self.now.ndim):
            run = self.leaving(dim)
            if run:
                dims, sizes = list(self.now.bound), list(self.now.sizes)
                dims[dim], sizes[dim] = self.target.bound[dim], self.target.sizes[dim]
                self.add("all_gather", run, Layout.of(self.now.mesh, dims, self.now.partial, sizes), (dim,))

    # -- helpers --------------------------------------------------------------------------------------------------

    def leaving(self, dim: int) -> tuple[str, ...]:
        """The axes at the end of ``dim`` that the target does not have there."""
        now, target = self.now.bound[dim], self.target.bound[dim]
        keep = 0
        while keep < min(len(now), len(target)) and now[keep] == target[keep]:
            keep += 1
        return now[keep:]

    def refines(self, fine: Layout, coarse: Layout, dim: int) -> bool:
        """Whether the pieces of ``fine`` along ``dim`` group into those of ``coarse`` (explicit sizes may not)."""
        if fine.bound[dim][: len(coarse.bound[dim])] != coarse.bound[dim]:
            return False
        if fine.sizes[dim] is None and coarse.sizes[dim] is None:
            return True
        small, large = fine.pieces(dim, self.shape[dim]), coarse.pieces(dim, self.shape[dim])
        each = len(small) // len(large)
        return all(sum(small[i * each : (i + 1) * each]) == large[i] for i in range(len(large)))

    def with_dim(self, dim: int, axes: tuple[str, ...], drop_partial: tuple[str, ...] = ()) -> Layout:
        dims, sizes = list(self.now.bound), list(self.now.sizes)
        dims[dim] = axes
        sizes[dim] = self.target.sizes[dim] if axes == self.target.bound[dim] else None
        partial = tuple(p for p in self.now.partial if p[0] not in drop_partial)
        return Layout.of(self.now.mesh, dims, partial, sizes)

    def add(self, kind: str, axes: tuple[str, ...], after: Layout, dims: tuple[int, ...] = (), op: str = "sum") -> None:
        self.steps.append(Step(kind, axes, self.now, after, dims, op))
        self.now = after


def _runs(axes: Sequence[str], pending: dict[str, str]) -> list[tuple[str, ...]]:
    """Splits ``axes`` into maximal runs that are all pending or all replicated."""
    runs: list[tuple[str, ...]] = []
    for axis in axes:
        if runs and (runs[-1][0] in pending) == (axis in pending):
            runs[-1] = (*runs[-1], axis)
        else:
            runs.append((axis,))
    return runs


def elements(bounds: Sequence[tuple[int, int]]) -> int:
    """Number of elements within ``bounds``."""
    return math.prod(b - a for a, b in bounds)


def sent_elements(step: Step, shape: tuple[int, ...]) -> int:
    """Elements the busiest rank sends in one step, by the bandwidth-optimal algorithm of its collective.

    All-reduce ``2 (n-1)/n`` of the local tensor, all-gather and all-to-all and reduce-scatter ``(n-1)/n`` of the
    larger end, an exchange what its busiest rank must receive or send. Source: Thakur, Rabenseifner and Gropp,
    "Optimization of Collective Communication Operations in MPICH", 2005.
    """
    if step.kind == "slice":
        return 0
    n = step.source.mesh.count(step.axes)
    if step.kind == "exchange":
        routes = exchange_routes(step.source, step.target, shape)
        sent: dict[int, int] = {}
        for source, target, region in routes:
            if source != target:
                sent[source] = sent.get(source, 0) + elements(region)
        return max(sent.values(), default=0)
    before = max(elements(b) for b in step.source.bounds(shape).values())
    if step.kind == "all_reduce":
        return -(-2 * (n - 1) * before // n)
    if step.kind == "all_gather":
        after = max(elements(b) for b in step.target.bounds(shape).values())
        return -(-(n - 1) * after // n)
    return -(-(n - 1) * before // n)


Route = tuple[int, int, tuple[tuple[int, int], ...]]


@lru_cache(maxsize=4096)
def exchange_routes(source: Layout, target: Layout, shape: tuple[int, ...]) -> tuple[Route, ...]:
    """What an exact exchange moves: ``(from rank, to rank, region of the global tensor)``, in a fixed order.

    A rank keeps what it has. What it lacks comes from one of the ranks that hold it; where several do, they share the
    work. Regions of a target rank do not overlap and cover it.
    """
    have, want = source.bounds(shape), target.bounds(shape)
    holders: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for rank, bounds in have.items():
        holders.setdefault(bounds, []).append(rank)
    routes: list[Route] = []
    order = {rank: i for i, rank in enumerate(target.mesh.ranks)}
    for rank, bounds in want.items():
        for piece, ranks in holders.items():
            region = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(bounds, piece, strict=True))
            if all(a < b for a, b in region):
                chosen = rank if rank in ranks else ranks[order[rank] % len(ranks)]
                routes.append((chosen, rank, region))
    return tuple(routes)
