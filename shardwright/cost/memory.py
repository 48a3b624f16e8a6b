"""Memory: bytes that a rank holds of tensors, that autograd saves, and that redistributions need, in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from shardwright.cost.message_sizes import AHEAD, MANY, WINDOW, chunks_of_chain, may_hold_copies, parts_of_piece
from shardwright.cost.saved import Saved
from shardwright.ir.largest_piece import local_shape
from shardwright.ir.layout import Layout
from shardwright.ir.step import TRANSFERS, Step

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]

# Returns a collective's algorithm, from its kind, the number of ranks, the bytes, and the possible algorithms.
Choose = Callable[[str, int, int, Collection[str]], str]


def kept_bytes(saved: Saved, input_bytes: Array, output_bytes: Array, fraction: Array) -> Array:
    """Computes the bytes that an operator saves for its backward, for each of ``C`` choices.

    Args:
        saved: what autograd saves on the global shapes.
        input_bytes, output_bytes: ``(I, C)`` and ``(O, C)``, bytes that a rank holds of each tensor.
        fraction: ``(C,)``, share of the operator's work that a rank does; tensors that are neither input nor output scale with
            it.

    >>> saved = Saved(frozenset({0}), frozenset(), (((8, 4), 4),), {})
    >>> kept_bytes(saved, np.array([[64.0, 32.0]]), np.zeros((0, 2)), np.array([1.0, 0.5]))
    array([192.,  96.])
    """
    total = saved.extra_bytes * fraction
    for i in saved.inputs:
        total = total + input_bytes[i]
    for o in saved.outputs:
        if o < len(output_bytes):
            total = total + output_bytes[o]
    return np.asarray(total, dtype=float)


def local_numel(layout: Layout, shape: Shape) -> int:
    """Counts the elements of the largest piece of a tensor of global ``shape``."""
    return math.prod(local_shape(layout, shape))


@lru_cache(maxsize=65536)
def local_bytes(layout: Layout, shape: Shape, itemsize: int) -> float:
    """Computes the bytes of the largest piece of a tensor of global ``shape``.

    >>> local_bytes(Layout((2, 4), ("dp", "tp"))("dp", "tp"), (5, 8), 4)
    24.0
    """
    return float(itemsize * local_numel(layout, shape))


# -- redistributions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepMemory:
    """Bytes that one step of a redistribution needs besides its argument.

    Args:
        result: new memory of the result; 0 where it is the argument or a view of it.
        workspace: needed while it runs.
        scratch: needed while it runs, in a buffer that is kept for the next time.
        holds: whether a started step needs argument, workspace and scratch until it is waited for; other
            steps release them soon after.
        frees: whether it releases its argument as soon as it has started.
    """

    result: float = 0.0
    workspace: float = 0.0
    scratch: float = 0.0
    holds: bool = False
    frees: bool = False


def step_memory(
    step: Step, shape: Shape, itemsize: int, choose: Choose | None, contiguous: bool = True, inplace: bool = False,
    hub: bool = True,
) -> StepMemory:  # fmt: skip
    """Computes the bytes that a step needs on a rank with the largest pieces.

    Args:
        step: the step.
        shape: global shape.
        itemsize: bytes per element.
        choose: chooses one of gloo's algorithms; ``None``: the backend's own collectives, as with NCCL.
        contiguous: whether the argument is contiguous in the order of its dims; else it is copied first.
        inplace: whether a reduction may overwrite the argument.
        hub: whether the rank is the one that others send to, if the algorithm has one.
    """
    have, want = local_shape(step.source, shape), local_shape(step.target, shape)
    given, made = float(itemsize * math.prod(have)), float(itemsize * math.prod(want))
    members = max(1, step.source.mesh.count(step.axes)) if step.axes else 2
    copy = 0.0 if contiguous else given
    if step.kind == "slice" or (members == 1 and step.kind not in TRANSFERS):
        return StepMemory()
    if step.kind in TRANSFERS:
        return _transfer(step, have, want, given, made, members, choose)
    if step.kind == "all_reduce":
        return _all_reduce(given, copy, members, itemsize, choose, inplace, hub)
    if step.kind == "all_gather":
        return _all_gather(step, have, want, made, copy, members, choose)
    outermost = math.prod(have[: step.dims[0]]) <= 1
    packed = copy if outermost else given
    return _reduce_scatter(given, made, packed, members, choose, hub)


@dataclass(frozen=True)
class RedistributionMemory:
    """Bytes that the steps of a redistribution, in sequence, need besides their argument.

    Args:
        result: new memory of the result; 0 if it is the argument or a view of it.
        peak: largest new memory in use meanwhile, with the result.
        steps: the needs of each step.
    """

    result: float
    peak: float
    steps: tuple[StepMemory, ...]


def redistribution_memory(
    steps: Sequence[Step], shape: Shape, itemsize: int, choose: Choose | None, contiguous: bool = True,
    inplace: bool = False, hub: bool = True, compact: bool = False, kept_scratch: float = 0.0,
) -> RedistributionMemory:  # fmt: skip
    """Computes the bytes that a redistribution needs on a rank with the largest pieces.

    Args:
        steps: its steps.
        shape: global shape.
        itemsize: bytes per element.
        choose, contiguous, inplace, hub: see :func:`step_memory`, for the first step.
        compact: whether a result that is only a part of the argument gets its own memory, so that the argument can be freed.
        kept_scratch: bytes of the scratch buffer that exists already.
    """
    found: list[StepMemory] = []
    result = peak = 0.0
    is_view = False
    for step in steps:
        need = step_memory(step, shape, itemsize, choose, contiguous, inplace, hub)
        found.append(need)
        peak = max(peak, result + need.result + need.workspace + max(0.0, need.scratch - kept_scratch))
        result = need.result or result
        is_view = step.kind == "slice"
        contiguous = not is_view or (contiguous and not any(step.dims))
        inplace = inplace or not is_view  # nothing else uses the result of a step
    if is_view and (compact or inplace):
        piece = local_bytes(steps[-1].target, shape, itemsize)
        result, peak = piece, max(peak, result + piece)
    return RedistributionMemory(result, peak, tuple(found))


def shared_collective_memory(moves: Sequence[tuple[Step, Shape, int]]) -> tuple[list[float], float]:
    """Computes the bytes that redistributions of one step each need if they share a collective.

    Args:
        moves: for each redistribution its step, the global shape and the bytes per element; at least one.

    Returns:
        Bytes of new memory of each result, and the largest new memory in use meanwhile.
    """
    given = sum(local_bytes(step.source, shape, itemsize) for step, shape, itemsize in moves)
    results = [local_bytes(step.target, shape, itemsize) for step, shape, itemsize in moves]
    made = sum(results)
    gathers = moves[0][0].kind == "all_gather"  # received data are ordered by rank first, then by tensor
    return results, max(given + made, (3 if gathers else 2) * made)


@dataclass(frozen=True)
class BucketMemory:
    """Bytes that collectives need which many tensors share and which are started early.

    Args:
        results: bytes of each tensor's result.
        flight: in use from the start until the wait; the last collective's result may be part of it.
        peak: largest new memory when they are started, the flight included.
        landing: largest new memory when they have arrived and are copied into results, these included.
        scratch: needed meanwhile, in a buffer that is kept for the next time.
    """

    results: tuple[float, ...]
    flight: float
    peak: float
    landing: float
    scratch: float


def bucket_memory(
    tensors: Sequence[tuple[Sequence[Step], Shape, int]], choose: Choose | None, hub: bool = True
) -> BucketMemory:
    """Computes the bytes that redistributions of equal steps need if they share their collectives.

    Args:
        tensors: for each its steps, the global shape and the bytes per element; at least one.
        choose, hub: see :func:`step_memory`.
    """
    first = [(steps[0], shape, itemsize) for steps, shape, itemsize in tensors]
    step, _, itemsize = first[0]
    given = sum(local_bytes(s.source, shape, size) for s, shape, size in first)
    made = sum(local_bytes(s.target, shape, size) for s, shape, size in first)
    results = tuple(local_bytes(steps[-1].target, shape, size) for steps, shape, size in tensors)
    members = max(1, step.source.mesh.count(step.axes))
    if step.kind == "all_reduce":
        need = _all_reduce(given, 0.0, members, itemsize, choose, True, hub)
        flight = max(given, need.result) + (need.workspace if need.holds else 0.0)
        return BucketMemory(results, flight, given + need.result + need.workspace, flight, need.scratch)
    if step.kind == "all_gather":
        flat = made if choose is not None and choose("all_gather", members, int(made), _GATHERS) == "backend" else 0.0
        return BucketMemory(results, given + made + flat, given + made + flat, made + sum(results), 0.0)
    need = _reduce_scatter(given, made, given, members, choose, hub)
    flight = need.result + need.workspace
    return BucketMemory(results, flight, flight, need.result, need.scratch)


_GATHERS = ("backend", "direct", "hub")


def _all_reduce(
    size: float, copy: float, members: int, itemsize: int, choose: Choose | None, inplace: bool, hub: bool
) -> StepMemory:
    made = 0.0 if inplace and not copy else size
    if choose is None:
        return StepMemory(size if copy or not inplace else 0.0, copy)
    possible = ["pieces", "chain"]
    if may_hold_copies(size, members):
        possible += ["hub", "copies"]
    if members == 2 and itemsize >= 4:
        possible.append("backend")
    name = choose("all_reduce", members, int(size), possible)
    if name == "backend":  # works on a copy
        return StepMemory(made, copy, frees=not inplace)
    if name == "copies":
        return StepMemory(size, copy, (members - 1) * size, True)
    if name == "hub":  # it receives from all; the data that others send stay until they ask for the result
        return StepMemory(made, copy, (members - 1) * size) if hub else StepMemory(made, copy, 0.0, True)
    if name == "chain":
        return StepMemory(made, copy, WINDOW * size / chunks_of_chain(size))
    return StepMemory(made, copy, arriving_bytes(math.ceil(size / members), members))


def arriving_bytes(piece: float, members: int) -> float:
    """Computes the bytes in flight to a member for its piece. From each other member they are at most two parts.

    >>> arriving_bytes(3 << 20, 4) / 2**20, arriving_bytes(100 << 20, 4) / 2**20
    (9.0, 12.0)
    """
    parts = max(1, parts_of_piece(piece, members))
    return (members - 1) * math.ceil(piece / parts) * min(AHEAD, parts)


def _all_gather(
    step: Step, have: Shape, want: Shape, made: float, copy: float, members: int, choose: Choose | None
) -> StepMemory:
    outermost = len(step.dims) == 1 and math.prod(want[: step.dims[0]]) <= 1
    if choose is not None and math.prod(want) >= MANY and not outermost:
        arriving = 0.0 if _is_first(want, step.dims) else made * (members - 1) / members
        return StepMemory(made, copy + arriving, 0.0, True)
    flat = 0.0 if outermost else made  # pieces arrive in sequence, and are then copied to their places
    if choose is not None and choose("all_gather", members, int(made), ["backend", "direct", "hub"]) == "backend":
        flat += made  # gloo's gather makes a copy
    return StepMemory(made, copy + flat, 0.0, True)


def _reduce_scatter(given: float, made: float, packed: float, members: int, choose: Choose | None, hub: bool) -> StepMemory:
    if choose is None:
        return StepMemory(made, packed)
    possible = ["backend", "direct"] + (["hub"] if may_hold_copies(given, members) else [])
    name = choose("reduce_scatter", members, int(given), possible)
    if name == "hub":
        return StepMemory(made, packed + given, (members - 1) * given) if hub else StepMemory(made, packed, 0.0, True)
    if name == "direct":
        return StepMemory(made, packed, arriving_bytes(made, members), True)
    return StepMemory(made, packed + members * made, 0.0, True)


def _transfer(
    step: Step, have: Shape, want: Shape, given: float, made: float, members: int, choose: Choose | None
) -> StepMemory:
    """Computes the bytes of a transfer. Regions that are contiguous on both sides travel without copies."""
    moved = (members - 1) / members
    if choose is None:
        return StepMemory(made, given + made)
    if step.kind == "permute":
        return StepMemory(made, 0.0, 0.0, True)
    cut, joined = (step.dims[1], step.dims[0]) if len(step.dims) == 2 else (0, 0)
    sends = 0.0 if _is_first(have, (cut,)) else moved * given
    receives = 0.0 if _is_first(want, (joined,)) else moved * made
    return StepMemory(made, sends + receives, 0.0, True)


def _is_first(shape: Shape, dims: Collection[int]) -> bool:
    """Tells whether a range of this dim is contiguous in a tensor of this shape."""
    return math.prod(shape[: min(dims, default=0)]) <= 1 and len(dims) <= 1
