"""Schedule: which moves share a collective, and which start early.

Small moves of one kind over the same axes, whose tensors are all there at the first one's place, share their collectives:
a message costs more than its bytes. Large moves start as soon as their tensor is there and end where it is read, so that
they travel while ranks compute. The backward pass mirrors both: a gradient starts to travel as soon as it is there, and
is waited for where the forward pass started, which for a parameter is the very end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from shardwright.partition.program import Call, Instruction, Move, Start, Together
from shardwright.redistribute.step import Step
from shardwright.redistribute.volume import is_even


@dataclass(frozen=True)
class Schedule:
    """What counts as small and as large.

    Args:
        small: bytes of a local tensor up to which moves share collectives.
        bucket: bytes that share one collective at most.
        large: bytes of a local tensor from which a move is worth starting early.
    """

    small: int = 1 << 16
    bucket: int = 1 << 20
    large: int = 1 << 16


def schedule(instructions: Sequence[Instruction], options: Schedule) -> tuple[Instruction, ...]:
    """The same instructions with small moves joined and large ones started early."""
    return _started(_joined(instructions, options), options)


# -- joining ---------------------------------------------------------------------------------------------------------------


def _joined(instructions: Sequence[Instruction], options: Schedule) -> list[Instruction]:
    made_at = {name: at for at, i in enumerate(instructions) for name in i.outputs}
    open_groups: dict[Any, tuple[int, int, list[Move]]] = {}  # key -> place, bytes, members
    groups: dict[int, list[list[Move]]] = {}
    for at, move in enumerate(instructions):
        key = _kind(move, options) if isinstance(move, Move) else None
        if key is None:
            continue
        assert isinstance(move, Move)
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
            joined.append(members[0] if len(members) == 1 else Together(tuple(members)))
        if not (isinstance(instruction, Move) and instruction.output in elsewhere):
            joined.append(instruction)
    return joined


def _kind(move: Move, options: Schedule) -> Any:
    """What moves have in common that can share collectives; ``None`` for one that cannot."""
    plan = move.redistribution
    directions = [plan.forward, plan.backward if move.needs_grad else ()]
    if not any(directions) or any(len(steps) > 1 for steps in directions) or _bytes(move) > options.small:
        return None
    steps = [s for steps in directions for s in steps]
    if not all(_can_join(step, plan.shape) for step in steps):
        return None
    kinds = tuple(tuple((s.kind, s.axes, s.op, s.source.mesh) for s in steps) for steps in directions)
    return kinds, move.dtype, move.needs_grad, move.grad, move.autocast


def _can_join(step: Step, shape: tuple[int, ...]) -> bool:
    if step.kind == "all_reduce":
        return True
    return step.kind in ("all_gather", "reduce_scatter") and is_even(step.source, shape) and is_even(step.target, shape)


def _bytes(move: Move) -> int:
    plan = move.redistribution
    sizes = [math.prod(layout.local_shape(plan.shape, layout.mesh.ranks[0])) for layout in (plan.source, plan.target)]
    return max(sizes) * move.dtype.itemsize


# -- starting early --------------------------------------------------------------------------------------------------------


def _started(instructions: Sequence[Instruction], options: Schedule) -> tuple[Instruction, ...]:
    """Starts a move right after its tensor is made, but no forward collective before the one ahead of it has ended.

    More than one gather under way would hold more than one gathered tensor too early.
    """
    starts: dict[int, list[Move]] = {}
    ready = {name: at + 1 for at, i in enumerate(instructions) for name in i.outputs}
    result = list(instructions)
    calls = [isinstance(i, Call) for i in instructions]
    earliest = 0
    for at, move in enumerate(instructions):
        if isinstance(move, Together):
            earliest = at + 1
        if not isinstance(move, Move):
            continue
        plan = move.redistribution
        forward = _communicates(plan.forward)
        place = max(ready.get(move.source, 0), earliest if forward else 0)
        if (forward or (move.needs_grad and _communicates(plan.backward))) and _bytes(move) >= options.large:
            if any(calls[place:at]):
                result[at] = replace(move, started=True)
                starts.setdefault(place, []).append(move)
        if forward:
            earliest = at + 1
    merged: list[Instruction] = []
    for at, instruction in enumerate(result):
        merged += [Start(move) for move in starts.get(at, ())]
        merged.append(instruction)
    return tuple(merged)


def _communicates(steps: Sequence[Step]) -> bool:
    return any(step.kind != "slice" for step in steps)
