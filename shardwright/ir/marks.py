"""Marks: requests for an operator, a function or a module, carried through capture onto graph nodes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, eq=False)
class Mark:
    """One request of the user, made where an operator, function or module is defined.

    Args:
        name: name for messages: ``MatMul``, ``matmul``, a module's class.
        in_strategy, out_strategy: tuples of slice counts or Layouts, one per tensor input or output; ``None``: not given.
        parameter_plan: parameter name (relative to the module) -> slice counts or a Layout.
        attributes: operator attributes (``add_prim_attr``).
        source: ``file:line`` where the request was made.
        exact: whether the layouts are complete, inputs and outputs alike, so that nothing may be added.
        is_pin: a layout pinned onto a value in the middle of a model (``reshard``).
    """

    name: str
    in_strategy: Any = None
    out_strategy: Any = None
    parameter_plan: dict[str, Any] | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    is_pin: bool = False
    module_path: str | None = None
    exact: bool = False

    @property
    def asks_for_layouts(self) -> bool:
        """True if it says anything about layouts."""
        return any(asked is not None for asked in (self.in_strategy, self.out_strategy, self.parameter_plan))
