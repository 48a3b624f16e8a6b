"""Runs one call of the local program on fake tensors, to find what it makes, keeps and needs.

A call is run once forward, and once forward and backward for every set of strides its gradients come with. Nothing here
knows of other calls: tensors are classified as inputs, given gradients, and new memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from shardwright.base.torch_private import FakeTensorMode
from shardwright.cost.saved import filled, storage_key
from shardwright.ir.instructions import Call
from shardwright.plan.memory.allocations import AllocationTracker
from shardwright.plan.memory.fused_kernels import stand_in
from shardwright.plan.memory.local_tensor import LocalTensor, Strides, contiguous_strides


class Place(NamedTuple):
    """Memory that a tensor lies in: that of an input, of an output's given gradient, or new memory."""

    kind: Literal["input", "gradient", "new"]
    position: int


@dataclass(frozen=True)
class ForwardMemory:
    """Memory that a call makes and keeps.

    Args:
        outputs: every output, and where it lies.
        sizes: bytes of each piece of new memory that outputs lie in.
        kept: inputs and new memory of outputs that autograd keeps.
        kept_besides: bytes that autograd keeps besides.
        peak: bytes of new memory at most meanwhile.
        guessed: whether the call could not be run.
    """

    outputs: tuple[tuple[LocalTensor, Place], ...]
    sizes: tuple[float, ...]
    kept: frozenset[Place]
    kept_besides: float
    peak: float
    guessed: bool = False


@dataclass(frozen=True)
class BackwardMemory:
    """Memory that the backward of a call makes.

    Args:
        gradients: strides and place of the gradient of every input; ``None`` for those without.
        sizes: bytes of each piece of new memory that gradients lie in.
        peak: bytes at most meanwhile of new memory and of what only this call kept.
        peak_with_given: the same with the gradients that the backward is given, where nobody else holds them.
        guessed: whether the backward could not be run.
    """

    gradients: tuple[tuple[Strides, Place] | None, ...]
    sizes: tuple[float, ...]
    peak: float
    peak_with_given: float
    guessed: bool = False


@dataclass(frozen=True)
class LocalCall:
    """A call with its tensors described.

    Args:
        call: of which function, settings and number of outputs matter.
        tensors: what it reads.
        arguments: positional and keyword arguments, with a Slot for each of ``tensors``.
        device: kind of device.
    """

    call: Call
    tensors: tuple[LocalTensor, ...]
    arguments: tuple[Any, Any]
    device: str

    def forward(self) -> ForwardMemory:
        """Runs the call, or guesses where it cannot be run."""
        try:
            return self._run_forward()
        except Exception:  # whatever an operator may raise on fake tensors
            return self._guess_forward()

    def _run_forward(self) -> ForwardMemory:
        tracker = AllocationTracker(self.device == "cpu")
        with ExitStack() as stack:
            inputs, results, kept = self._run(stack, tracker)
            places = _places_of_inputs(inputs)
            sizes: list[float] = []
            outputs = []
            for result in results:
                key = storage_key(result)
                if key not in places:
                    places[key] = Place("new", len(sizes))
                    sizes.append(tracker.leave_out(result))
                described = LocalTensor(tuple(result.shape), result.stride(), result.dtype, result.requires_grad)
                outputs.append((described, places[key]))
            kept_places = frozenset(places[key] for key in kept if key in places)
            # outputs are left out and unkept tensors are gone, so the live ones are kept
            return ForwardMemory(tuple(outputs), tuple(sizes), kept_places, tracker.live, tracker.peak)

    def backward(self, strides: Sequence[Strides | None]) -> BackwardMemory:
        """Runs the call and its backward.

        Args:
            strides: of the gradient of every output; ``None`` for outputs without.

        Raises:
            Exception: whatever the operator's backward raises on fake tensors.
        """
        tracker = AllocationTracker(self.device == "cpu")
        with ExitStack() as stack:
            inputs, results, _ = self._run(stack, tracker)
            places = _places_of_inputs(inputs)
            for result in results:
                if storage_key(result) not in places:
                    tracker.leave_out(result)
            seeds = []
            for position, (result, stride) in enumerate(zip(results, strides)):
                if stride is not None:
                    make = _gradient_maker(tracker, places, position, tuple(result.shape), stride, result.dtype)
                    seeds.append(_GiveGradient.apply(make, result))  # type: ignore[no-untyped-call]
            for seed in seeds:
                tracker.leave_out(seed)
            del results, result  # the backward keeps what it needs of them
            tracker.begin_backward()
            wanted = [i for i, t in enumerate(inputs) if t.requires_grad]
            leaves = [inputs[i] for i in wanted]
            got = torch.autograd.grad(seeds, leaves, [torch.ones_like(s) for s in seeds], allow_unused=True)
            gradients: list[tuple[Strides, Place] | None] = [None] * len(inputs)
            sizes: list[float] = []
            for i, gradient in zip(wanted, got):
                if gradient is not None:
                    key = storage_key(gradient)
                    if key not in places:
                        places[key] = Place("new", len(sizes))
                        sizes.append(tracker.sizes.get(key, float(gradient.nbytes)))
                    gradients[i] = gradient.stride(), places[key]
            return BackwardMemory(tuple(gradients), tuple(sizes), tracker.peak, tracker.peak_with_given)

    def _run(self, stack: ExitStack, tracker: AllocationTracker) -> tuple[list[Tensor], list[Tensor], set[int]]:
        """Runs the call; returns inputs, results, and the storages that autograd keeps.

        The tracker tracks until ``stack`` closes.
        """
        call = self.call
        kept: set[int] = set()

        def keep(tensor: Tensor) -> Tensor:
            kept.add(storage_key(tensor))
            return tensor

        stack.enter_context(_fake_mode())
        inputs = [
            torch.empty_strided(t.shape, t.stride, dtype=t.dtype, device="cpu").requires_grad_(t.needs_grad)
            for t in self.tensors
        ]
        for tensor in inputs:
            tracker.track(tensor, 0.0)
        stack.enter_context(tracker)
        with ExitStack() as settings:
            settings.enter_context(torch.set_grad_enabled(call.grad))
            settings.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t))
            if call.autocast is not None:
                _, dtype, enabled, _ = call.autocast
                settings.enter_context(torch.autocast("cpu", dtype, enabled, False))
            args, kwargs = filled(self.arguments, inputs, "cpu")
            function = call.function if self.device == "cpu" else stand_in(call.function)
            result = function(*args, **kwargs)
        return inputs, list(result) if call.sequence else [result], kept

    def _guess_forward(self) -> ForwardMemory:
        """Guesses outputs like the largest input. All of them are kept, with all inputs that may have gradients."""
        largest = max(self.tensors, key=lambda t: t.bytes, default=LocalTensor((), (), torch.float32, False))
        needs_grad = self.call.grad and any(t.needs_grad for t in self.tensors)
        places = [Place("new", i) for i in range(len(self.call.outputs))]
        sizes = (float(largest.bytes),) * len(places)
        kept = [Place("input", i) for i, t in enumerate(self.tensors) if t.dtype.is_floating_point] + places
        outputs = tuple((largest._replace(needs_grad=needs_grad), place) for place in places)
        return ForwardMemory(outputs, sizes, frozenset(kept if needs_grad else ()), 0.0, sum(sizes), guessed=True)

    def guess_backward(self, strides: Sequence[Strides | None], forward: ForwardMemory) -> BackwardMemory:
        """Guesses the most that :meth:`backward` may find: a gradient as large as each tensor, all at once."""
        gradients: list[tuple[Strides, Place] | None] = [None] * len(self.tensors)
        sizes: list[float] = []
        for i, tensor in enumerate(self.tensors):
            if tensor.needs_grad:
                gradients[i] = contiguous_strides(tensor.shape), Place("new", len(sizes))
                sizes.append(float(tensor.bytes))
        given = sum(tensor.bytes for (tensor, _), stride in zip(forward.outputs, strides) if stride is not None)
        peak = sum(sizes) + forward.kept_besides
        return BackwardMemory(tuple(gradients), tuple(sizes), peak, peak + given, guessed=True)


@cache
def _fake_mode() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


def _places_of_inputs(inputs: Iterable[Tensor]) -> dict[int, Place]:
    """Returns the places by storage; where inputs share one, the first counts."""
    places: dict[int, Place] = {}
    for i, tensor in enumerate(inputs):
        places.setdefault(storage_key(tensor), Place("input", i))
    return places


class _GiveGradient(torch.autograd.Function):
    """Gives a gradient to the backward as the engine would: nobody else has it."""

    @staticmethod
    def forward(ctx: Any, make: Callable[[], Tensor], output: Tensor) -> Tensor:
        ctx.make = make
        return output.new_empty(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, Tensor]:
        return None, ctx.make()


def _gradient_maker(
    tracker: AllocationTracker,
    places: dict[int, Place],
    position: int,
    shape: tuple[int, ...],
    stride: Strides,
    dtype: torch.dtype,
) -> Callable[[], Tensor]:
    """Makes the gradient of an output when the backward asks for it; it does not hold the output."""

    def make() -> Tensor:
        tracker.giving = True
        made = torch.empty_strided(shape, stride, dtype=dtype, device="cpu")
        tracker.giving = False
        key = storage_key(made)
        places[key] = Place("gradient", position)
        weakref.finalize(made.untyped_storage(), places.pop, key, None)  # new memory may get its address
        return made

    return make
