"""Gradient accumulation: a batch in several parts, one after the other, and one reduction of the gradients for all.

The local program is cut in two. What only parameters go through, their gathers and the sums of their gradients, runs once
a step. The rest runs forward and backward for every micro-batch, as part of the forward, so that only one micro-batch's
activations are held at a time; gradients add up where the two parts meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.capture.session import current_session
from shardwright.capture.torch_private import pytree
from shardwright.derivatives import first_derivative_only
from shardwright.errors import ArgumentTypeError, ShardwrightError
from shardwright.partition.program import Instruction, LocalProgram, Move, ProgramInput

Run = Callable[..., tuple[list[Any], list[Tensor]]]


class GradAccumulation(nn.Module):
    """A network that takes its batch in several parts; its result is the mean of theirs.

    Args:
        network: its result is the loss, a scalar, or a tuple whose first element is; tensors beside it are put together
            along dim 0, and have no gradient.
        micro_size: number of parts. Every tensor input whose dim 0 is as long as the first one's is cut along it.
        reduction: ``"mean"``: of the losses; where each is a mean over its part, that is the mean over the batch.
            ``"sum"``: their sum.

    Within :class:`shardwright.AutoParallel` the forward pass of each part is followed by its backward pass, and gradients
    are reduced over ranks once; the call's result then hands them on. Elsewhere it is a plain loop.

    Raises:
        ShardwrightError: a number that makes no sense (``ArgumentTypeError``: none at all); at a call, a batch that it does
            not divide.

    >>> model = GradAccumulation(nn.Sequential(nn.Flatten(), nn.Linear(4, 1)), 2, reduction="sum")
    >>> model.micro_size
    2
    """

    def __init__(self, network: nn.Module, micro_size: int, reduction: str = "mean"):
        super().__init__()
        if not isinstance(network, nn.Module):
            raise ArgumentTypeError(f"GradAccumulation({network!r}): give a module")
        if not isinstance(micro_size, int) or isinstance(micro_size, bool):
            raise ArgumentTypeError(f"GradAccumulation(micro_size={micro_size!r}): give a whole number")
        if micro_size <= 0:
            raise ShardwrightError(f"GradAccumulation(micro_size={micro_size}): give the number of parts, 1 or more")
        if reduction not in ("mean", "sum"):
            raise ShardwrightError(f"GradAccumulation(reduction={reduction!r}): give 'mean' or 'sum'")
        self.network, self.micro_size, self.reduction = network, micro_size, reduction
        self._is_given_a_part = False  # while it is captured by itself

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_given_a_part and current_session() is not None:
            return self.network(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        found = []
        for part in self.parts(leaves):
            part_args, part_kwargs = pytree.tree_unflatten(part, spec)
            (loss, *beside), out_spec = pytree.tree_flatten(self.network(*part_args, **part_kwargs))
            found.append(([loss, *(b.detach() if isinstance(b, Tensor) else b for b in beside)], out_spec))
        results = [self.joined([leaves for leaves, _ in found], position) for position in range(len(found[0][0]))]
        return pytree.tree_unflatten(results, found[0][1])

    def parts(self, leaves: Sequence[Any]) -> list[list[Any]]:
        """The flat inputs of every micro-batch."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim]
        if not tensors:
            raise ShardwrightError("GradAccumulation was called without a tensor to cut along dim 0")
        batch = tensors[0].shape[0]
        if batch % self.micro_size:
            raise ShardwrightError(
                f"GradAccumulation(micro_size={self.micro_size}): dim 0 of the inputs is {batch}, which {self.micro_size} does "
                f"not divide; use a batch that is a multiple of {self.micro_size}"
            )
        size = batch // self.micro_size
        return [
            [
                leaf[i * size : (i + 1) * size] if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == batch else leaf
                for leaf in leaves
            ]
            for i in range(self.micro_size)
        ]

    def joined(self, results: Sequence[Sequence[Any]], position: int) -> Any:
        """One result of the batch out of those of its parts: scalars are averaged or added, others put together."""
        values = [leaves[position] for leaves in results]
        if not isinstance(values[0], Tensor):
            return values[0]
        if values[0].ndim:
            return torch.cat(values)
        total = values[0]
        for value in values[1:]:
            total = total + value
        return total / self.micro_size if self.reduction == "mean" else total


@contextmanager
def given_a_part(module: GradAccumulation | None) -> Iterator[None]:
    """Within the block the module is called with one micro-batch."""
    if module is None:
        yield
        return
    module._is_given_a_part = True
    try:
        yield
    finally:
        module._is_given_a_part = False


# -- the program in two parts ----------------------------------------------------------------------------------------------


def cut_program(program: LocalProgram, gathers_once: bool) -> tuple[LocalProgram, LocalProgram, tuple[str, ...]]:
    """What runs once a step, and what runs for every micro-batch.

    Args:
        program: not scheduled yet.
        gathers_once: whether split parameters are gathered once; else for every micro-batch, and their gradients scattered.

    Returns:
        The two programs, and the local values that the first hands to the second: its inputs of kind ``local``.
    """
    own = {i.name for i in program.inputs if i.kind == "parameter"}
    once: list[Instruction] = []
    each: list[Instruction] = []
    ready = set(own)
    for instruction in program.instructions:
        if isinstance(instruction, Move) and instruction.source in ready and (gathers_once or not _gathers(instruction)):
            once.append(instruction)
            ready.add(instruction.output)
        else:
            each.append(instruction)
    read = {name for instruction in each for name in program.refs_of(instruction)}
    read |= {o for o in program.outputs if isinstance(o, str)} | {v for _, v in program.updates}
    metas = {i.name: i.meta for i in program.inputs}
    for move in once:
        assert isinstance(move, Move)
        metas[move.output] = metas[move.source]
    handed = tuple(name for name in metas if name in ready and name in read)
    given = tuple(i for i in program.inputs if i.kind == "parameter")
    first = replace(program, inputs=given, instructions=tuple(once), outputs=(), updates=(), places={})
    local = [ProgramInput(name, "local", name, metas[name], program.layouts[name]) for name in handed]
    inputs = (*(i for i in program.inputs if i.kind != "parameter"), *local)
    return first, replace(program, inputs=inputs, instructions=tuple(each)), handed


def _gathers(move: Move) -> bool:
    return any(step.kind != "slice" for step in move.redistribution.forward)


# -- running -----------------------------------------------------------------------------------------------------------------


class AccumulatedRun:
    """Runs a step's micro-batches; a bound program to those who call it.

    Args:
        module: what the user made.
        inputs: of the whole program.
        once, each: the two parts, bound; ``once`` returns what it hands over.
        update: writes back, after each micro-batch, what the callable changed in place.
    """

    def __init__(
        self,
        module: GradAccumulation,
        inputs: Sequence[ProgramInput],
        once: Callable[..., list[Any]],
        each: Run,
        update: Callable[[list[Any], list[Tensor]], None],
    ):
        self.module, self.once, self.each, self.update = module, once, each, update
        self.parameters = [n for n, i in enumerate(inputs) if i.kind == "parameter"]
        self.others = [n for n, i in enumerate(inputs) if i.kind != "parameter"]
        self.cut = [n for n, i in enumerate(inputs) if i.kind == "input"]

    def __call__(self, *values: Any) -> tuple[list[Any], list[Tensor]]:
        held = self.once(*[values[n] for n in self.parameters])
        flat, spec = pytree.tree_flatten(held)
        batches = self._batches(values)
        if torch.is_grad_enabled() and any(t.requires_grad for t in flat):
            return list(_Accumulate.apply(self, batches, spec, *flat)), []
        return self._joined([self._run(batch, held) for batch in batches]), []

    def _batches(self, values: Sequence[Any]) -> list[list[Any]]:
        """The values of every micro-batch, at their places; parameters left out."""
        given = [values[n] for n in self.cut]
        if any(isinstance(v, Tensor) and v.requires_grad for v in given):
            raise ShardwrightError("GradAccumulation: an input requires a gradient, which it does not give; detach() it")
        found = []
        for part in self.module.parts(given):
            batch = list(values)
            for n, value in zip(self.cut, part, strict=True):
                batch[n] = value
            found.append(batch)
        return found

    def _run(self, batch: list[Any], held: Any) -> list[Any]:
        outputs, updates = self.each(*[batch[n] for n in self.others], *held)
        if updates:
            self.update(batch, updates)
        return outputs

    def _joined(self, results: list[list[Any]]) -> list[Any]:
        return [self.module.joined(results, position) for position in range(len(results[0]))]

    def forward_and_backward(self, batches: list[list[Any]], spec: Any, leaves: list[Tensor]) -> list[Any]:
        """Every micro-batch, forward and backward; gradients add up in the leaves."""
        held, results = pytree.tree_unflatten(leaves, spec), []
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        for batch in batches:
            outputs = self._run(batch, held)
            torch.autograd.backward(_loss(outputs), inputs=wanted)
            results.append([o.detach() if isinstance(o, Tensor) else o for o in outputs])
        return self._joined(results)


def _loss(outputs: Sequence[Any]) -> Tensor:
    loss = outputs[0] if outputs else None
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise ShardwrightError(
            f"GradAccumulation: the first result of the network is {_described(loss)}; it must be the loss, a scalar tensor "
            "that depends on the parameters: put the loss into the network"
        )
    return loss


def _described(value: Any) -> str:
    return f"a tensor of {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


class _Accumulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: AccumulatedRun, batches: list[list[Any]], spec: Any, *flat: Tensor) -> tuple[Any, ...]:
        leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in flat]
        with torch.enable_grad():
            results = run.forward_and_backward(batches, spec, leaves)
        ctx.gradients = [leaf.grad for leaf in leaves]
        ctx.scale = 1 / run.module.micro_size if run.module.reduction == "mean" else 1.0
        ctx.mark_non_differentiable(*[r for r in results[1:] if isinstance(r, Tensor)])
        return tuple(results)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, gradient: Tensor, *rest: Any) -> tuple[Any, ...]:
        if ctx.gradients is None:
            raise RuntimeError("GradAccumulation: its gradients were handed on already; call the network again")
        gradients, ctx.gradients = ctx.gradients, None
        scale = float(gradient) * ctx.scale
        return None, None, None, *[None if g is None else g.mul_(scale) if scale != 1.0 else g for g in gradients]
