"""Redistribution: the steps that turn one layout of a tensor into another."""

from __future__ import annotations

from dataclasses import dataclass

from shardwright.ir.layout import Layout
from shardwright.ir.step import Step


@dataclass(frozen=True)
class Redistribution:
    """All steps from ``source`` to ``target``, and those that bring the gradient back.

    Args:
        shape: global shape.
        partial_gradient: axes of the target's mesh over which the gradient at the target is partial.
    """

    source: Layout
    target: Layout
    shape: tuple[int, ...]
    partial_gradient: tuple[str, ...]
    forward: tuple[Step, ...]
    backward: tuple[Step, ...]

    @property
    def is_identity(self) -> bool:
        return not self.forward and not self.backward

    def __str__(self) -> str:
        forward = " + ".join(map(str, self.forward)) or "identity"
        backward = " + ".join(map(str, self.backward)) or "identity"
        return f"{forward} | {backward}"
