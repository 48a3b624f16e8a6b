"""Traits: facts about operators besides their rules, one row beside each rule.

Rows stand at the end of each family's file, those of operators without a rule in ``no_rule.py``. Facts that torch has about
an overload, such as whether it draws, come from torch. An operator without a row is a pointwise one that nothing else is
known about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import Tensor

from shardwright.base.operators import has_gradient, may_draw
from shardwright.ir.operator import Operator, OpOverload, operator_name

Workspace = Callable[[Sequence[Any], Sequence[Tensor]], float]


@dataclass(frozen=True)
class Traits:
    """Facts about an operator.

    Prices read these, also for another library's operator with the name of one of torch's:

    Args:
        family: kind of its cost; see :func:`family`. ``free_when``: tells which of its calls cost as little as a view.
        backward: set if its backward is not the forward again: ``"in zeros"`` writes the gradient into zeros of the input's
            shape, ``"summed"`` sums it to the input's shape, ``"handed on"`` passes it on as it is.
        operands: for a product, the position of the first of its two operands.
        summed: for a product, the size of the dims that it sums over; default: the last dim of its first operand.
        transposed: for a convolution, whether it is a transposed one.

    The rest is set for torch's own operators, and for the functions that rules call:

    Args:
        draws: whether it may take numbers from a generator. ``mutates``: whether it writes to an argument. ``is_view``:
            whether its result may share an input's memory. All three come from torch.
        has_gradient: whether a gradient flows back through it; ``False``: it reads tensors without their gradients.
        linear: whether its backward needs none of its inputs.
        new_result: whether its result is new memory that autograd does not keep.
        new_gradients: whether its backward makes the gradients of its first two operands in new memory.
        computes: whether it does work on values that a compiler can merge with other work.
        reshapes: whether it gives the elements, in their order, another shape. ``reorders``: whether it reorders dims.
        looks_up: whether it picks elements of a table, whose size then costs nothing. ``embeds``: whether it picks rows of a
            table by their numbers only.
        fused: whether it is worth a strategy, since it is one kernel for much work. ``kernel``: which of the kernels that
            devices other than a CPU have, and that keep less: ``"attention"``, ``"norm"`` or ``"dropout"``.
        half: whether autocast makes it read its inputs in the lower precision.
        entry_differs: whether torch's Python function of its name takes other arguments than the operator.
        user_order: where torch's Python function takes its tensors in another order: the input at each of its positions.
        workspace: bytes that the CPU's kernel needs while it runs, from arguments and results.
        large_mean: whether the mean that the CPU's kernel makes lies in memory as large as the first argument.
        sums_in_place: whether backward formulas run it in place, which fake tensors do not.
    """

    family: str = "pointwise"
    free_when: Callable[[Operator], bool] | None = None
    backward: str = ""
    operands: int = 0
    summed: Callable[[Operator], float] | None = None
    transposed: bool = False
    draws: bool = False
    mutates: bool = False
    is_view: bool = False
    has_gradient: bool = True
    linear: bool = False
    new_result: bool = False
    new_gradients: bool = False
    computes: bool = True
    reshapes: bool = False
    reorders: bool = False
    looks_up: bool = False
    embeds: bool = False
    fused: bool = False
    kernel: str = ""
    half: bool = False
    entry_differs: bool = False
    user_order: tuple[int, ...] = ()
    workspace: Workspace | None = None
    large_mean: bool = False
    sums_in_place: bool = False

    @property
    def does_work(self) -> bool:
        """True if it does more than make constants and view memory in another way."""
        return self.computes and not self.reshapes and self.family not in ("view", "create")

    def of_prices(self) -> Traits:
        """Returns the traits that prices read, with the others at their defaults."""
        return Traits(self.family, self.free_when, self.backward, self.operands, self.summed, self.transposed)


_ROWS: dict[str, Traits] = {}


def register_traits(rows: Mapping[Traits, str]) -> None:
    """Registers the traits of operators, given by their names without the library.

    Raises:
        ValueError: an operator has a row already.

    >>> register_traits({Traits("matmul"): "demo_product demo_square"})
    >>> rows()["demo_square"].family
    'matmul'
    """
    for traits, names in rows.items():
        for name in names.split():
            if name in _ROWS:
                raise ValueError(f"the operator {name} has two rows of traits")
            _ROWS[name] = traits


def rows() -> Mapping[str, Traits]:
    """Returns the rows that families registered, by the operator's name without the library."""
    return dict(_ROWS)


def traits_of(operator: Operator | Callable[..., Any]) -> Traits:
    """Returns the traits of an operator.

    Args:
        operator: a call of it, one of its overloads, or the function of its name that torch or a rule has.

    >>> import torch
    >>> traits_of(torch.ops.aten.bmm.default).family, traits_of(torch.ops.aten.dropout.default).draws
    ('matmul', True)
    """
    target = operator.target if isinstance(operator, Operator) else operator
    return _of_overload(target) if isinstance(target, OpOverload) else _named(operator_name(target))


@cache
def _of_overload(overload: Any) -> Traits:
    returned = (result.alias_info for result in overload._schema.returns)
    return replace(
        _named(operator_name(overload)),
        draws=may_draw(overload),
        mutates=overload._schema.is_mutable,
        is_view=any(alias is not None and not alias.is_write for alias in returned),
    )


@cache
def _named(full_name: str) -> Traits:
    library, _, name = full_name.rpartition(".")
    found = _ROWS.get(name)
    if found is None and "attention" in name:  # many kernels, of torch and of others, have such names
        found = Traits("attention")
    elif found is None and name.startswith(("conv", "_conv")):
        found = Traits("conv", transposed="transpose" in name)
    found = found or Traits()
    if library not in ("", "aten"):
        return found.of_prices()
    return found if has_gradient(name) else replace(found, has_gradient=False)


def family(op: Operator) -> str:
    """Returns the family that decides the kind of an operator's cost.

    ``matmul``, ``attention``, ``conv``, ``norm``, ``softmax``, ``index``, ``sort``, ``random``, ``reduce``, ``copy``,
    ``create``, ``view`` (free) or ``pointwise``, which all others count as. A reshape of what lies in order is a view, and
    so are a cast to the dtype that is there and a dropout that drops nothing.
    """
    traits = traits_of(op)
    return "view" if traits.free_when is not None and traits.free_when(op) else traits.family


def lies_in_order(op: Operator) -> bool:
    """Tells whether the first input is contiguous in the order of its dims."""
    if not op.inputs:
        return False
    expected = 1
    for size, step in zip(reversed(op.inputs[0].shape), reversed(op.inputs[0].stride)):
        if size != 1 and step != expected:
            return False
        expected *= size
    return len(op.inputs[0].shape) == len(op.inputs[0].stride)
