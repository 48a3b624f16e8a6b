"""Modes and random state under which a computation ran, for running it a second time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor


def _kinds() -> tuple[str, ...]:
    """Lists the kinds of devices that tensors may be on."""
    return ("cpu", "cuda") if torch.cuda.is_initialized() else ("cpu",)


class Ambient:
    """Autocast settings that a program was called under."""

    def __init__(self) -> None:
        self.settings = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _kinds()]

    def enter(self, stack: ExitStack, autocast: tuple[Any, ...] | None) -> None:
        """Sets them, and within them those of an instruction.

        Casts are not cached from one operator to the next: each is computed again by itself.
        """
        for kind, enabled, dtype in self.settings:
            now = torch.is_autocast_enabled(kind)
            if now or enabled:
                stack.enter_context(torch.autocast(kind, dtype, enabled, False))
        if autocast is not None:
            kind, dtype, enabled, _ = autocast
            stack.enter_context(torch.autocast(kind, dtype, enabled, False))


class RandomState:
    """State of the generators at a time. As a context it is set within, and restored to the previous one after."""

    def __init__(self) -> None:
        self.states = self._now()

    @staticmethod
    def _now() -> list[Tensor]:
        return [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])

    @staticmethod
    def _set(states: Sequence[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1])

    def restore(self) -> None:
        """Restores the state."""
        self._set(self.states)

    def is_past(self) -> bool:
        """Tells whether random numbers have been drawn since."""
        return any(not torch.equal(a, b) for a, b in zip(self.states, self._now(), strict=False))

    def __enter__(self) -> None:
        self._outside = self._now()
        self._set(self.states)

    def __exit__(self, *error: object) -> None:
        self._set(self._outside)
