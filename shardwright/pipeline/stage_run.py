"""Runs one stage: forward and backward of one micro-batch at a time.

Tensors come and go as lists with one tensor per rank group that this process runs; on a rank of a job the lists have one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from shardwright.base.operators import may_draw
from shardwright.ir.instructions import Call
from shardwright.ir.operator import OpOverload
from shardwright.ir.program import LocalProgram
from shardwright.pipeline.cut import Stage
from shardwright.pipeline.parts import Parts
from shardwright.pipeline.split_backward import SplitBackward, with_own_readings
from shardwright.rules.random_draw import DRAWS

Pieces = list[Tensor]
Bind = Callable[..., Callable[..., Any]]
Compiled = Callable[[LocalProgram], LocalProgram]


@dataclass
class _Running:
    """A micro-batch between its forward and its backward."""

    received: dict[str, Pieces]
    outputs: dict[str, Pieces]
    weights: list[tuple[Tensor, Tensor]]  # leaves that calls read held tensors through, with these; of split backwards
    split: SplitBackward | None = None
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # what later slices read, each with the leaf that they read
    earlier: list[Tensor] = field(default_factory=list)  # leaves of what earlier slices have kept


@dataclass
class StepState:
    """A stage's part of a step.

    Attributes:
        given: what its program that runs once reads: the stage's parameters among others.
        made: what that program makes; empty before it runs, and after the last work of the step.
        held: the same as leaves, in which gradients add up.
        sums_of: where these begin in autograd's graph with them, once they are freed.
        running: the micro-batches between their forward and their backward.
        sums: the held tensors, by identity, whose gradients are sums made here, which nobody else has.
        kept: leaves that later slices read, by micro-batch and local value, slice after slice.
    """

    given: list[Any] = field(default_factory=list)
    made: list[Pieces] = field(default_factory=list)
    held: list[Pieces] = field(default_factory=list)
    sums_of: list[tuple[GradientEdge, Tensor]] = field(default_factory=list)
    running: dict[int, _Running] = field(default_factory=dict)
    sums: set[int] = field(default_factory=set)
    kept: dict[tuple[int, str], list[Pieces]] = field(default_factory=dict)


class StageRun:
    """One stage's programs, bound.

    Args:
        stage: the stage.
        parts: its program in parts.
        bind: binds a program to the world of the stage's ranks; with ``keep`` it returns local values.
        is_split: whether bound functions take and give lists of tensors, one per rank group.
        puts_off: whether backwards come in two halves, the gradients of weights later.
        compiled: compiles what runs for each micro-batch. Its backward is one piece, which runs in the first half.
    """

    def __init__(
        self, stage: Stage, parts: Parts, bind: Bind, is_split: bool, puts_off: bool = False, compiled: Compiled | None = None
    ):
        self.stage, self.parts, self.is_split = stage, parts, is_split
        self.puts_off = puts_off = puts_off and compiled is None
        self.once = bind(parts.once, keep=parts.held)
        self.cuts = [bind(program, keep=parts.cut) if parts.cut else None for program in parts.cuts]
        bound, self.readings = {}, {}
        for program in {id(p): p for p in parts.each}.values():
            runs, readings = with_own_readings(program, parts.held) if puts_off else (program, [])
            if compiled is None:
                bound[id(program)] = bind(runs)
            self.readings[id(program)] = [parts.held.index(name) for name in readings]
        # segments are compiled for tensors of one size, and micro-batches that share a program may have others
        self.each = [bound[id(program)] if compiled is None else bind(compiled(program)) for program in parts.each]
        self.received = tuple(stage.received)
        names = (*stage.sent, *stage.returned.values())
        self.outputs = list(zip(names, parts.each[0].outputs)) if parts.each else []  # what is kept follows
        self.state = StepState()
        self.updates: list[Tensor] = []

    @property
    def is_here(self) -> bool:
        """Tells whether this process runs the stage."""
        return self.once is not None

    # -- once per step ------------------------------------------------------------------------------------------------

    def begin(self, values: Sequence[Any]) -> None:
        """Begins a step with the stage's parameters and its other inputs, as leaves in which gradients add up."""
        self.state = StepState(list(values))

    def unshard(self, grad: bool) -> None:
        """Runs what is the same for all micro-batches, such as gathers of parameters, unless it has run.

        Args:
            grad: whether a backward will follow.
        """
        if self.state.made:
            return
        with torch.set_grad_enabled(grad):
            self.state.made = [self._pieces(value) for value in self.once(*self.state.given)]
        self.state.held = [[piece.detach().requires_grad_(piece.requires_grad) for piece in made] for made in self.state.made]

    def reshard(self) -> None:
        """Frees what :meth:`unshard` has made; only the sums of its gradients stay."""
        for made, held in zip(self.state.made, self.state.held, strict=True):
            for piece, leaf in zip(made, held, strict=True):
                if leaf.grad is not None:
                    self.state.sums_of.append((get_gradient_edge(piece), leaf.grad))
        self.state.made, self.state.held = [], []
        self.state.sums.clear()

    def reduce_gradients(self) -> None:
        """Hands the sums of gradients back through what runs once, such as sums over ranks."""
        self.reshard()
        leaves = [value for value in self.state.given if isinstance(value, Tensor) and value.requires_grad]
        edges, sums = zip(*self.state.sums_of, strict=True) if self.state.sums_of else ((), ())
        self.state.sums_of.clear()
        if not edges or not leaves:
            return
        found = torch.autograd.grad(edges, leaves, sums, allow_unused=True)
        for leaf, gradient in zip(leaves, found, strict=True):
            if gradient is not None:
                leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient

    # -- per micro-batch --------------------------------------------------------------------------------------------

    def forward(self, micro: int, received: Mapping[str, Pieces], grad: bool) -> dict[str, Pieces]:
        """Runs the forward of a micro-batch; returns the pieces of what the stage sends and returns.

        Args:
            micro: its number.
            received: the pieces of what other stages send.
            grad: whether a backward will follow.
        """
        cut_of = self.cuts[micro]
        with torch.set_grad_enabled(grad):
            held = [self._given(pieces) for pieces in self.state.held]
            cut = list(cut_of(*held)) if cut_of is not None else []
            leaves = {name: [self._leaf(p, name, grad) for p in received[name]] for name in self.received}
            own = [self._own(self.state.held[at]) for at in self.readings[id(self.parts.each[micro])]]
            earlier = [self.state.kept[micro // self.parts.slices, name][at] for name, at in self.parts.earlier(micro)]
            given = (*(leaves[name] for name in self.received), *earlier, *([r for r, _ in o] for o in own))
            outputs, updates = self.each[micro](*held, *cut, *map(self._given, given))
        found = {name: self._pieces(value) for (name, _), value in zip(self.outputs, outputs)}
        self.updates = updates
        kept = self._keep(micro, [self._pieces(value) for value in outputs[len(self.outputs) :]], grad)
        if grad:
            weights = [pair for pairs in own for pair in pairs]
            read = [leaf for pieces in earlier for leaf in pieces]
            self.state.running[micro] = _Running(leaves, found, weights, None, kept, read)
        return found

    def _keep(self, micro: int, made: Sequence[Pieces], grad: bool) -> list[tuple[Tensor, Tensor]]:
        """Keeps what later slices read, as leaves in which their gradients add up; returns the tensors with their leaves."""
        batch, pairs = micro // self.parts.slices, list[tuple[Tensor, Tensor]]()
        for name, pieces in zip(self.parts.kept, made, strict=True):
            if (micro + 1) % self.parts.slices:
                leaves = [piece.detach().requires_grad_(grad and piece.requires_grad) for piece in pieces]
                self.state.kept.setdefault((batch, name), []).append(leaves)
                pairs += zip(pieces, leaves, strict=True)
            else:  # the last slice of its micro-batch; the units that have read the leaves hold them for their backwards
                self.state.kept.pop((batch, name), None)
        return pairs

    def backward(self, micro: int, gradients: Mapping[str, Pieces]) -> dict[str, Pieces]:
        """Runs the backward of a micro-batch; gradients of held values add up there.

        Args:
            micro: its number.
            gradients: of its outputs, by value.

        Returns:
            The gradients of what was received, by value.
        """
        run = self.state.running.pop(micro)
        tensors, given = self._roots(run, gradients)
        leaves = [leaf for leaf in self._leaves(run) if leaf.requires_grad]
        if tensors and leaves:
            torch.autograd.backward(tensors, given, inputs=leaves)
        self._hand_on(((leaf, leaf.grad) for leaf, _ in run.weights), run)
        return self._handed_back(run)

    def backward_input(self, micro: int, gradients: Mapping[str, Pieces]) -> dict[str, Pieces]:
        """Runs the part of a backward that other stages wait for; :meth:`backward_weight` runs the rest.

        Args:
            micro, gradients: see :meth:`backward`.
        """
        if not self.puts_off:
            return self.backward(micro, gradients)
        run = self.state.running[micro]
        tensors, given = self._roots(run, gradients)
        wanted = [leaf for pieces in run.received.values() for leaf in pieces if leaf.requires_grad]
        wanted += [leaf for leaf in run.earlier if leaf.requires_grad]
        held = [leaf for pieces in self.state.held for leaf in pieces if leaf.requires_grad]
        weights = [leaf for leaf, _ in run.weights if leaf.requires_grad]
        run.split = SplitBackward(tensors, given, wanted, [*held, *weights])
        self._hand_on(run.split.first(), run)
        return self._handed_back(run)

    def backward_weight(self, micro: int) -> None:
        """Runs the rest of a backward: the gradients of weights."""
        if not self.puts_off:
            return
        run = self.state.running.pop(micro)
        assert run.split is not None
        self._hand_on(run.split.second(), run)

    def _hand_on(self, found: Iterable[tuple[Tensor, Tensor | None]], run: _Running) -> None:
        """Adds gradients to the leaves that they are of; those of leaves for one call to the held tensors."""
        held = {id(leaf): piece for leaf, piece in run.weights}
        earlier = {id(leaf) for leaf in run.earlier}
        sums = self.state.sums
        for leaf, gradient in found:
            if gradient is None:
                continue
            if id(leaf) in earlier:  # which ends with its micro-batch, and is no sum of the step
                leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
                continue
            target = held.get(id(leaf), leaf)
            if target.grad is None:
                target.grad = gradient
            elif id(target) in sums:
                target.grad.add_(gradient)
            else:  # the first may be memory of somebody else's
                target.grad = target.grad + gradient
                sums.add(id(target))
            del gradient  # before the next is computed

    def _roots(self, run: _Running, gradients: Mapping[str, Pieces]) -> tuple[list[Tensor], list[Tensor]]:
        tensors, given = [], []
        for name, pieces in run.outputs.items():
            for piece, gradient in zip(pieces, gradients.get(name, ())):
                if piece.requires_grad:
                    tensors.append(piece)
                    given.append(gradient)
        for piece, leaf in run.kept:
            if leaf.grad is not None:
                tensors.append(piece)
                given.append(leaf.grad)
        return tensors, given

    def _leaves(self, run: _Running) -> list[Tensor]:
        leaves = [leaf for pieces in (*self.state.held, *run.received.values()) for leaf in pieces]
        return leaves + [leaf for leaf, _ in run.weights] + run.earlier

    def _handed_back(self, run: _Running) -> dict[str, Pieces]:
        """Takes the gradients of what was received, which leaves would hold until the second half."""
        found = {
            name: [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in pieces]
            for name, pieces in run.received.items()
            if any(leaf.requires_grad for leaf in pieces)
        }
        for pieces in run.received.values():
            for leaf in pieces:
                leaf.grad = None
        return found

    # -- lists and single tensors -------------------------------------------------------------------------------------

    def _pieces(self, value: Any) -> Pieces:
        return list(value) if isinstance(value, (list, tuple)) else [value]

    def _given(self, pieces: Pieces) -> Any:
        return pieces if self.is_split else pieces[0]

    def _own(self, held: Pieces) -> list[tuple[Tensor, Tensor]]:
        """Returns a leaf for each piece of a held value, for one call to read, with the piece."""
        return [(piece.detach().requires_grad_(piece.requires_grad), piece) for piece in held]

    def _leaf(self, piece: Tensor, name: str, grad: bool) -> Tensor:
        return piece.detach().requires_grad_(grad and name in self.stage.graph.needs_grad)


def draw_only(program: LocalProgram) -> None:
    """Draws the random numbers of a program and drops them, so that all ranks' generators stay alike."""
    for call in program.calls:
        if _draws(call) and not call.reads:
            call.function(*call.args, **call.kwargs)


def draws_once(parts: Parts) -> bool:
    """Tells whether a stage draws random numbers in what it runs once per step."""
    return any(_draws(call) for call in parts.once.calls)


def _draws(call: Call) -> bool:
    return call.function in DRAWS or (isinstance(call.function, OpOverload) and may_draw(call.function))


def programs_of(parts: Parts) -> list[LocalProgram]:
    """Lists every program of a stage once."""
    return list({id(p): p for p in (parts.once, *parts.cuts, *parts.each)}.values())
