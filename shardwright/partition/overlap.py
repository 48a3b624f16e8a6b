"""Decides which moves share a collective, and which start early.

Moves of parameters are fused in buckets: those of one kind, in the order in which they are read, share their collectives.
They start early and each ends where its parameter is read, so that they travel while ranks compute. The backward pass
mirrors it: the last layers' gradients are complete first, and start to travel, all of a bucket at once, while the layers
before are computed; they are waited for where the forward pass started, which for a gradient's sum is the very end.

Other small moves share their collectives if all of their tensors are there at the place of the first: a message costs more
than its bytes. Other large moves start as soon as their tensor is there and end where it is read.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from shardwright.ir.buckets import MoveBuckets
from shardwright.ir.instructions import FusedMoves, Instruction, Move, StartMoves, is_call, moves_alone
from shardwright.ir.step import Step
from shardwright.redistribute.volume import is_even


def schedule(
    instructions: Sequence[Instruction], options: MoveBuckets, parameters: Collection[str] = ()
) -> tuple[Instruction, ...]:
    """Fuses moves that share collectives, and starts large ones early.

    Args:
        instructions: those of a program.
        options: which moves share collectives.
        parameters: inputs of the program whose moves are fused in buckets.
    """
    buckets = _buckets(instructions, options, parameters)
    alone = {move.output for members in buckets for move in members}
    return _started(_joined(instructions, options, alone), options, buckets)


# -- buckets of parameters -------------------------------------------------------------------------------------------------


def _buckets(instructions: Sequence[Instruction], options: MoveBuckets, parameters: Collection[str]) -> list[list[Move]]:
    """Groups the moves of parameters that share collectives, in the order of reading."""
    kinds: dict[Any, list[Move]] = {}
    for move in moves_alone(instructions):
        if move.source in parameters and (kind := _kind(move)) is not None:
            kinds.setdefault((kind, options.ids.get(move.source)), []).append(move)
    found: list[list[Move]] = []
    for (_, number), moves in kinds.items():
        if number is not None:
            found += [moves] if number else [[move] for move in moves]
            continue
        rule = options.gathers if moves[0].communicates else options.sums
        found += _by_place(moves, rule.starts) if rule.starts is not None else _by_size(moves, rule.bytes)
    return [members for members in found if members]


def _by_place(moves: Sequence[Move], starts: Sequence[int]) -> list[list[Move]]:
    ends = [0, *starts, len(moves)]
    return [list(moves[a:b]) for a, b in pairwise(ends)]


def _by_size(moves: Sequence[Move], full: int) -> list[list[Move]]:
    """Fills buckets from the last move read. The bucket that nothing can hide is then a small one.

    A move that would fill a bucket stays alone: it gains nothing from fusion, and need not be copied.
    """
    found: list[list[Move]] = []
    total = full
    for move in reversed(moves):
        size = _bytes(move)
        if size >= full:
            found.append([move])
            continue
        if total >= full:
            found.append(bucket := [])
            total = 0
        bucket.append(move)
        total += size
    return [members[::-1] for members in reversed(found)]


# -- joining ---------------------------------------------------------------------------------------------------------------


def _joined(instructions: Sequence[Instruction], options: MoveBuckets, alone: Collection[str]) -> list[Instruction]:
    made_at = {name: at for at, i in enumerate(instructions) for name in i.outputs}
    open_groups: dict[Any, tuple[int, int, list[Move]]] = {}  # key -> place, bytes, members
    groups: dict[int, list[list[Move]]] = {}
    for at, move in enumerate(instructions):
        if not isinstance(move, Move) or move.output in alone or _bytes(move) > options.small:
            continue
        plan = move.redistribution
        key = _kind(move)
        if key is None or len(plan.forward) > 1 or (move.needs_grad and len(plan.backward) > 1):
            continue
        size = _bytes(move)
        place, total, members = open_groups.get(key, (at, options.bucket, []))
        if total + size > options.bucket or made_at.get(move.source, -1) >= place:
            place, total, members = at, 0, []
            groups.setdefault(at, []).append(members)
        members.append(move)
        open_groups[key] = (place, total + size, members)
    joined: list[Instruction] = []
    elsewhere = {m.output for found in groups.values() for members in found for m in members}
    for at, instruction in enumerate(instructions):
        for members in groups.get(at, ()):
            joined.append(members[0] if len(members) == 1 else FusedMoves(tuple(members)))
        if elsewhere.isdisjoint(instruction.outputs):
            joined.append(instruction)
    return joined


def _kind(move: Move) -> Any:
    """Returns the key that moves have to share to be fused; ``None`` for a move that cannot be."""
    plan = move.redistribution
    directions = [plan.forward, plan.backward if move.needs_grad else ()]
    if not any(directions):
        return None
    steps = [s for steps in directions for s in steps]
    if not all(_can_join(step, plan.shape) for step in steps):
        return None
    kinds = tuple(tuple((s.kind, s.axes, s.op, s.source.mesh) for s in steps) for steps in directions)
    return kinds, move.dtype, move.wire, move.needs_grad, move.grad, move.autocast, move.recompute


def _can_join(step: Step, shape: tuple[int, ...]) -> bool:
    if step.kind == "all_reduce":
        return True
    return step.kind in ("all_gather", "reduce_scatter") and is_even(step.source, shape) and is_even(step.target, shape)


def _bytes(move: Move) -> int:
    plan = move.redistribution
    sizes = [math.prod(layout.local_shape(plan.shape, layout.mesh.ranks[0])) for layout in (plan.source, plan.target)]
    return max(sizes) * move.dtype.itemsize


# -- starting early --------------------------------------------------------------------------------------------------------


def _started(
    instructions: Sequence[Instruction], options: MoveBuckets, buckets: Sequence[Sequence[Move]]
) -> tuple[Instruction, ...]:
    """Starts moves right after their tensor is made. A forward collective waits until the one before it has ended.

    With more than one gather under way, more than one bucket of gathered tensors would be held too early.
    """
    bucket_of = {move.output: members for members in buckets for move in members}
    starts: dict[int, list[StartMoves]] = {}
    begun: set[str] = set()
    ready = {name: at + 1 for at, i in enumerate(instructions) for name in i.outputs}
    result = list(instructions)
    calls = [is_call(i) for i in instructions]
    earliest = 0
    for at, move in enumerate(instructions):
        if len(move.ends) > 1:
            earliest = at + 1
        if not isinstance(move, Move):
            continue
        members = bucket_of.get(move.output, (move,))
        forward = move.communicates
        if move.output in begun:
            result[at] = replace(move, started=True)
            continue
        place = max(max(ready.get(m.source, 0) for m in members), earliest if forward else 0)
        is_large = (forward or move.communicates_backward) and _bytes(move) >= options.large
        if len(members) > 1 or (is_large and any(calls[place:at])):
            result[at] = replace(move, started=True)
            starts.setdefault(place, []).append(StartMoves(tuple(members)))
            begun.update(m.output for m in members)
        if forward:
            earliest = at + 1
    merged: list[Instruction] = []
    for at, instruction in enumerate(result):
        merged += starts.get(at, ())
        merged.append(instruction)
    return tuple(merged)
