"""Self-defined: an operator that runs on its local pieces in layouts that the user gives (``self_define_shard``).

The user promises that the local results are the pieces of the global one; only their shapes are checked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from shardwright.errors import ShardwrightError
from shardwright.ir.instructions import Ref
from shardwright.ir.operator import Operator, operator_name
from shardwright.ir.signature import Signature
from shardwright.rules.lowering import Local
from shardwright.rules.notation import parse
from shardwright.rules.pieces import names, notation
from shardwright.rules.registry import rule_for


@dataclass(frozen=True)
class SelfDefined:
    """An operator under a name that has no other rule."""

    function: Callable[..., Any]

    @property
    def __name__(self) -> str:
        return "self_defined"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


@rule_for("self_defined")
def _rule(op: Operator) -> Signature:
    """Makes every dim a factor of its own. The layouts say which are split together."""
    inputs = [[f"{name}~" for name in names(len(meta.shape), f"i{i}_")] for i, meta in enumerate(op.inputs)]
    outputs = [names(len(meta.shape), f"o{i}_") for i, meta in enumerate(op.outputs)]
    signature = parse(notation(inputs, outputs), op, None, (), _on_pieces)
    return replace(signature, tied=frozenset(signature.order))


def _on_pieces(local: Local) -> tuple[Ref, ...]:
    results = local.same_call()
    name = operator_name(local.op.target.function)  # type: ignore[attr-defined]
    return tuple(local.call(of_shape, ref, local.local_shape(True, i), name) for i, ref in enumerate(results))


def of_shape(x: Tensor, shape: Sequence[int], name: str) -> Tensor:
    """Checks that a tensor has this shape, and returns it.

    Raises:
        ShardwrightError: it has another.

    >>> import torch
    >>> of_shape(torch.ones(2), [2], "aten.relu")
    tensor([1., 1.])
    """
    if list(x.shape) != list(shape):
        raise ShardwrightError(
            f"self_define_shard: {name} made a piece of shape {list(x.shape)}, but out_strategy says {list(shape)}; give the "
            "layout that its pieces really have"
        )
    return x
