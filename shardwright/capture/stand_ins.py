"""Replacements, while a callable is captured, for parts of torch that are not torch functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.base.torch_private import (
    BackwardHook,
    BatchNorm,
    CheckpointFunction,
    SingleLevelFunction,
    annotate,
    checkpoint_module,
    module_calls,
    transformer_module,
)
from shardwright.capture.cumulative_norm import norm_forward
from shardwright.capture.own_backward import RecordedBackwardHook
from shardwright.capture.padded_encoder import encoder_forward, layer_forward
from shardwright.capture.refusals import refuse
from shardwright.capture.session import RECOMPUTE
from shardwright.capture.size_stand_ins import SizeStandIn
from shardwright.capture.torch_functions import Watch
from shardwright.errors import CaptureError

_plain_checkpoint = checkpoint_module._checkpoint_without_reentrant_generator
_plain_enter = torch.autograd.graph.saved_tensors_hooks.__enter__


def replacements(watch: Watch) -> list[tuple[Any, str, Any]]:
    """Lists owner, name and replacement of each replaced part of torch."""

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        plain = super(SingleLevelFunction, cls).apply  # type: ignore[misc]
        if watch.is_in_callable and cls is CheckpointFunction:
            with annotate({RECOMPUTE: True}):
                return _call_reentrant(*args)
        if watch.is_transforming and not cls.__module__.startswith("torch."):
            raise _within_a_transformation(cls)
        _refuse_ragged(cls, args)
        if watch.is_in_callable and _has_own_backward(cls, args):
            with watch.paused():
                return watch.own_backwards.call(cls, plain, args)
        return plain(*args, **kwargs)

    def checkpoint(*args: Any, **kwargs: Any) -> Iterator[None]:
        """Replaces what a checkpoint does before and after the call. The operators within are recomputed."""
        if not watch.is_in_callable:
            yield from _plain_checkpoint(*args, **kwargs)
            return
        with annotate({RECOMPUTE: True}):
            yield

    def enter(hooks: Any) -> Any:
        if watch.is_in_callable:
            _check_saved_tensors_hooks(hooks)
        return _plain_enter(hooks)

    def unseeded(name: str, plain: Any) -> Any:
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            if watch.is_in_callable:
                raise refuse(
                    f"torch.{name} cannot be captured: the state of the generator is no part of the program",
                    "Call it outside, before the step",
                )
            return plain(*args, **kwargs)

        return stand_in

    def module_hooks(module: nn.Module, hooks: Any, pre_hooks: Any) -> Any:
        """Stands for what a call of a module with backward hooks makes."""
        if watch.is_in_callable:
            return RecordedBackwardHook(watch.own_backwards, module, hooks, pre_hooks)
        return BackwardHook(module, hooks, pre_hooks)

    seeds = ("manual_seed", "seed", "set_rng_state", "get_rng_state", "initial_seed")
    return [
        *((owner, name, unseeded(name, getattr(torch, name))) for owner in (torch, torch.random) for name in seeds),
        (SingleLevelFunction, "apply", classmethod(apply)),
        (checkpoint_module, "_checkpoint_without_reentrant_generator", checkpoint),
        (torch.autograd.graph.saved_tensors_hooks, "__enter__", enter),
        (module_calls, "BackwardHook", module_hooks),
        # a batch norm of the whole batch is one already, whose group and device torch would ask for
        (nn.SyncBatchNorm, "forward", norm_forward),
        (BatchNorm, "forward", norm_forward),
        (nn.TransformerEncoder, "forward", encoder_forward),
        # whether a mask that is used is the causal one, which torch would read off its values
        (transformer_module, "_detect_is_causal_mask", lambda mask, is_causal=None, size=None: is_causal is True),
        (nn.TransformerEncoderLayer, "forward", layer_forward),
    ]


def _refuse_ragged(cls: Any, args: Any) -> None:
    for ragged in (a for a in args if isinstance(a, SizeStandIn)):
        raise ragged._refused(cls.__name__)


def _within_a_transformation(cls: Any) -> CaptureError:
    return refuse(
        f"{cls.__name__}, an autograd.Function, is called within a transformation of torch.func: its backward is not that of "
        "the operators in it",
        "Write it with torch's operators, or take the derivative with torch.autograd.grad",
    )


def _has_own_backward(cls: Any, args: Any) -> bool:
    """Tells whether a call of an ``autograd.Function`` has a backward of the user's own.

    Those of torch have the derivatives of their forward, or belong to an operator that is captured as a whole.
    """
    wants = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
    return wants and not cls.__module__.startswith("torch.")


def _call_reentrant(function: Callable[..., Any], preserves_random_state: bool, *args: Any) -> Any:
    """Replaces a reentrant checkpoint: calls the function, without gradients if none of its arguments needs any."""
    wants = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
    with torch.set_grad_enabled(wants):
        return function(*args)


def _check_saved_tensors_hooks(hooks: Any) -> None:
    """Refuses a block of hooks on saved tensors; torch's own (``save_on_cpu``) change no value."""
    packs = getattr(hooks.pack_hook, "__module__", None) or ""
    if torch.is_grad_enabled() and not packs.startswith("torch."):
        raise refuse(
            "saved_tensors_hooks in a captured callable cannot be captured: what is saved for the backward pass is decided by "
            "the parallel program",
            "Open the block around the call of the parallel module",
        )
