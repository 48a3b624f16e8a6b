"""Runs the parts of a batch one after another and averages their results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shardwright.base.derivatives import first_derivative_only
from shardwright.base.torch_private import pytree
from shardwright.errors import ShardwrightError
from shardwright.ir.instructions import ProgramInput
from shardwright.train.accumulation.module import GradAccumulation

Run = Callable[..., tuple[list[Any], list[Tensor]]]


class AccumulatedRun:
    """Runs a step's micro-batches; its callers see one bound program.

    Args:
        module: the user's module.
        inputs: of the whole program.
        once, each: the two parts, bound; ``once`` returns the local values that ``each`` reads.
        update: writes back, after each micro-batch, the tensors that the callable changed in place.
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
        """Returns the values of every micro-batch, at their places; parameters are left out."""
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
        """Runs every micro-batch forward and backward; gradients add up in the leaves."""
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
