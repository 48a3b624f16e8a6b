"""Simulates the memory of one micro-batch of a stage: its tensors, and the gradients that add up over micro-batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shardwright.base.torch_private import pytree
from shardwright.ir.instructions import Call, PerRank
from shardwright.ir.program import LocalProgram
from shardwright.plan.memory.calls import CallPlayer
from shardwright.plan.memory.local_tensor import LocalTensor, Strides
from shardwright.plan.memory.rank_state import RankState
from shardwright.plan.memory.usage import Storage, Usage


class HeldValues(dict[str, "HeldValue"]):
    """Values that a stage holds for all micro-batches, by local name."""


class HeldValue:
    """A held value: its memory, and that of its gradient."""

    def __init__(self, storage: Storage, tensor: LocalTensor):
        self.storage, self.tensor = storage, tensor
        self.gradient: Storage | None = None
        self.is_sum = False  # whether the gradient was added up outside of autograd, where nobody else has it


class MicroState(RankState):
    """State of one program; gradients of held values are added up at once, where they are for all micro-batches."""

    def __init__(self, usage: Usage, held: HeldValues) -> None:
        super().__init__()
        self.usage, self.held = usage, held
        self.puts_off = self.collects = False
        self.later: dict[str, None] = {}
        self.collected: list[tuple[str, Storage]] = []
        self.arrived: list[Storage] = []

    def add_gradient(self, name: str, storage: Storage, shape: tuple[int, ...], stride: Strides, cause: str) -> None:
        """Gives a value its gradient, or adds to the one it has.

        Args:
            name: of the value.
            storage: memory of the gradient.
            shape, stride: of the gradient.
            cause: the operator, for messages.
        """
        if name not in self.held:
            super().add_gradient(name, storage, shape, stride, cause)
        elif self.puts_off:
            self.later[name] = None
        elif self.collects:
            self.collected.append((name, self.usage.hold(storage)))
        else:
            add_up(self.usage, self.held[name], storage)


def add_up(usage: Usage, leaf: HeldValue, storage: Storage) -> None:
    """Makes a gradient that of a held value, or adds it to that."""
    if leaf.gradient is None:
        leaf.gradient = usage.hold(storage)
        usage.reassign(storage, "gradients")


def add_put_off(usage: Usage, name: str, leaf: HeldValue, storage: Storage) -> None:
    """Adds a gradient of a second half, which the caller held; the first sum is new memory.

    Args:
        usage: what is in use.
        name: of the value.
        leaf: the value.
        storage: of the gradient.
    """
    if leaf.gradient is not None and not leaf.is_sum:
        leaf.is_sum = True
        total = Storage(storage.size, "gradients", name)
        usage.point(name, total.size)
        usage.drop(leaf.gradient)
        leaf.gradient = usage.hold(total)
    add_up(usage, leaf, storage)
    usage.drop(storage)


class MicroCalls(CallPlayer):
    """Plays calls; in the first half of a backward keeps the gradients that arrive where held values are read."""

    def _play_backward(self, key: Any, local: Any, call: Call, names: Any, *rest: Any) -> None:
        state = self.state
        assert isinstance(state, MicroState)
        if state.puts_off and any(name in state.held for name in names):
            found = [state.gradients[name].storage for name in call.outputs if name in state.gradients]
            state.arrived += [self.usage.hold(storage) for storage in found]
        super()._play_backward(key, local, call, names, *rest)


class RunningMicro:
    """A micro-batch, or a slice of one, between its forward and its backward: its state, and what it holds besides."""

    def __init__(self, state: MicroState, holds: list[Storage]):
        self.state, self.holds = state, holds
        self.kept: dict[str, HeldValue] = {}  # what later slices read
        self.waits = False  # the whole backward is put off


def of_first_rank(program: LocalProgram) -> LocalProgram:
    """Returns a program with the arguments of the first of its ranks."""
    first = min((min(layout.mesh.ranks) for layout in program.layouts.values() if layout.mesh.ranks), default=0)

    def argument(leaf: Any) -> Any:
        return leaf.of(first) if isinstance(leaf, PerRank) else leaf

    def changed(instruction: Any) -> Any:
        if not isinstance(instruction, Call):
            return instruction
        args, kwargs = pytree.tree_map(argument, (instruction.args, instruction.kwargs))
        return replace(instruction, args=args, kwargs=kwargs)

    return replace(program, instructions=tuple(map(changed, program.instructions)))
