"""The steps of a redistribution on one rank's tensor: the collectives of the distributed world.

:func:`prepare_steps` turns steps into a :class:`Runner` once, when a program is bound: bounds, split sizes, permutations
and the process group are worked out there, so that running it is a collective and the copies that its layout asks for.

Invariants:

- A step lists its group in the order of its axes, ``torch.distributed`` in ascending order of ranks. Tensors travel in
  torch's order and are put into the step's where the two differ.
- Every rank of a group chooses the same algorithm: choices depend on the step, the global shape and the dtype only.
- On gloo, sums run in the step's order, first to last, as in the simulated world: see :mod:`.summation`.
- The argument is never changed, unless ``inplace`` says that it may be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from shardwright.capture.torch_private import job_timeout
from shardwright.errors import WorldError
from shardwright.redistribute.routes import exchange_routes
from shardwright.redistribute.step import TRANSFERS, Step
from shardwright.world.calibration import Calibration, load
from shardwright.world.collectives import Handle, Link, Operation, backend_of
from shardwright.world.point_to_point import Scratch
from shardwright.world.transfer import Transfer, count, cutter

Local = Callable[[Tensor], Tensor]
Shape = tuple[int, ...]
Bounds = tuple[tuple[int, int], ...]

_MANY = 1 << 18  # elements from which copying them costs more than a few messages

_CLOSED = "this distributed world was closed: bind the program again in a new one"


class UnderWay(Protocol):
    """What was started; :meth:`wait` ends it."""

    def wait(self) -> Tensor: ...


class Runner(Protocol):
    """Steps prepared for one rank: a function of its local tensor, that may be started now and ended later."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def start(self, x: Tensor) -> UnderWay: ...


class Groups:
    """The process groups that steps communicate over: one for every distinct set of ranks, made once.

    Args:
        rank: this rank, ``size`` the number of all ranks.
        device_type: ``cpu`` or ``cuda``: it says which backend serves the tensors.
        calibration: what is fastest; the same on every rank.
    """

    def __init__(self, rank: int, size: int, device_type: str = "cpu", calibration: Calibration | None = None):
        self.rank, self.size, self.device_type = rank, size, device_type
        self.closed = False
        self.calibration = calibration
        self.scratch = Scratch()
        self.is_gloo = backend_of(dist.group.WORLD, device_type) == "gloo"
        self._links: dict[Shape, Link] = {}
        self._made: dict[Shape, Any] = {}

    def make(self, steps: Iterable[Step]) -> None:
        """Makes the groups that ``steps`` need; to be called by all ranks with the same steps."""
        if self.closed:
            raise WorldError(_CLOSED)
        if self.calibration is None and self.is_gloo:
            self.calibration = _agreed_calibration(self.rank)
        everyone = tuple(range(self.size))
        wanted: set[Shape] = set()
        for step in steps:
            if self.is_gloo and step.kind in (*TRANSFERS, "all_gather"):
                wanted.add(everyone)  # for direct messages any group will do
            if step.kind in TRANSFERS and self.is_gloo:
                continue
            if step.kind != "slice":
                wanted.update(tuple(sorted(group)) for group in step.groups)
        for ranks in sorted(r for r in wanted if len(r) > 1 and r not in self._made):
            whole = len(ranks) == self.size
            group = dist.group.WORLD if whole else dist.new_group(list(ranks), timeout=job_timeout(self.device_type))
            self._made[ranks] = None if whole else group
            if self.rank in ranks:
                is_gloo = backend_of(group, self.device_type) == "gloo"
                self._links[ranks] = Link(ranks, group, is_gloo, self.calibration, self.scratch)

    def link(self, members: Sequence[int]) -> Link:
        ranks = tuple(sorted(members))
        if ranks not in self._links:
            raise WorldError(f"no process group for ranks {ranks}: Groups.make was not told of the step")
        return self._links[ranks]

    def close(self, destroy: bool) -> None:
        """Lets go of the groups, so that their threads end before the interpreter does; ``destroy`` ends them too."""
        for link in self._links.values():
            link.close()
        if destroy:
            for ranks, group in self._made.items():
                if group is not None and self.rank in ranks:
                    dist.destroy_process_group(group)
        self._links, self._made, self.closed = {}, {}, True


def _agreed_calibration(rank: int) -> Calibration:
    """Rank 0's, on every rank: ranks that chose different algorithms would wait for each other for ever."""
    values = [load().to_dict() if rank == 0 else None]
    dist.broadcast_object_list(values, 0)
    return Calibration.from_dict(values[0])


# -- preparing ---------------------------------------------------------------------------------------------------------


def prepare(step: Step, shape: Shape, rank: int, groups: Groups, inplace: bool = False) -> Runner:
    """The step as a function of the local tensor.

    Args:
        shape: global shape.
        rank: the rank it runs on; ``groups`` must hold the step's group.
        inplace: whether the function may overwrite its argument.

    Returns:
        A function of the tensor that ``rank`` holds in ``step.source`` to the one it holds in ``step.target``. All
        ranks of the group must call it.
    """
    at = _Place(step, shape, rank, groups)
    if step.kind == "slice":
        return _OnlyLocal(_slice(at))
    if step.kind in TRANSFERS:
        routes = exchange_routes(step.source, step.target, shape)
        moves = any(source != target for source, target, _ in routes)
        return _transfer(at, routes) if groups.is_gloo and moves else _exchange(at, routes)
    if len(at.members) == 1:
        return _OnlyLocal(_same)
    if step.kind == "all_reduce":
        return at.link.prepare_all_reduce(math.prod(at.local), step.op, at.order, inplace)
    return _all_gather(at) if step.kind == "all_gather" else _reduce_scatter(at)


def prepare_steps(
    steps: Sequence[Step], shape: Shape, rank: int, groups: Groups, inplace: bool = False, compact: bool = False
) -> Runner:
    """All ``steps``, one after the other, as a function of the local tensor.

    A rank that a step's source does not have hands it an empty tensor, of the right dtype; one that its target does not
    have gets an empty tensor.

    Args:
        inplace: whether the function may overwrite its argument.
        compact: whether the result must not be a view into the argument, which it would keep alive.
    """
    runs: list[Runner] = []
    own, is_view = inplace, False  # whether nobody else reads what the next step is given; whether it is a view
    for step in steps:
        if rank not in step.source.mesh.ranks and rank not in step.target.mesh.ranks:
            continue
        run = prepare(step, shape, rank, groups, own)
        if not (isinstance(run, _OnlyLocal) and run.function is _same):
            runs.append(run)
            is_view = step.kind == "slice"
            own = own or not is_view
    if is_view and (compact or own):
        runs.append(_OnlyLocal(_copy))
    return runs[0] if len(runs) == 1 else _Chain(runs)


def prepare_shared(
    steps: Sequence[Sequence[Step]], shapes: Sequence[Shape], rank: int, groups: Groups, views: bool = False
) -> SharedRunner:
    """Steps of the same kinds over the same axes, for tensors of their own, each kind as one collective.

    Args:
        steps: of each tensor: all-reduces, or all-gathers or reduce-scatters between pieces of one size.
        shapes: global shapes.
        views: whether results may share one tensor's memory; they live no longer than each other then.

    Returns:
        A function of the local tensors to the resulting ones, that may be started now and ended later.
    """
    stages = [_shared(list(at), shapes, rank, groups, views) for at in zip(*steps, strict=True)]
    return SharedRunner(stages)


def _shared(steps: Sequence[Step], shapes: Sequence[Shape], rank: int, groups: Groups, views: bool) -> _SharedStage:
    places = [_Place(step, shape, rank, groups) for step, shape in zip(steps, shapes, strict=True)]
    at, link = places[0], places[0].link
    own, n = [math.prod(place.local) for place in places], places[0].link.size
    if at.step.kind == "all_reduce":
        locals_ = [place.local for place in places]
        return _SharedStage(
            lambda values: torch.cat([v.reshape(-1) for v in values]),
            link.prepare_all_reduce(sum(own), at.step.op, at.order, inplace=True),
            lambda flat: _cut_up(flat, locals_, views),
        )
    if at.step.kind == "all_gather":
        finish = [_unpack_gathered(place) for place in places]

        def unpack(flat: Tensor) -> list[Tensor]:
            return [f(part.reshape(-1)) for f, part in zip(finish, flat.view(n, -1).split(own, 1), strict=True)]

        gather = link.prepare_all_gather([sum(own)] * n)
        return _SharedStage(lambda values: torch.cat([v.reshape(-1) for v in values]), gather, unpack)
    packs = [_pack_for_members(place, place.step.dims[0])[0] for place in places]
    results = [place.result for place in places]
    return _SharedStage(
        lambda values: torch.cat([pack(v).view(n, -1) for pack, v in zip(packs, values, strict=True)], 1).view(-1),
        link.prepare_reduce_scatter([sum(map(math.prod, results))] * n, at.step.op, at.order),
        lambda flat: _cut_up(flat, results, views),
    )


def _cut_up(flat: Tensor, shapes: Sequence[Shape], views: bool) -> list[Tensor]:
    """Tensors of these shapes, each in memory of its own unless ``views`` are good enough."""
    parts = flat.split([math.prod(s) for s in shapes])
    return [(part if views else part.clone()).view(shape) for part, shape in zip(parts, shapes, strict=True)]


class _SharedStage(NamedTuple):
    """One collective between what packs many tensors into its argument and what unpacks its result."""

    pack: Callable[[Sequence[Tensor]], Tensor]
    operation: Operation
    unpack: Callable[[Tensor], list[Tensor]]

    def __call__(self, values: Sequence[Tensor]) -> list[Tensor]:
        return self.unpack(self.operation(self.pack(values)))


class SharedRunner:
    """Collectives of many tensors, one after the other."""

    def __init__(self, stages: Sequence[_SharedStage]):
        self.stages = stages

    def __call__(self, values: Sequence[Tensor]) -> list[Tensor]:
        for stage in self.stages:
            values = stage(values)
        return list(values)

    def start(self, values: Sequence[Tensor]) -> SharedUnderWay:
        """Starts the first; the others follow when it is waited for."""
        if not self.stages:
            return SharedUnderWay((), None, list(values))
        stage = self.stages[0]
        return SharedUnderWay(self.stages, stage.operation.start(stage.pack(values)), None)


class SharedUnderWay:
    """What was started for many tensors; :meth:`wait` ends it."""

    def __init__(self, stages: Sequence[_SharedStage], under_way: Handle | None, results: list[Tensor] | None):
        self.stages, self.under_way, self.results = stages, under_way, results

    def wait(self) -> list[Tensor]:
        if self.results is None:
            assert self.under_way is not None
            self.results = self.stages[0].unpack(self.under_way.wait())
            self.under_way = None
            for stage in self.stages[1:]:
                self.results = stage(self.results)
        return self.results


class _Done:
    """What was over when it began."""

    def __init__(self, result: Tensor):
        self.result = result

    def wait(self) -> Tensor:
        return self.result


class _OnlyLocal:
    """A function of the local tensor alone."""

    def __init__(self, function: Local):
        self.function = function

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def start(self, x: Tensor) -> UnderWay:
        return _Done(self.function(x))


class _Between:
    """A collective between what packs its argument and what unpacks its result."""

    def __init__(self, pack: Local, operation: Operation, unpack: Local):
        self.pack, self.operation, self.unpack = pack, operation, unpack

    def __call__(self, x: Tensor) -> Tensor:
        return self.unpack(self.operation(self.pack(x)))

    def start(self, x: Tensor) -> UnderWay:
        return _Followed(self.operation.start(self.pack(x)), self.unpack)


class _Chain:
    """Runners one after the other. Started, it goes on by itself as far as the first that communicates."""

    def __init__(self, runs: Sequence[Runner]):
        self.runs = tuple(runs)
        self.first = next((i for i, run in enumerate(runs) if not isinstance(run, _OnlyLocal)), len(runs))

    def __call__(self, x: Tensor) -> Tensor:
        for run in self.runs:
            x = run(x)
        return x

    def start(self, x: Tensor) -> UnderWay:
        for run in self.runs[: self.first]:
            x = run(x)
        if self.first == len(self.runs):
            return _Done(x)
        under_way = self.runs[self.first].start(x)
        rest = self.runs[self.first + 1 :]
        return _Followed(under_way, _Chain(rest)) if rest else under_way


class CastRunner:
    """A runner whose argument is cast to one dtype, and whose result is cast to another."""

    def __init__(self, runner: Runner, before: torch.dtype, after: torch.dtype):
        self.runner, self.before, self.after = runner, before, after

    def __call__(self, x: Tensor) -> Tensor:
        return self.runner(x.to(self.before)).to(self.after)

    def start(self, x: Tensor) -> UnderWay:
        return _Followed(self.runner.start(x.to(self.before)), lambda result: result.to(self.after))


class _Followed:
    """What is under way, and what is to be done with its result."""

    def __init__(self, under_way: UnderWay, then: Local):
        self.under_way, self.then = under_way, then

    def wait(self) -> Tensor:
        return self.then(self.under_way.wait())


class _Place:
    """A step seen from one rank: who takes part, and what each of them holds before and after."""

    def __init__(self, step: Step, shape: Shape, rank: int, groups: Groups):
        self.step, self.shape, self.rank, self.groups = step, shape, rank, groups
        self.have, self.want = step.source.bounds(shape), step.target.bounds(shape)
        moves = step.kind in ("exchange", "permute")  # between sets of ranks that need not be the same
        if (rank not in self.have and rank not in self.want) or not (moves or (rank in self.have and rank in self.want)):
            raise WorldError(f"rank {rank} takes no part in {step}: its mesh has ranks {sorted(self.have)}")
        self.members: list[int] = next(g for g in step.groups if rank in g)
        self.sorted_members = sorted(self.members)
        # position in torch's order of the first, second, ... member in the step's order
        self.order = [self.sorted_members.index(m) for m in self.members]
        self.is_sorted = self.members == self.sorted_members

    @property
    def link(self) -> Link:
        return self.groups.link(self.members)

    @property
    def local(self) -> Shape:
        """Shape of what this rank holds before the step; ``result`` after it."""
        return _extent(self.have[self.rank])

    @property
    def result(self) -> Shape:
        return _extent(self.want[self.rank])


def _extent(bounds: Bounds) -> Shape:
    return tuple(b - a for a, b in bounds)


def _same(x: Tensor) -> Tensor:
    return x


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


# -- steps -------------------------------------------------------------------------------------------------------------


def _slice(at: _Place) -> Local:
    cuts = []
    for dim, ((a, b), (c, d)) in enumerate(zip(at.have[at.rank], at.want[at.rank], strict=True)):
        if (a, b) != (c, d):
            cuts.append((dim, min(c - a, b - a), d - c))
    if not cuts:
        return _same
    if len(cuts) == 1:
        dim, start, length = cuts[0]
        return lambda x: x.narrow(dim, start, length)

    def run(x: Tensor) -> Tensor:
        for dim, start, length in cuts:
            x = x.narrow(dim, start, length)
        return x

    return run


def _all_gather(at: _Place) -> Runner:
    sizes = [math.prod(_extent(at.have[r])) for r in at.sorted_members]
    if at.groups.is_gloo and sum(sizes) >= _MANY and not (at.is_sorted and _is_outermost(at.step.dims, at.result)):
        # each piece is put in its place as it arrives, while others are on their way
        routes = [(m, at.rank, at.have[m]) for m in at.members] + [(at.rank, m, at.have[at.rank]) for m in at.members]
        return _transfer(at, [route for route in dict.fromkeys(routes) if count(route[2])])
    return _Between(_same, at.link.prepare_all_gather(sizes), _unpack_gathered(at))


def _is_outermost(dims: tuple[int, ...], result: Shape) -> bool:
    """Whether pieces along ``dims``, one after the other in memory, are the result."""
    return len(dims) == 1 and math.prod(result[: dims[0]]) <= 1


def _unpack_gathered(at: _Place) -> Local:
    shapes = [_extent(at.have[r]) for r in at.sorted_members]
    return _unpack(shapes, at.step.dims[0], at.result, at.order) if len(at.step.dims) == 1 else _place_all(at)


def _reduce_scatter(at: _Place) -> Runner:
    result = at.result
    pack, sizes = _pack_for_members(at, at.step.dims[0])
    return _Between(pack, at.link.prepare_reduce_scatter(sizes, at.step.op, at.order), lambda flat: flat.view(result))


def _pack_for_members(at: _Place, dim: int) -> tuple[Local, list[int]]:
    """Cuts the local tensor along ``dim`` into what each member wants: a flat tensor in torch's order; the sizes."""
    local, (start, stop) = at.local, at.have[at.rank][dim]
    spans = []
    for member in at.sorted_members:
        a, b = at.want[member][dim]
        spans.append((min(a - start, stop - start), b - a))
    rest = math.prod(local[:dim]) * math.prod(local[dim + 1 :])
    sizes = [length * rest for _, length in spans]
    if at.is_sorted and math.prod(local[:dim]) <= 1:
        return lambda x: x.reshape(-1), sizes
    n, length = len(spans), spans[0][1]
    if at.is_sorted and all(s == (i * length, length) for i, s in enumerate(spans)):
        return lambda x: x.unflatten(dim, (n, length)).movedim(dim, 0).reshape(-1), sizes
    return lambda x: torch.cat([x.narrow(dim, a, length).reshape(-1) for a, length in spans]), sizes


def _unpack(shapes: list[Shape], dim: int, result: Shape, order: list[int]) -> Local:
    """Puts pieces of these shapes, flat and in torch's order, together along ``dim`` in the order of ``order``."""
    is_sorted = order == list(range(len(order)))
    if is_sorted and _is_outermost((dim,), result):
        return lambda flat: flat.view(result)
    stacked = (len(shapes), *shapes[0])
    if is_sorted and len(set(shapes)) == 1:
        return lambda flat: flat.view(stacked).movedim(0, dim).reshape(result)
    sizes = [math.prod(s) for s in shapes]

    def run(flat: Tensor) -> Tensor:
        parts = flat.split(sizes)
        return torch.cat([parts[i].view(shapes[i]) for i in order], dim)

    return run


def _place_all(at: _Place) -> Local:
    """Puts pieces, flat and in torch's order, together along several dims."""
    counts = [at.step.source.mesh.count(at.step.source.bound[d][len(at.step.target.bound[d]) :]) for d in at.step.dims]
    shapes, result = [_extent(at.have[r]) for r in at.sorted_members], at.result
    if at.is_sorted and len(set(shapes)) == 1:
        stacked = (*counts, *shapes[0])
        order: list[int] = []
        for dim in range(len(result)):
            if dim in at.step.dims:
                order.append(at.step.dims.index(dim))
            order.append(len(counts) + dim)
        return lambda flat: flat.view(stacked).permute(order).reshape(result)
    sizes = [math.prod(s) for s in shapes]
    places = [cutter(at.have[r], at.want[at.rank]) if math.prod(s) else None for r, s in zip(at.sorted_members, shapes)]

    def run(flat: Tensor) -> Tensor:
        out = flat.new_empty(result)
        for place, part, shape in zip(places, flat.split(sizes), shapes):
            if place is not None:
                place(out).copy_(part.view(shape))
        return out

    return run


def _transfer(at: _Place, routes: Sequence[tuple[int, int, Bounds]]) -> Runner:
    """By direct messages among all ranks, whatever their groups."""
    everyone = at.groups.link(range(at.groups.size))
    return Transfer(everyone, routes, at.have.get(at.rank), at.want.get(at.rank))


def _exchange(at: _Place, routes: Sequence[tuple[int, int, Bounds]]) -> Runner:
    """By the backend's all-to-all: all a rank sends is packed into one flat tensor, in the order of ranks."""
    have, want, rank, members = at.have.get(at.rank), at.want.get(at.rank), at.rank, at.sorted_members
    counts = {(members.index(s), members.index(t)): count(g) for s, t, g in routes if s in members and t in members}
    outgoing, incoming = {t: g for s, t, g in routes if s == rank}, {s: g for s, t, g in routes if t == rank}
    result = (0,) if want is None else _extent(want)
    take = [cutter(outgoing[r], have) for r in members if r in outgoing]
    put = [(cutter(incoming[r], want), _extent(incoming[r])) for r in members if r in incoming]
    sizes = [count(incoming[r]) for r in members if r in incoming]

    def pack(x: Tensor) -> Tensor:
        return torch.cat([cut(x).reshape(-1) for cut in take]) if take else x.new_empty(0)

    def unpack(flat: Tensor) -> Tensor:
        if len(put) == 1:
            return flat.view(result)  # all of it comes from one rank
        out = flat.new_empty(result)
        for (place, extent), part in zip(put, flat.split(sizes) if sizes else ()):
            place(out).copy_(part.view(extent))
        return out

    if all(s == t for s, t, _ in routes):  # nothing moves
        return _OnlyLocal(lambda x: unpack(pack(x)))
    return _Between(pack, at.link.prepare_exchange(counts), unpack)
