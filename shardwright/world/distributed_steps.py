"""The steps of a redistribution on one rank's tensor: the collectives of the distributed world.

:func:`prepare` turns a step into a closure once, when a program is bound: bounds, split sizes, permutations and the
process group are worked out there, so that running it is a collective and the copies that its layout asks for.

Invariants:

- A step lists its group in the order of its axes, ``torch.distributed`` in ascending order of ranks. Tensors travel in
  torch's order and are put into the step's where the two differ.
- Every rank of a group chooses the same algorithm: choices depend on the step, the global shape and the dtype only.
- Sums done here run in the step's order, first to last, as in the simulated world.
- The argument is never changed, unless ``inplace`` says that it may be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwright.errors import WorldError
from shardwright.redistribute.routes import exchange_routes
from shardwright.redistribute.step import TRANSFERS, Step
from shardwright.world.transfer import Route, Transfer, count, cutter

Run = Callable[[Tensor], Tensor]
Shape = tuple[int, ...]
Bounds = tuple[tuple[int, int], ...]

# The names before torch 2.13 and since.
_all_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_REDUCE = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
_COMBINE: dict[str, Any] = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}

# What gloo and NCCL reduce. (gloo adds bools as bytes, which makes a bool of 2; neither knows int16.)
_REDUCIBLE = frozenset(
    {torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64}
    | {torch.complex64, torch.complex128}
)
_MOVABLE = _REDUCIBLE | {torch.bool}  # what they move; anything else travels as bytes

# gloo's latency is in its rounds: its ring takes n-1 of them, an all-to-all of copies one. Up to this many elements in
# all the copies are cheaper (2 to 4 ranks of one machine, float32).
_ONE_ROUND = 1 << 16


_CLOSED = "this distributed world was closed: bind the program again in a new one"


class _Closed:
    """What stands for a process group once its world is closed."""

    def __getattr__(self, name: str) -> Any:
        raise WorldError(_CLOSED)


class Link:
    """One process group, seen from one of its ranks.

    Args:
        ranks: its ranks in torch's order, ascending.
        group: the process group.
        is_gloo: whether gloo serves it, whose own reduce-scatter and all-gather are not the fastest way.
    """

    __slots__ = ("group", "is_gloo", "ranks", "size")

    def __init__(self, ranks: Shape, group: Any, is_gloo: bool):
        self.ranks, self.group, self.is_gloo = ranks, group, is_gloo
        self.size = len(ranks)

    def all_reduce(self, tensor: Tensor, op: str) -> None:
        dist.all_reduce(tensor, _REDUCE[op], self.group)

    def all_gather(self, out: Tensor, piece: Tensor) -> None:
        """Contiguous tensors; ``out`` is the pieces of all, which have one shape, along dim 0."""
        if piece.dtype not in _MOVABLE:
            out, piece = out.view(torch.uint8), piece.view(torch.uint8)
        _all_gather_single(out, piece, self.group)

    def reduce_scatter(self, out: Tensor, whole: Tensor, op: str) -> None:
        """Contiguous tensors; ``whole`` is what all get, in one shape, along dim 0."""
        _reduce_scatter_single(out, whole, _REDUCE[op], self.group)

    def all_to_all(self, out: Tensor, packed: Tensor, received: list[int] | None = None, sent: list[int] | None = None) -> None:
        """Flat tensors; elements received from and sent to each rank, where they are not all the same."""
        if packed.dtype not in _MOVABLE:
            width = packed.dtype.itemsize
            out, packed = out.view(torch.uint8), packed.view(torch.uint8)
            received = [n * width for n in received] if received else None
            sent = [n * width for n in sent] if sent else None
        dist.all_to_all_single(out, packed, received, sent, self.group)


class Groups:
    """The process groups that steps communicate over: one for every distinct set of ranks, made once.

    Args:
        rank: this rank, ``size`` the number of all ranks.
        device_type: ``cpu`` or ``cuda``: it says which backend serves the tensors.
    """

    def __init__(self, rank: int, size: int, device_type: str = "cpu"):
        self.rank, self.size, self.device_type = rank, size, device_type
        self.closed = False
        self.is_gloo = backend_of(dist.group.WORLD, device_type) == "gloo"
        self._links: dict[Shape, Link] = {}
        self._made: dict[Shape, Any] = {}

    def make(self, steps: Iterable[Step]) -> None:
        """Makes the groups that ``steps`` need; to be called by all ranks with the same steps."""
        if self.closed:
            raise WorldError(_CLOSED)
        local = {"slice", "exchange", "permute"} if self.is_gloo else {"slice"}  # gloo's go by direct messages
        wanted = {tuple(sorted(group)) for step in steps if step.kind not in local for group in step.groups}
        for ranks in sorted(r for r in wanted if len(r) > 1 and r not in self._made):
            whole = len(ranks) == self.size
            group = dist.group.WORLD if whole else dist.new_group(list(ranks))
            self._made[ranks] = None if whole else group
            if self.rank in ranks:
                self._links[ranks] = Link(ranks, group, backend_of(group, self.device_type) == "gloo")

    def link(self, members: Sequence[int]) -> Link:
        ranks = tuple(sorted(members))
        if ranks not in self._links:
            raise WorldError(f"no process group for ranks {ranks}: Groups.make was not told of the step")
        return self._links[ranks]

    def close(self, destroy: bool) -> None:
        """Lets go of the groups, so that their threads end before the interpreter does; ``destroy`` ends them too."""
        closed = _Closed()
        for link in self._links.values():
            link.group = closed
        if destroy:
            for ranks, group in self._made.items():
                if group is not None and self.rank in ranks:
                    dist.destroy_process_group(group)
        self._links, self._made, self.closed = {}, {}, True


def backend_of(group: Any, device_type: str) -> str:
    """Name of the backend that serves tensors of ``device_type`` in a process group."""
    served = dict(pair.split(":") for pair in dist.get_backend_config(group).split(",") if ":" in pair)
    return served.get(device_type) or str(dist.get_backend(group))


# -- preparing ---------------------------------------------------------------------------------------------------------


def prepare(step: Step, shape: Shape, rank: int, groups: Groups, inplace: bool = False) -> Run:
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
        return _slice(at)
    if step.kind in TRANSFERS and groups.is_gloo:
        return _Direct(at, exchange_routes(step.source, step.target, shape))
    if step.kind in ("exchange", "permute"):
        return _exchange(at)
    if len(at.members) == 1:
        return _same
    if step.kind == "all_reduce":
        return _all_reduce(at, inplace)
    return {"all_gather": _all_gather, "reduce_scatter": _reduce_scatter, "all_to_all": _all_to_all}[step.kind](at)


def prepare_steps(
    steps: Sequence[Step], shape: Shape, rank: int, groups: Groups, inplace: bool = False, compact: bool = False
) -> Run:
    """All ``steps``, one after the other, as a function of the local tensor.

    A rank that a step's source does not have hands it an empty tensor, of the right dtype; one that its target does not
    have gets an empty tensor.

    Args:
        inplace: whether the function may overwrite its argument.
        compact: whether the result must not be a view into the argument, which it would keep alive.
    """
    runs: list[Run] = []
    own, is_view = inplace, False  # whether nobody else reads what the next step is given; whether it is a view
    for step in steps:
        if rank not in step.source.mesh.ranks and rank not in step.target.mesh.ranks:
            continue
        run = prepare(step, shape, rank, groups, own)
        if run is not _same:
            runs.append(run)
            is_view = step.kind == "slice"
            own = own or not is_view
    if is_view and (compact or own):
        runs.append(_copy)
    if not runs:
        return _same
    if len(runs) == 1:
        return runs[0]
    if len(runs) == 2:
        first, second = runs
        return lambda x: second(first(x))

    def run_all(x: Tensor) -> Tensor:
        for each in runs:
            x = each(x)
        return x

    return run_all


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


def _reduce(parts: Sequence[Tensor], op: str) -> Tensor:
    """The sum, maximum or minimum of two tensors or more, first to last; a new tensor."""
    dtype = parts[0].dtype
    narrow = dtype.is_floating_point and dtype.itemsize == 1
    if narrow:  # torch cannot add float8
        parts = [p.float() for p in parts]
    combine = _COMBINE[op]
    total = combine(parts[0], parts[1])
    for part in parts[2:]:
        combine(total, part, out=total)
    return total.to(dtype) if narrow else total


def _slice(at: _Place) -> Run:
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


def _all_reduce(at: _Place, inplace: bool) -> Run:
    link, op, local = at.link, at.step.op, at.local
    count, n = math.prod(local), at.link.size
    if count == 0:
        return _same
    order, is_sorted = at.order, at.is_sorted

    def in_one_round(x: Tensor) -> Tensor:
        out = x.new_empty(n * count)
        link.all_to_all(out, x.reshape(-1).repeat(n))
        parts = out.split(count)
        return _reduce(parts if is_sorted else [parts[i] for i in order], op).view(local)

    if link.is_gloo and n * count <= _ONE_ROUND:
        return in_one_round

    def run(x: Tensor) -> Tensor:
        if x.dtype not in _REDUCIBLE:
            return in_one_round(x)
        out = x.contiguous() if inplace else x.clone(memory_format=torch.contiguous_format)
        link.all_reduce(out, op)
        return out

    return run


def _all_gather(at: _Place) -> Run:
    link, n = at.link, at.link.size
    shapes = [_extent(at.have[r]) for r in at.sorted_members]
    sizes = [math.prod(s) for s in shapes]
    total, own = sum(sizes), math.prod(at.local)
    result = at.result
    finish = _unpack(shapes, at.step.dims[0], result, at.order) if len(at.step.dims) == 1 else _place_all(at)
    even = len(set(sizes)) == 1
    if total == 0:
        return lambda x: x.new_empty(result)
    if link.is_gloo and total > _ONE_ROUND:
        members = [(m, r, at.have[m]) for m in at.members for r in at.members if (m == at.rank) != (r == at.rank) or m == r]
        return _Direct(at, [route for route in members if count(route[2])])
    in_one_round = not even or link.is_gloo
    if not in_one_round and at.step.dims == (0,) and at.is_sorted:

        def run(x: Tensor) -> Tensor:
            out = x.new_empty(result)
            link.all_gather(out, x.contiguous())
            return out

    elif not in_one_round:

        def run(x: Tensor) -> Tensor:
            out = x.new_empty(total)
            link.all_gather(out, x.reshape(-1).contiguous())
            return finish(out)

    else:
        received, sent = (None, None) if even else (sizes, [own] * n)

        def run(x: Tensor) -> Tensor:
            out = x.new_empty(total)
            link.all_to_all(out, x.reshape(-1).repeat(n), received, sent)
            return finish(out)

    return run


def _reduce_scatter(at: _Place) -> Run:
    link, n, op, result = at.link, at.link.size, at.step.op, at.result
    pack, sizes = _pack_for_members(at, at.step.dims[0])
    even, own = len(set(sizes)) == 1, math.prod(result)
    if sum(sizes) == 0:
        return lambda x: x.new_empty(result)
    received, sent = (None, None) if even else ([own] * n, sizes)
    order, is_sorted = at.order, at.is_sorted

    def by_parts(x: Tensor) -> Tensor:
        out = x.new_empty(n * own)
        link.all_to_all(out, pack(x), received, sent)
        parts = out.view(n, own).unbind()
        return _reduce(parts if is_sorted else [parts[i] for i in order], op).view(result)

    if link.is_gloo or not even:
        return by_parts
    along_rows = at.step.dims[0] == 0 and at.is_sorted

    def run(x: Tensor) -> Tensor:
        if x.dtype not in _REDUCIBLE:
            return by_parts(x)
        if along_rows:
            out = x.new_empty(result)
            link.reduce_scatter(out, x.contiguous(), op)
            return out
        out = x.new_empty(own)
        link.reduce_scatter(out, pack(x), op)
        return out.view(result)

    return run


def _all_to_all(at: _Place) -> Run:
    link = at.link
    source_dim, target_dim = at.step.dims
    pack, sent = _pack_for_members(at, target_dim)
    shapes = []
    for member in at.sorted_members:
        piece = list(_extent(at.have[member]))
        piece[target_dim] = at.result[target_dim]
        shapes.append(tuple(piece))
    received = [math.prod(s) for s in shapes]
    total, result = sum(received), at.result
    if not any(math.prod(_extent(at.have[m])) for m in at.members):
        return lambda x: x.new_empty(result)
    finish = _unpack(shapes, source_dim, result, at.order)
    # the same on every rank: whether all pieces, of whatever rank for whatever rank, are equally long
    even = len({_extent(at.have[m])[source_dim] for m in at.members}) == 1 and len(set(sent)) == 1
    splits = (None, None) if even else (received, sent)

    def run(x: Tensor) -> Tensor:
        out = x.new_empty(total)
        link.all_to_all(out, pack(x), *splits)
        return finish(out)

    return run


def _pack_for_members(at: _Place, dim: int) -> tuple[Run, list[int]]:
    """Cuts the local tensor along ``dim`` into what each member wants: a flat tensor in torch's order; the sizes."""
    local, (start, stop) = at.local, at.have[at.rank][dim]
    spans = []
    for member in at.sorted_members:
        a, b = at.want[member][dim]
        spans.append((min(a - start, stop - start), b - a))
    rest = math.prod(local[:dim]) * math.prod(local[dim + 1 :])
    sizes = [length * rest for _, length in spans]
    if at.is_sorted and math.prod(local[:dim]) <= 1:
        return lambda x: x.reshape(-1).contiguous(), sizes
    n, length = len(spans), spans[0][1]
    if at.is_sorted and all(s == (i * length, length) for i, s in enumerate(spans)):
        return lambda x: x.unflatten(dim, (n, length)).movedim(dim, 0).reshape(-1).contiguous(), sizes
    return lambda x: torch.cat([x.narrow(dim, a, length).reshape(-1) for a, length in spans]), sizes


def _unpack(shapes: list[Shape], dim: int, result: Shape, order: list[int]) -> Run:
    """Puts pieces of these shapes, flat and in torch's order, together along ``dim`` in the order of ``order``."""
    is_sorted = order == list(range(len(order)))
    if is_sorted and math.prod(result[:dim]) <= 1:
        return lambda flat: flat.view(result)
    stacked = (len(shapes), *shapes[0])
    if is_sorted and len(set(shapes)) == 1:
        return lambda flat: flat.view(stacked).movedim(0, dim).reshape(result)
    sizes = [math.prod(s) for s in shapes]

    def run(flat: Tensor) -> Tensor:
        parts = flat.split(sizes)
        return torch.cat([parts[i].view(shapes[i]) for i in order], dim)

    return run


def _place_all(at: _Place) -> Run:
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


class _Direct:
    """A transfer by direct messages, at once or started now and finished later."""

    def __init__(self, at: _Place, routes: Sequence[Route]):
        self.transfer = Transfer(routes, at.rank, at.groups.size, at.have.get(at.rank), at.want.get(at.rank))

    def __call__(self, x: Tensor) -> Tensor:
        return self.start(x)()

    def start(self, x: Tensor) -> Callable[[], Tensor]:
        return self.transfer.start(x)


# -- the exact exchange ------------------------------------------------------------------------------------------------


def _exchange(at: _Place) -> Run:
    """By the backend's all-to-all: all a rank sends is packed into one flat tensor, in the order of ranks."""
    have, want, rank = at.have.get(at.rank), at.want.get(at.rank), at.rank
    routes = exchange_routes(at.step.source, at.step.target, at.shape)
    outgoing, incoming = {t: g for s, t, g in routes if s == rank != t}, {s: g for s, t, g in routes if t == rank != s}
    kept = [(cutter(g, have), cutter(g, want)) for s, t, g in routes if s == t == rank]
    result = (0,) if want is None else _extent(want)
    sent = [count(outgoing[r]) if r in outgoing else 0 for r in at.sorted_members]
    received = [count(incoming[r]) if r in incoming else 0 for r in at.sorted_members]
    take = [cutter(outgoing[r], have) for r in at.sorted_members if r in outgoing]
    put = [(cutter(incoming[r], want), _extent(incoming[r])) for r in at.sorted_members if r in incoming]
    sizes, total = [n for n in received if n], sum(received)
    link = at.link if any(s != t for s, t, _ in routes) else None

    def run(x: Tensor) -> Tensor:
        flat = x.new_empty(total)
        if link is not None:
            packed = torch.cat([cut(x).reshape(-1) for cut in take]) if take else x.new_empty(0)
            link.all_to_all(flat, packed, received, sent)
        if not kept and len(put) == 1:
            return flat.view(result)  # all of it comes from one rank
        out = x.new_empty(result)
        for cut, place in kept:
            place(out).copy_(cut(x))
        for (place, extent), part in zip(put, flat.split(sizes) if sizes else ()):
            place(out).copy_(part.view(extent))
        return out

    return run
