"""Planner: finds the cheapest steps from one layout to another.

It lists the few sequences that can be cheapest and takes the cheapest by :class:`Links` among those that

- move no more than the lower bound: without pending reductions, every rank receives exactly the elements that it lacks;
- hold nothing larger than the larger end (and 5 %) in between.

All sequences that can be cheapest have one form. Steps that shrink the tensor come first: slices, reduce-scatters. Then at
most one transfer, in which every axis that changes its place does so at once (two transfers one after the other move more than
one does). Then gathers, the slow links first, while the tensor is small. Sequences differ in which gathers the transfer
does too, how gathers are joined, and how pending sums that the target does not split are reduced: by an all-reduce, or
by a reduce-scatter over a spare dim that the gathers undo. A single exchange is always among them and meets both bounds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from shardwright.ir.layout import Layout
from shardwright.ir.step import Step
from shardwright.redistribute.layout_algebra import (
    _first_op,
    _one_to_one,
    _pending,
    _refines,
    _replicating,
    _runs,
    _with_dim,
    _with_suffixes,
)
from shardwright.redistribute.links import Links
from shardwright.redistribute.routes import common_prefix
from shardwright.redistribute.volume import (
    is_local,
    lacked,
    largest,
    lower_bound,
    peak_elements,
    received_elements,
    sent_elements,
)

MEMORY_SLACK = 1.05

# A price that is lower only by rounding errors does not count: the first path found, with fewer steps, stays.
_CHEAPER = 1 - 1e-9


@dataclass(frozen=True)
class Options:
    """Limits and prices for redistributions.

    Args:
        links: prices of messages.
        itemsize: bytes per element.
        enable_alltoall: where false, pieces move by all-gather and slice only (and, between different sets of ranks,
            by one exchange): more bytes and larger intermediates, for backends whose all-to-all is slow or missing.
    """

    links: Links = field(default_factory=Links)
    itemsize: int = 4
    enable_alltoall: bool = True


@dataclass(frozen=True)
class Path:
    """A layout, the steps that lead to it, and their price in seconds."""

    now: Layout
    steps: tuple[Step, ...] = ()
    price: float = 0.0


def cheapest(source: Layout, target: Layout, shape: tuple[int, ...], options: Options) -> tuple[Step, ...]:
    """Finds the cheapest steps between two layouts in normal form.

    Both are over one mesh, or ``target`` has no partial axes.

    Args:
        source, target: layouts before and after.
        shape: global shape.
        options: rules and prices.
    """
    planner = _Planner(source, target, shape, options)
    fallback: Path | None = None
    best: Path | None = None
    for path in planner.paths():
        fallback = fallback or path
        if path.price < planner.limit and planner.is_within_bounds(path.steps):
            best, planner.limit = path, path.price * _CHEAPER
    found = best or fallback
    assert found is not None, f"no steps from {source} to {target}"
    return found.steps


class _Planner:
    """One search for the cheapest path. ``limit`` is the best price so far; paths that reach it are dropped."""

    def __init__(self, source: Layout, target: Layout, shape: tuple[int, ...], options: Options):
        self.source, self.target, self.shape, self.options = source, target, shape, options
        self.limit = math.inf
        links = options.links
        self.message = links.launch + min([links.latency, *(latency for _, latency, _ in links.axes)])
        self.bandwidth = max([links.bandwidth, *(bandwidth for _, _, bandwidth in links.axes)])
        self.prices: dict[Step, float] = {}
        self.reached: dict[tuple[Layout, Layout], float] = {}

    def then(
        self, path: Path, kind: str, axes: Sequence[str], after: Layout, dims: tuple[int, ...] = (), op: str = "sum"
    ) -> Path:
        """Returns the path with one more step.

        Args:
            path: the path so far.
            kind, axes, dims, op: see :class:`~shardwright.ir.step.Step`.
            after: layout after the step.
        """
        step = Step(kind, tuple(axes), path.now, after, dims, op)
        if step not in self.prices:
            self.prices[step] = self.options.links.seconds(step, self.shape, self.options.itemsize)
        return Path(after, (*path.steps, step), path.price + self.prices[step])

    def is_hopeless(self, path: Path, messages: int) -> bool:
        """Tells whether a path with at least so many more messages cannot become the cheapest."""
        return path.price + messages * self.message >= self.limit

    def _needs_too_long(self, path: Path, target: Layout) -> bool:
        """Tells whether the bytes that must still arrive make a path too expensive."""
        if self.limit == math.inf or path.now == target:
            return False
        missing = int(lacked(path.now, target, self.shape).max(initial=0)) * self.options.itemsize
        return path.price + self.message + missing / self.bandwidth >= self.limit

    def is_within_bounds(self, steps: tuple[Step, ...]) -> bool:
        ends = max(largest(self.source, self.shape), largest(self.target, self.shape))
        if peak_elements(steps, self.shape) > MEMORY_SLACK * ends:
            return False
        if self.source.partial != self.target.partial:
            return True  # sums are done on the way, and the rank that combines an element may not be the one that needs it
        return sum(received_elements(step, self.shape) for step in steps) <= lower_bound(self.source, self.target, self.shape)

    # -- the sequences --------------------------------------------------------------------------------------------

    def paths(self) -> Iterator[Path]:
        start = Path(self.source)
        if self.source.mesh != self.target.mesh:
            for path in self.reduced(start):
                yield from self.across(path)
            return
        sliced = self.split(start, slices_only=True)
        starts = [self.split(start), sliced]
        pending = _pending(self.source, self.target)
        reduces = self.options.enable_alltoall and len(set(pending.values())) == 1
        if reduces:
            starts += self._shared(sliced)
        for at in {path.steps: path for path in starts}.values():
            for path in self.reduced(at):
                yield from self.moved(self.split(path))
        if reduces:
            yield from self._moved_then_reduced(sliced)

    def split(self, path: Path, slices_only: bool = False) -> Path:
        """Slices dims by replicated axes and reduce-scatters them by partial ones. It goes as far as the target does.

        Slices first: they cost nothing and make what follows smaller. A rank keeps all it has of its target piece.
        """
        for only_slices in (True,) if slices_only else (True, False):
            for dim in range(path.now.ndim):
                path = self._split_dim(path, dim, only_slices)
        return path

    def _split_dim(self, path: Path, dim: int, slices_only: bool) -> Path:
        if path.now.bound[dim] == self.target.bound[dim] or not _refines(self.target, path.now, dim, self.shape):
            return path
        entering = self.target.bound[dim][len(path.now.bound[dim]) :]
        pending = _pending(path.now, self.target)
        runs = _runs(entering, pending)
        if self.target.sizes[dim] is not None and len(runs) > 1:
            return path  # explicit sizes exist for the whole list of axes only
        for run in runs:
            if any(a in path.now.split_axes or a in self.target.partial_axes for a in run):
                return path
            op = pending.get(run[0])
            if op is not None and (slices_only or any(pending[a] != op for a in run) or op != _first_op(pending)):
                return path
            after = _with_dim(path.now, self.target, dim, path.now.bound[dim] + run, run)
            path = self.then(path, "slice" if op is None else "reduce_scatter", run, after, (dim,), op or "sum")
        return path

    def reduced(self, path: Path) -> Iterator[Path]:
        """Reduces what is left of the pending reductions; sums before maxima before minima."""
        pending = _pending(path.now, self.target)
        if self.is_hopeless(path, messages=1 if pending else 0):
            return
        if not pending:
            yield path
        elif not self.options.enable_alltoall or len(set(pending.values())) > 1:
            op = _first_op(pending)
            yield from self.reduced(self._all_reduced(path, tuple(a for a in pending if pending[a] == op), op))
        else:
            (op,) = set(pending.values())
            together = [tuple(pending)]
            if len(pending) > 1 and not self.is_hopeless(path, messages=2):
                # one after the other: fast links first, while the tensor is large
                speed, size = self.options.links.speed, path.now.mesh.axis_size
                together.append((min(pending, key=lambda a: (-speed((a,))[1], -size(a))),))
            for axes in together:
                yield from self.reduced(self._all_reduced(path, axes, op))
                for scattered in itertools.islice(self._scattered(path, axes, op), None if len(axes) == len(pending) else 1):
                    yield from self.reduced(self.split(scattered) if len(axes) < len(pending) else scattered)

    def _all_reduced(self, path: Path, axes: tuple[str, ...], op: str) -> Path:
        partial = [p for p in path.now.partial if p[0] not in axes]
        return self.then(path, "all_reduce", axes, Layout.of(path.now.mesh, path.now.bound, partial, path.now.sizes), (), op)

    def _scattered(self, path: Path, axes: tuple[str, ...], op: str) -> Iterator[Path]:
        """Reduce-scatters over a dim that need not be split in the target."""
        for dim in self._roomy(path.now, axes):
            yield self.then(path, "reduce_scatter", axes, self._finer(path.now, dim, axes, axes), (dim,), op)

    def _shared(self, path: Path) -> Iterator[Path]:
        """Shares the reduction among replicas: each first slices its own part, whatever the target does with it."""
        spare = _replicating(path.now)
        roomy = self._roomy(path.now, spare) if spare else []
        # not where the target wants the sums scattered, since those go there directly
        for dim in sorted(roomy, key=lambda d: len({*path.now.partial_axes} & {*self.target.bound[d]}))[:1]:
            yield self.then(path, "slice", spare, self._finer(path.now, dim, spare), (dim,))

    def _moved_then_reduced(self, path: Path) -> Iterator[Path]:
        """Moves the parts to where the target has them, then reduce-scatters straight into it."""
        pending = _pending(path.now, self.target)
        dims = [tuple(itertools.takewhile(lambda a: a not in pending, axes)) for axes in self.target.bound]
        sizes = [n if axes == own else None for n, axes, own in zip(self.target.sizes, dims, self.target.bound, strict=True)]
        between = Layout.of(path.now.mesh, dims, path.now.partial, sizes)
        if between == path.now:
            return
        for moved in self.moved(path, between):
            for reduced in self.reduced(self.split(moved)):
                yield from self.moved(self.split(reduced))

    def _finer(self, now: Layout, dim: int, axes: tuple[str, ...], reduced: Sequence[str] = ()) -> Layout:
        """Splits a dim of ``now`` by these axes too. It uses the target's explicit sizes only if each lies within a piece."""
        after = _with_dim(now, self.target, dim, now.bound[dim] + axes, reduced)
        return after if _refines(after, now, dim, self.shape) else _with_dim(now, now, dim, now.bound[dim] + axes, reduced)

    def _roomy(self, layout: Layout, axes: Sequence[str]) -> list[int]:
        """Returns at most two dims that `axes` can split too, evenly if possible; first those where the target has them."""
        count = layout.mesh.count(axes)
        free = [d for d in range(layout.ndim) if layout.sizes[d] is None]
        now = {d: layout.mesh.count(layout.bound[d]) for d in free}
        even = [d for d in free if self.shape[d] and self.shape[d] % (now[d] * count) == 0]
        roomy = even or [d for d in free if self.shape[d] >= 2 * count * now[d]]
        return sorted(roomy, key=lambda d: not set(axes) & set(self.target.bound[d]))[:2]

    def moved(self, path: Path, target: Layout | None = None) -> Iterator[Path]:
        """Yields the paths to the target on one mesh. Only reductions that the target keeps may be pending."""
        target = target or self.target
        if self.is_hopeless(path, messages=0 if path.now == target else 1) or self._needs_too_long(path, target):
            return
        if self.source.partial != self.target.partial and path.price >= self.reached.get((path.now, target), math.inf):
            return  # a cheaper path has been here
        self.reached[path.now, target] = path.price
        if path.now == target:
            yield path
        elif not self.options.enable_alltoall:
            yield from self._gathered_and_sliced(path)
        elif all(_refines(path.now, target, d, self.shape) for d in range(path.now.ndim)):
            yield from self.gathered(path, target)
        else:
            yield self.transfer(path, target)
            for between in self._on_the_way(path.now, target):
                if not self.is_hopeless(path, messages=1 if between == path.now else 2):
                    moved = path if between == path.now else self.transfer(path, between)
                    yield from self.gathered(moved, target)

    def _on_the_way(self, now: Layout, target: Layout) -> Iterator[Layout]:
        """Yields the layouts from which only gathers are left."""
        speed = self.options.links.speed
        leaving = sorted((a for a in now.split_axes if a not in target.split_axes), key=lambda a: speed((a,))[1])
        for count in range(len(leaving)):  # the transfer takes over the gathers with the slowest links
            between = _with_suffixes(now, target, leaving[count:])
            if between is not None:
                yield between
        if self.options.links.axes and self.source.partial != target.partial:
            # replicas each take a part over the slow links, and share what they took over the fast ones
            yield from self._spread(target, [a for a in _replicating(target) if a in _replicating(now)])

    def _spread(self, layout: Layout, spare: Sequence[str]) -> Iterator[Layout]:
        """Yields the layout split further by axes that replicate it."""
        for dim in self._roomy(layout, spare) if spare else ():
            yield _with_dim(layout, layout, dim, (*layout.bound[dim], *spare))

    def transfer(self, path: Path, after: Layout) -> Path:
        """Returns the path with one step in which every rank gets what it lacks. Its kind is the most specific one."""
        now = path.now
        if now.mesh == after.mesh:
            dims = _one_to_one(now, after, self.shape)
            if dims is not None:
                run = now.bound[dims[0]][len(after.bound[dims[0]]) :]
                return self.then(path, "all_to_all", run, after, dims)
        may_be_local = now.mesh != after.mesh or any(now.sizes) or any(after.sizes) or 0 in self.shape
        if may_be_local and is_local(now, after, self.shape):
            return self.then(path, "slice", (), after)
        same_ranks = now.mesh.ranks == after.mesh.ranks or sorted(now.mesh.ranks) == sorted(after.mesh.ranks)
        is_permute = same_ranks and all(
            now.mesh.count(now.bound[d]) == after.mesh.count(after.bound[d]) and now.pieces(d, n) == after.pieces(d, n)
            for d, n in enumerate(self.shape)
        )
        return self.then(path, "permute" if is_permute else "exchange", (), after)

    def gathered(self, path: Path, target: Layout) -> Iterator[Path]:
        """Yields paths with the remaining gathers, the slowest links first.

        They are joined in one, dim by dim, or one axis at a time.
        """
        left = {d: axes[len(target.bound[d]) :] for d, axes in enumerate(path.now.bound) if axes != target.bound[d]}
        if self.is_hopeless(path, messages=1 if left else 0):
            return
        if not left:
            yield path
            return
        everything = tuple(a for axes in left.values() for a in axes)
        yield self.then(path, "all_gather", everything, target, tuple(left))
        if len(left) > 1:
            by_dim = path
            for dim, axes in sorted(left.items(), key=lambda gather: self.options.links.speed(gather[1])[1]):
                by_dim = self.then(by_dim, "all_gather", axes, _with_dim(by_dim.now, target, dim, target.bound[dim]), (dim,))
            yield by_dim
        if len(everything) > 1:
            yield self._gathered_by_axis(path, target, left)

    def _gathered_by_axis(self, path: Path, target: Layout, left: dict[int, tuple[str, ...]]) -> Path:
        left, links = dict(left), self.options.links
        while left:
            # explicit sizes exist for the whole list of axes only
            runs = {d: axes if path.now.sizes[d] or target.sizes[d] else axes[-1:] for d, axes in left.items()}
            dim = min(runs, key=lambda d: (links.speed(runs[d])[1], d))
            path = self.then(
                path, "all_gather", runs[dim], _with_dim(path.now, target, dim, path.now.bound[dim][: -len(runs[dim])]), (dim,)
            )
            left[dim] = left[dim][: -len(runs[dim])]
            if not left[dim]:
                del left[dim]
        return path

    def _gathered_and_sliced(self, path: Path) -> Iterator[Path]:
        """Gathers every dim back to where both layouts agree, then slices. For use without all-to-all."""
        dims, sizes = list(path.now.bound), list(path.now.sizes)
        arriving = {a for d, axes in enumerate(self.target.bound) for a in axes if a not in path.now.bound[d]}
        for dim, axes in enumerate(path.now.bound):
            keep = min([common_prefix(axes, self.target.bound[dim]), *(i for i, a in enumerate(axes) if a in arriving)])
            plain = sizes[dim] is None and self.target.sizes[dim] is None
            if not plain and not _refines(self.target, path.now, dim, self.shape):
                keep = len(self.target.bound[dim]) if _refines(path.now, self.target, dim, self.shape) else 0
                sizes[dim] = self.target.sizes[dim] if keep else None
            if keep < len(axes):
                dims[dim] = axes[:keep]
                sizes[dim] = self.target.sizes[dim] if dims[dim] == self.target.bound[dim] else None
        common = Layout.of(path.now.mesh, dims, path.now.partial, sizes)
        for gathered in self.gathered(path, common) if common != path.now else (path,):
            yield self.split(gathered)

    # -- between meshes -------------------------------------------------------------------------------------------

    def across(self, path: Path) -> Iterator[Path]:
        """Yields paths to another mesh, over the same ranks or others.

        If few ranks would send much, the receivers share the work.
        """
        now, target = path.now, self.target
        if now.bounds(self.shape) == target.bounds(self.shape):
            yield Path(target, path.steps, path.price)
            return
        if not self.options.enable_alltoall and set(target.mesh.ranks) == set(now.mesh.ranks):
            whole = Layout.replicated(now.mesh, now.ndim)
            for gathered in self.gathered(path, whole):
                yield self.then(gathered, "slice", (), target)
            return
        direct = self.transfer(path, target)
        yield direct
        step = direct.steps[-1]
        if not step.communicates or sent_elements(step, self.shape) <= int(lacked(now, target, self.shape).max(initial=0)):
            return
        for spread in self._spread(target, _replicating(target)):
            yield from self.gathered(self.transfer(path, spread), target)


# -- comparing layouts -----------------------------------------------------------------------------------------------------
