"""Runs one stage: forward and backward of one micro-batch at a time.

Tensors come and go as lists with one tensor per rank group that this process runs; on a rank of a job the lists have one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shardwright.ir.program import LocalProgram
from shardwright.pipeline.cut import Stage
from shardwright.pipeline.parts import Parts

Pieces = list[Tensor]
Bind = Callable[..., Callable[..., Any]]


@dataclass
class _Running:
    """A micro-batch between its forward and its backward."""

    received: dict[str, Pieces]
    outputs: dict[str, Pieces]
    later: list[Callable[[], None]] = field(default_factory=list)  # gradients of weights that are put off


class StageRun:
    """One stage's programs, bound.

    Args:
        stage: the stage.
        parts: its program in parts.
        bind: binds a program to the world of the stage's ranks; with ``keep`` it returns local values.
        is_split: whether bound functions take and give lists of tensors, one per rank group.
    """

    def __init__(self, stage: Stage, parts: Parts, bind: Bind, is_split: bool):
        self.stage, self.parts, self.is_split = stage, parts, is_split
        self.once = bind(parts.once, keep=parts.held)
        self.slices = [bind(program, keep=parts.cut) if parts.cut else None for program in parts.slices]
        bound = {id(program): bind(program) for program in {id(p): p for p in parts.each}.values()}
        self.each = [bound[id(program)] for program in parts.each]
        self.received = tuple(stage.received)
        names = (*stage.sent, *stage.returned.values())
        self.outputs = list(zip(names, parts.each[0].outputs, strict=True)) if parts.each else []
        self.running: dict[int, _Running] = {}
        self.held: list[Pieces] = []
        self.updates: list[Tensor] = []

    # -- once per step ------------------------------------------------------------------------------------------------

    def begin(self, values: Sequence[Any]) -> list[Pieces]:
        """Runs what is the same for all micro-batches; returns the tensors that :meth:`hold` takes."""
        return [self._pieces(value) for value in self.once(*values)]

    def hold(self, held: list[Pieces]) -> None:
        """Gives the stage the values of :meth:`begin`, as leaves in which gradients add up."""
        self.held, self.running = held, {}

    # -- per micro-batch --------------------------------------------------------------------------------------------

    def forward(self, micro: int, received: Mapping[str, Pieces], grad: bool) -> dict[str, Pieces]:
        """Runs the forward of a micro-batch; returns the pieces of what the stage sends and returns.

        Args:
            micro: its number.
            received: the pieces of what other stages send.
            grad: whether a backward will follow.
        """
        cut_of = self.slices[micro]
        with torch.set_grad_enabled(grad):
            held = [self._given(pieces) for pieces in self.held]
            cut = list(cut_of(*held)) if cut_of is not None else []
            leaves = {name: [self._leaf(p, name, grad) for p in received[name]] for name in self.received}
            outputs, updates = self.each[micro](*held, *cut, *[self._given(leaves[name]) for name in self.received])
        found = {name: self._pieces(value) for (name, _), value in zip(self.outputs, outputs, strict=True)}
        self.updates = updates
        if grad:
            self.running[micro] = _Running(leaves, found)
        return found

    def backward(self, micro: int, gradients: Mapping[str, Pieces]) -> dict[str, Pieces]:
        """Runs the backward of a micro-batch; gradients of held values add up there.

        Args:
            micro: its number.
            gradients: of its outputs, by value.

        Returns:
            The gradients of what was received, by value.
        """
        run = self.running.pop(micro)
        tensors, given = self._roots(run, gradients)
        leaves = [leaf for leaf in self._leaves(run) if leaf.requires_grad]
        if tensors and leaves:
            torch.autograd.backward(tensors, given, inputs=leaves)
        return self._handed_back(run)

    def backward_input(self, micro: int, gradients: Mapping[str, Pieces]) -> dict[str, Pieces]:
        """Runs the part of a backward that other stages wait for; :meth:`backward_weight` runs the rest.

        Args:
            micro, gradients: see :meth:`backward`.
        """
        run = self.running[micro]
        tensors, given = self._roots(run, gradients)
        wanted = [leaf for pieces in run.received.values() for leaf in pieces if leaf.requires_grad]
        held = [leaf for pieces in self.held for leaf in pieces if leaf.requires_grad]
        if not wanted:
            run.later.append(lambda: _accumulate(tensors, given, held))
            return self._handed_back(run)
        found = torch.autograd.grad(tensors, wanted, given, retain_graph=True, allow_unused=True)
        for leaf, gradient in zip(wanted, found, strict=True):
            leaf.grad = gradient
        run.later.append(lambda: _accumulate(tensors, given, held))
        return self._handed_back(run)

    def backward_weight(self, micro: int) -> None:
        """Runs the rest of a backward: the gradients of weights."""
        for compute in self.running.pop(micro).later:
            compute()

    def _roots(self, run: _Running, gradients: Mapping[str, Pieces]) -> tuple[list[Tensor], list[Tensor]]:
        tensors, given = [], []
        for name, pieces in run.outputs.items():
            for piece, gradient in zip(pieces, gradients.get(name, ())):
                if piece.requires_grad:
                    tensors.append(piece)
                    given.append(gradient)
        return tensors, given

    def _leaves(self, run: _Running) -> list[Tensor]:
        return [leaf for pieces in (*self.held, *run.received.values()) for leaf in pieces]

    def _handed_back(self, run: _Running) -> dict[str, Pieces]:
        return {
            name: [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in pieces]
            for name, pieces in run.received.items()
            if any(leaf.requires_grad for leaf in pieces)
        }

    # -- lists and single tensors -------------------------------------------------------------------------------------

    def _pieces(self, value: Any) -> Pieces:
        return list(value) if isinstance(value, (list, tuple)) else [value]

    def _given(self, pieces: Pieces) -> Any:
        return pieces if self.is_split else pieces[0]

    def _leaf(self, piece: Tensor, name: str, grad: bool) -> Tensor:
        return piece.detach().requires_grad_(grad and name in self.stage.graph.needs_grad)


def _accumulate(tensors: list[Tensor], given: list[Tensor], held: list[Tensor]) -> None:
    if tensors and held:
        torch.autograd.backward(tensors, given, inputs=held)


def programs_of(parts: Parts) -> list[LocalProgram]:
    """Lists every program of a stage once."""
    return list({id(p): p for p in (parts.once, *parts.slices, *parts.each)}.values())
