"""Call keys: the part of a call's signature that its inputs make, and what differs from an earlier call's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from shardwright.agreement.signature import value_summaries
from shardwright.agreement.watch import Summarize
from shardwright.base.torch_private import pytree
from shardwright.errors import WorldError
from shardwright.train.outputs.split_output import SplitOutput, whole_outputs


@contextmanager
def _out_of_inference() -> Iterator[None]:
    """Leaves inference mode within the block and keeps the grad mode. So new tensors can be trained."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def _leaf_key(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return (leaf.shape, leaf.stride(), leaf.dtype, leaf.requires_grad, leaf.device)
    try:
        hash(leaf)
    except TypeError:
        return repr(leaf)
    return (type(leaf), leaf)


def torch_modes() -> tuple[Any, ...]:
    """Returns the modes of torch that a graph depends on: of gradients, of autocast, and of numbers."""
    autocast = (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"))
    dtype = (torch.get_autocast_dtype("cpu"), torch.get_autocast_dtype("cuda")) if any(autocast) else None
    modes = (torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled())
    return torch.is_grad_enabled(), autocast, dtype, modes


def flat_inputs(args: Any, kwargs: Any) -> tuple[Any, Any, list[Any], Any]:
    """Returns the inputs of a call, split outputs of other calls made whole, and their leaves and structure.

    Raises:
        WorldError: one is distributed.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    if any(isinstance(leaf, SplitOutput) for leaf in leaves):
        leaves = whole_outputs(leaves)
        args, kwargs = pytree.tree_unflatten(leaves, spec)
    if any(isinstance(leaf, DTensor) for leaf in leaves):
        raise WorldError("net(...) got a distributed tensor, computed from parameters: give sw.full_value(tensor)")
    return args, kwargs, leaves, spec


def input_summary(leaves: list[Any], are_alike: bool, numbers: Callable[[], list[Tensor]] = list) -> Summarize | None:
    """Returns what summarizes the values of a call's inputs for a comparison between ranks.

    Args:
        leaves: the flat inputs.
        are_alike: whether all ranks are to be given the same; otherwise nothing is compared.
        numbers: returns the changing numbers that the call reads.
    """
    return (lambda sketched: value_summaries([*leaves, *numbers()], sketched)) if are_alike else None


def why_planned_again(key: Any, before: Any, changed: Sequence[str], leaves: Sequence[Any]) -> str:
    """Says what differs between the keys of two calls.

    Args:
        key, before: the keys, of this call and of the one planned before.
        changed: the Python values that have changed.
        leaves: the flat inputs of this call.
    """
    why = []
    if key[:3] != before[:3]:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves if isinstance(leaf, Tensor))
        why.append(f"new inputs (shapes {shapes})")
    if key[3][1] != before[3][1]:
        why.append("gradients are on" if key[3][1] else "gradients are off")
    if key[3][2:4] != before[3][2:4]:
        why.append("another autocast")
    why += [*changed[:3], *([f"{len(changed) - 3} more"] if len(changed) > 3 else [])]
    return "; ".join(why) or "a mode of the model that is gone"
