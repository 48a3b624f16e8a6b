"""Numbers that change: attributes of modules, such as a temperature or a count of steps, as inputs of the program.

A capture takes a number for a constant. One that changes again and again would be captured and planned in every step; so from
its second change on a :class:`Number` stands in its place while the callable is captured. It remembers how it was computed,
becomes a tensor where it meets one, and is computed anew in every call. What Python decides by it (``if self.steps > 100``) is
a guard: a program holds as long as the decisions are the same. Where a number goes any other way (into ``math.exp``, a shape, a
text), it stays a constant.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.base.torch_private import annotate

NUMBER = "shardwright_number"  # marks the operator that makes the tensor of a number, with which one it is
# Operators of torch between a tensor and a number that a tensor of no dims can stand for exactly.
_WITH_TENSORS = frozenset(
    [
        "add", "sub", "mul", "div", "true_divide", "rsub", "add_", "sub_", "mul_", "div_", "__radd__", "__rsub__", "__rmul__",
        "__rdiv__", "__rtruediv__", "__iadd__", "__isub__", "__imul__", "__idiv__",
    ]
)  # fmt: skip


class EscapeError(Exception):
    """A number went where it can only be a constant."""


@dataclass(frozen=True)
class Formula:
    """Formula by which a number is computed of those that the callable reads.

    Args:
        function: of the parts; ``None`` for a number that is read.
        parts: formulas and plain numbers, or the position of the number that is read.
    """

    function: Callable[..., Any] | None
    parts: tuple[Any, ...]

    def reads(self) -> set[int]:
        """Returns the positions of the numbers that it reads."""
        if self.function is None:
            return {self.parts[0]}
        return set().union(*[part.reads() for part in self.parts if isinstance(part, Formula)])

    def value(self, read: Sequence[Any]) -> Any:
        """Computes the number of the values that are read now."""
        if self.function is None:
            return read[self.parts[0]]
        return self.function(*[part.value(read) if isinstance(part, Formula) else part for part in self.parts])


@dataclass
class Numbers:
    """The numbers of one capture.

    Args:
        root: the module that is captured.
        names: paths of the attributes that change.

    Attributes:
        formulas: those that became tensors.
        guards: comparisons that Python decided by, with what they gave.
    """

    root: nn.Module
    names: tuple[str, ...]
    formulas: list[Formula] = field(default_factory=list)
    guards: list[tuple[Formula, Any]] = field(default_factory=list)
    escaped: set[int] = field(default_factory=set)  # positions of those that are constants after all

    def owners(self) -> list[tuple[dict[str, Any], str]]:
        """Returns, per name, the table that has it and its key."""
        found = []
        for name in self.names:
            path, _, attribute = name.rpartition(".")
            found.append((vars(self.root.get_submodule(path)), attribute))
        return found

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Puts stand-ins into the place of the attributes within the block."""
        places = [(table, key, table[key]) for table, key in self.owners()]
        for at, (table, key, value) in enumerate(places):
            table[key] = Number(self, Formula(None, (at,)), value)
        try:
            yield
        finally:
            for table, key, value in places:
                table[key] = value

    def read(self) -> list[Any]:
        """Returns the values that the attributes have now."""
        return [table[key] for table, key in self.owners()]

    def hold(self, read: Sequence[Any]) -> bool:
        """Tells whether Python would decide as it did in the capture."""
        return all(guard.value(read) == seen for guard, seen in self.guards)


class Number:
    """A stand-in for an ``int`` or ``float`` while the callable is captured.

    Args:
        numbers: the numbers of the capture.
        formula: how it is computed.
        value: what it is at this time.
    """

    def __init__(self, numbers: Numbers, formula: Formula, value: Any):
        self.numbers, self.formula, self.value = numbers, formula, value

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override,misc]
        return type(self.value)

    def escape(self, *args: Any, **kwargs: Any) -> Any:
        """Gives up: the number is a constant of the capture."""
        self.numbers.escaped |= self.formula.reads()
        raise EscapeError

    __int__ = __float__ = __index__ = __complex__ = __hash__ = __round__ = __trunc__ = __floor__ = __ceil__ = escape  # type: ignore
    __str__ = __repr__ = __format__ = __getattr__ = __iter__ = __len__ = __getitem__ = escape  # type: ignore[assignment]

    def __bool__(self) -> bool:
        return self._decided(operator.truth)

    def _decided(self, function: Callable[..., Any], *others: Any) -> bool:
        made = self._computed(function, *others)
        self.numbers.guards.append((made.formula, made.value))
        return bool(made.value)

    def _computed(self, function: Callable[..., Any], *others: Any, swapped: bool = False) -> Any:
        if any(isinstance(other, Tensor) for other in others):
            return NotImplemented
        if not all(type(other) in (int, float, bool, Number) for other in others):
            self.escape()
        operands = [self, *others][:: -1 if swapped else 1]
        formulas = tuple(o.formula if type(o) is Number else o for o in operands)
        return Number(self.numbers, Formula(function, formulas), function(*[_value(o) for o in operands]))

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [a for a in args if type(a) is Number]
        numbers = given[0].numbers if given else None
        tensors = [a for a in args if isinstance(a, Tensor)]
        name = getattr(function, "__name__", "")
        if numbers is None or kwargs or len(given) != 1 or len(tensors) != 1 or len(args) != 2 or name not in _WITH_TENSORS:
            for number in [*given, *(v for v in (kwargs or {}).values() if type(v) is Number)]:
                number.escape()
            raise EscapeError
        return function(*[a.tensor(tensors[0]) if type(a) is Number else a for a in args])

    def tensor(self, beside: Tensor) -> Tensor:
        """Returns a tensor of no dims that gives, beside another tensor, what the number would."""
        dtype = torch.float64 if isinstance(self.value, float) else torch.int64
        wanted = torch.result_type(beside, self.value)
        if torch.result_type(beside, torch.empty((), dtype=dtype, device="meta")) != wanted:
            if wanted in (torch.float16, torch.bfloat16):  # where the number itself is not rounded
                self.escape()
            dtype = wanted
        at = len(self.numbers.formulas)
        self.numbers.formulas.append(self.formula)
        with annotate({NUMBER: (at, dtype)}):
            return torch.full((), self.value, dtype=dtype)


def _value(operand: Any) -> Any:
    return operand.value if type(operand) is Number else operand


def _arithmetic(function: Callable[..., Any], swapped: bool = False) -> Any:
    return lambda self, *others: self._computed(function, *others, swapped=swapped)


def _comparison(function: Callable[..., Any]) -> Any:
    return lambda self, other: NotImplemented if isinstance(other, Tensor) else self._decided(function, other)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    setattr(Number, f"__{_name}__", _arithmetic(getattr(operator, _name)))
    setattr(Number, f"__r{_name}__", _arithmetic(getattr(operator, _name), swapped=True))
for _name in ("neg", "pos", "abs"):
    setattr(Number, f"__{_name}__", _arithmetic(getattr(operator, _name)))
for _compare in (operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne):
    setattr(Number, f"__{_compare.__name__}__", _comparison(_compare))
