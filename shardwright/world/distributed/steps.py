"""Steps of a redistribution on one rank's tensor: the collectives of the distributed world.

:func:`prepare_steps` turns steps into a :class:`Runner` once, when a program is bound: bounds, split sizes, permutations
and the process group are computed there, so that running it is a collective and the copies that its layout requires.

Invariants:

- A step lists its group in the order of its axes, ``torch.distributed`` in ascending order of ranks. Tensors travel in
  torch's order and are put into the step's where the two differ.
- Every rank of a group chooses the same algorithm: choices depend on the step, the global shape and the dtype only.
- On gloo, sums run in the step's order, first to last, as in the simulated world: see :mod:`.summation`.
- The argument is never changed, unless ``inplace`` says that it may be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from shardwright.cost.message_sizes import MANY
from shardwright.ir.step import TRANSFERS, Step
from shardwright.redistribute.routes import exchange_routes
from shardwright.world.distributed.groups import Groups
from shardwright.world.distributed.operations import Operation
from shardwright.world.distributed.places import (
    Bounds,
    Local,
    Shape,
    _copy,
    _extent,
    _is_outermost,
    _pack_for_members,
    _Place,
    _same,
    _unpack_gathered,
)
from shardwright.world.distributed.transfer import Transfer, count, cutter

_CLOSED = "this distributed world was closed: bind the program again in a new one"


class UnderWay(Protocol):
    """Started steps; :meth:`wait` ends them."""

    def wait(self) -> Tensor: ...


class Runner(Protocol):
    """Steps prepared for one rank: a function of its local tensor, that may be started now and ended later."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def start(self, x: Tensor) -> UnderWay: ...


# -- preparing ---------------------------------------------------------------------------------------------------------


def prepare(step: Step, shape: Shape, rank: int, groups: Groups, inplace: bool = False) -> Runner:
    """Prepares a step as a function of the local tensor.

    Args:
        step: the step.
        shape: global shape.
        rank: the rank it runs on.
        groups: the process groups, which must hold the step's group.
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
        return _transfer(at, routes) if groups.by_messages and moves else _exchange(at, routes)
    if len(at.members) == 1:
        return _OnlyLocal(_same)
    if step.kind == "all_reduce":
        return at.link.prepare_all_reduce(math.prod(at.local), step.op, at.order, inplace)
    return _all_gather(at) if step.kind == "all_gather" else _reduce_scatter(at)


def prepare_steps(
    steps: Sequence[Step], shape: Shape, rank: int, groups: Groups, inplace: bool = False, compact: bool = False
) -> Runner:
    """Prepares all ``steps``, one after the other, as a function of the local tensor.

    A rank outside a step's source gives it an empty tensor, of the right dtype; one outside its target gets an empty tensor.

    Args:
        steps: the steps.
        shape: global shape.
        rank: the rank it runs on.
        groups: the process groups.
        inplace: whether the function may overwrite its argument.
        compact: whether the result must not be a view into the argument, which it would keep alive.
    """
    runs: list[Runner] = []
    own, is_view = inplace, False  # whether only the next step reads its argument; whether that is a view
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


class _Done:
    """Operation that was done when it began."""

    def __init__(self, result: Tensor):
        self.result = result

    def wait(self) -> Tensor:
        return self.result


class _OnlyLocal:
    """Function of the local tensor, without communication."""

    def __init__(self, function: Local):
        self.function = function

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def start(self, x: Tensor) -> UnderWay:
        return _Done(self.function(x))


class _Between:
    """A collective, with the functions that pack its argument and unpack its result."""

    def __init__(self, pack: Local, operation: Operation, unpack: Local):
        self.pack, self.operation, self.unpack = pack, operation, unpack

    def __call__(self, x: Tensor) -> Tensor:
        return self.unpack(self.operation(self.pack(x)))

    def start(self, x: Tensor) -> UnderWay:
        return _Followed(self.operation.start(self.pack(x)), self.unpack)


class _Chain:
    """Runners one after the other. Once started, it proceeds by itself up to the first that communicates."""

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
    """Runner whose argument is cast to one dtype, and whose result is cast to another."""

    def __init__(self, runner: Runner, before: torch.dtype, after: torch.dtype):
        self.runner, self.before, self.after = runner, before, after

    def __call__(self, x: Tensor) -> Tensor:
        return self.runner(x.to(self.before)).to(self.after)

    def start(self, x: Tensor) -> UnderWay:
        return _Followed(self.runner.start(x.to(self.before)), lambda result: result.to(self.after))


class _Followed:
    """Steps under way, and a function to apply to their result."""

    def __init__(self, under_way: UnderWay, then: Local):
        self.under_way, self.then = under_way, then

    def wait(self) -> Tensor:
        return self.then(self.under_way.wait())


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
    if at.groups.by_messages and sum(sizes) >= MANY and not (at.is_sorted and _is_outermost(at.step.dims, at.result)):
        # each piece is put in its place as it arrives, while others are on their way
        routes = [(m, at.rank, at.have[m]) for m in at.members] + [(at.rank, m, at.have[at.rank]) for m in at.members]
        return _transfer(at, [route for route in dict.fromkeys(routes) if count(route[2])])
    return _Between(_same, at.link.prepare_all_gather(sizes), _unpack_gathered(at))


def _reduce_scatter(at: _Place) -> Runner:
    result = at.result
    pack, sizes = _pack_for_members(at, at.step.dims[0])
    return _Between(pack, at.link.prepare_reduce_scatter(sizes, at.step.op, at.order), lambda flat: flat.view(result))


def _transfer(at: _Place, routes: Sequence[tuple[int, int, Bounds]]) -> Runner:
    """Moves regions by direct messages among all ranks, whatever their groups."""
    everyone = at.groups.link(range(at.groups.size))
    return Transfer(everyone, routes, at.have.get(at.rank), at.want.get(at.rank))


def _exchange(at: _Place, routes: Sequence[tuple[int, int, Bounds]]) -> Runner:
    """Moves regions by the backend's all-to-all: a rank packs all it sends into one flat tensor, by rank."""
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
