"""Fake tensors for a module's state and inputs during capture: shapes without values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def autocast_around(device: torch.device) -> tuple[Any, ...] | None:
    """Returns the autocast that is on for a kind of device, as nodes carry it."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return device.type, torch.get_autocast_dtype(device.type), True, torch.is_autocast_cache_enabled()


def fake_of(mode: Any, tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a fake tensor of the same shape, strides, dtype and ``requires_grad``, on ``device``."""
    with mode:
        made = torch.empty_strided(tuple(tensor.shape), _strides(tensor), dtype=tensor.dtype, device=device)
    return made.requires_grad_(tensor.requires_grad) if made.is_floating_point() or made.is_complex() else made


def _strides(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.stride())


@contextlib.contextmanager
def fake_state(module: nn.Module, mode: Any, device: torch.device) -> Iterator[None]:
    """Replaces every parameter and buffer by a fake one of its global shape. Tied ones stay tied."""
    known: dict[int, Tensor] = {}
    changed: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for owner in module.modules():
            tables: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers)
            for table in tables:
                for name, value in table.items():
                    if value is None:
                        continue
                    if id(value) not in known:
                        made = fake_of(mode, value.detach(), device)
                        if table is owner._parameters:  # also where torch.func.functional_call put an ordinary tensor
                            made = nn.Parameter(made, requires_grad=value.requires_grad)
                        known[id(value)] = made
                    changed.append((table, name, value))
                    table[name] = known[id(value)]
        yield
    finally:
        for table, name, value in changed:
            table[name] = value
