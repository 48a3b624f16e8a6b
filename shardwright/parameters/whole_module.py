"""Gives a module whole ordinary parameters for a while, for code that runs the model itself: evaluation, generation, saving."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardwright.agreement.job_watch import note
from shardwright.agreement.random_state import agree_on_random_state
from shardwright.errors import WorldError
from shardwright.parameters.beside import hooks_of_user
from shardwright.parameters.delayed.recorder import is_delayed
from shardwright.parameters.distribute import _leave
from shardwright.parameters.handles import current
from shardwright.parameters.operators import is_cut
from shardwright.parameters.ours import is_ours, is_whole_copy, remember_whole_copy
from shardwright.parameters.placements import _like
from shardwright.parameters.whole import whole_value

_WHAT = "net.whole()"


class _Lent(NamedTuple):
    """A distributed parameter, the whole one that stands for it, and the tables that hold it."""

    stored: Any  # a parameter that is a DTensor
    whole: nn.Parameter
    places: list[tuple[dict[str, Any], str]]


@contextmanager
def whole_parameters(root: nn.Module, device: torch.device) -> Iterator[None]:
    """Makes every distributed parameter of a module an ordinary one, with the whole value, until the block ends.

    Every rank of the job enters the block. What was written into parameters and gradients is then cut back into the pieces,
    also after an error. Parameters that the block has replaced stay as they are.

    Args:
        root: the module. Parameters that no net has distributed get rank 0's values.
        device: where random numbers are drawn. All ranks draw those of rank 0 within the block.

    Raises:
        WorldError: a parameter has no value yet, or got another shape or dtype within the block.
    """
    note(_WHAT)
    lent: dict[int, _Lent] = {}
    for module in root.modules():
        for key, parameter in module._parameters.items():
            stored = current(parameter)
            if stored is None or is_whole_copy(stored):
                continue
            if not is_ours(stored):
                _send_first(stored, key)
                continue
            if id(stored) not in lent:
                lent[id(stored)] = _Lent(stored, _whole_of(stored), [])
            lent[id(stored)].places.append((module._parameters, key))
    agree_on_random_state(device)
    for each in lent.values():
        for table, key in each.places:
            table[key] = each.whole
    try:
        yield
    finally:
        wrong = [said for each in lent.values() if (said := _take_back(each))]
        if wrong:
            raise WorldError(f"{'; '.join(wrong)}: change it outside of the block, on every rank")


def _send_first(parameter: Tensor, key: str) -> None:
    """Sends rank 0's value of a parameter that is not distributed yet, as the first call of a net would."""
    if is_delayed(parameter) or parameter.is_meta:
        raise WorldError(f"parameter {key} has no value yet: call net.compile(*inputs), which makes it, before net.whole()")
    value = parameter.detach().contiguous()
    dist.broadcast(value.view(-1).view(torch.uint8), 0)
    parameter.detach().copy_(value)


def _whole_of(stored: Any) -> nn.Parameter:
    whole = nn.Parameter(whole_value(stored, _WHAT), requires_grad=stored.requires_grad)
    vars(whole).update(vars(stored))
    remember_whole_copy(whole)
    if stored.grad is not None:
        whole.grad = whole_value(stored.grad, _WHAT)
    hooks = hooks_of_user(stored)
    if hooks:
        whole._backward_hooks = hooks
    if stored._post_accumulate_grad_hooks is not None:
        whole._post_accumulate_grad_hooks = stored._post_accumulate_grad_hooks
    return whole


@torch.no_grad()
def _take_back(lent: _Lent) -> str:
    """Writes a whole parameter into its piece and puts that back. Returns what is wrong with it, or ``""``."""
    stored, whole, places = lent
    names = [key for table, key in places if table.get(key) is whole]
    for table, key in places:
        if table.get(key) is whole:
            table[key] = stored
    if whole.shape != stored.shape or whole.dtype != stored.dtype:
        is_now, was = (f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in (whole, stored))
        return f"parameter {(names or ['?'])[0]} is {is_now} at the end of net.whole() and was {was}"
    stored.requires_grad_(whole.requires_grad)
    _write(stored, whole.detach())
    if whole.grad is None or stored.grad is None:
        stored.grad = None if whole.grad is None else _like(stored, whole.grad)
    elif isinstance(stored.grad, DTensor):
        _write(stored.grad, whole.grad)
    _leave(whole, stored)  # an optimizer or a list that was made within the block follows the distributed one
    return ""


def _write(stored: Any, value: Tensor) -> None:
    """Writes a whole value into a piece, where it differs: a write makes graphs that hold the piece invalid."""
    if is_cut(stored):
        piece = _like(stored, value)._local_tensor
        if not torch.equal(piece, stored._local_tensor):
            stored._local_tensor.copy_(piece)
    elif stored._local_tensor.data_ptr() != value.data_ptr():
        stored._local_tensor.copy_(value)
