"""Functionalise: finds functional forms of in-place operators and of writes through views.

Export keeps in-place operators and views as the user wrote them. In a graph no value changes, so a write makes a new value.
A write through a view is scattered back into the viewed value, and a view that is read after such a write is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from shardwright.base import operators
from shardwright.base.torch_private import has_side_effect
from shardwright.errors import CaptureError


@dataclass
class Tracked:
    """One tensor of the exported graph: its current value and how to make it again from the tensor it views."""

    value: str
    meta: Tensor
    parent: fx.Node | None = None
    remake: tuple[Any, tuple[Any, ...], dict[str, Any], int | None] | None = None
    version: int = 0  # version of the parent it was made from
    writes: int = 0
    context: Any = None  # autocast and grad mode in which it was made, where it is a view


def is_mutation(target: Any) -> bool:
    """Tells whether an overload writes to its first argument."""
    schema = getattr(target, "_schema", None)
    return bool(schema and any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments))


def functional_form(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], where: str) -> Form:
    """Finds the call that computes what a writing call writes, and leaves its arguments unchanged.

    Args:
        target: the overload that writes.
        args, kwargs: its arguments, which may be fx nodes.
        where: the user's line, for errors.

    Raises:
        CaptureError: there is no such overload.
    """
    schema = target._schema
    given = dict(zip((a.name for a in schema.arguments), args)) | kwargs
    given = {_SELF.get(name, name): value for name, value in given.items()}
    written = [a for a in schema.arguments if _is_written(a)]
    is_out = all(a.kwarg_only for a in written) and len(written) == len(schema.returns)
    rest = [a for a in schema.arguments if not (is_out and _is_written(a))]
    values = {_name(a): a.default_value for a in rest if a.has_default_value()}
    values |= {_name(a): given[_name(a)] for a in rest if _name(a) in given}
    beside = 0 if is_out or _in_place(written, schema) else len(schema.returns)
    for candidate in _candidates(target):
        found = candidate._schema
        if len(found.returns) != beside + len(written) or not _takes(found, rest, candidate):
            continue
        named = {a.name: values[_name(a)] for a in found.arguments if _name(a) in values}
        plain = []
        for argument in found.arguments:
            if argument.kwarg_only or argument.name not in named:
                break
            plain.append(named.pop(argument.name))
        kept = {n: v for n, v in named.items() if not _is_default(found, n, v)}
        return Form(candidate, tuple(plain), kept, tuple(given.get(_name(a)) for a in written), beside)
    raise CaptureError(
        f"the in-place operator {target} at {where} has no form that leaves its input alone; use one that returns a new tensor"
    )


@dataclass(frozen=True)
class Form:
    """A call that leaves its arguments unchanged.

    Its first ``beside`` results are those that the writing call returns; the others are the new values of ``written``.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    written: tuple[Any, ...]
    beside: int


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _in_place(written: list[Any], schema: Any) -> bool:
    """Tells whether the call returns what it writes to, and nothing else."""
    return len(written) == len(schema.returns) and all(r.alias_info is not None for r in schema.returns)


def _candidates(target: Any) -> Iterator[Any]:
    """Yields overloads that write to nothing and may compute the same, the likeliest first."""
    if target in operators.OTHER_FORMS:
        yield operators.OTHER_FORMS[target]
        return
    for packet in operators.functional_packets(target):
        for overload in sorted(packet.overloads(), key=lambda o: o != target._overloadname):
            candidate = getattr(packet, overload)
            if not is_mutation(candidate):
                yield candidate


def _takes(found: Any, given: list[Any], candidate: Any) -> bool:
    """Tells whether an overload takes arguments of these names and types, in any order.

    Overloads that a script defines do not count.
    """
    if candidate in operators.OTHER_FORMS.values():
        return True
    return {_name(a): _type(a) for a in found.arguments} == {_name(a): _type(a) for a in given}


_SELF = {"input": "self"}  # a few overloads name their first argument "input", others "self"


def _name(argument: Any) -> str:
    return _SELF.get(argument.name, argument.name)


def _type(argument: Any) -> str:
    return str(argument.type)


def _is_default(schema: Any, name: str, value: Any) -> bool:
    """Tells whether a value is the default of an overload's argument."""
    argument = next(a for a in schema.arguments if a.name == name)
    if not argument.has_default_value() or isinstance(value, (fx.Node, Tensor)):
        return False
    return type(value) is type(argument.default_value) and bool(value == argument.default_value)


def view_of(target: Any) -> Any:
    """Returns the overload that makes the same view as an in-place view operator."""
    types = {a.name: _type(a) for a in target._schema.arguments}
    packet = operators.functional_packets(target)[0]
    overloads = (getattr(packet, o) for o in packet.overloads())
    return next(o for o in overloads if {a.name: _type(a) for a in o._schema.arguments} == types)


def diagonal_mask(emit: Callable[..., str], like: Tensor, wrap: bool) -> str:
    """Emits the mask of what ``fill_diagonal_`` writes to: booleans that broadcast against a tensor like this."""
    shape, device = tuple(like.shape), like.device

    def eye(rows: int, columns: int) -> str:
        return emit(operators.EYE, rows, columns, dtype=torch.bool, device=device)

    if len(shape) == 2:
        rows, columns = shape
        if not wrap or rows <= columns + 1 or not columns:
            return eye(rows, columns)
        times = -(-rows // (columns + 1))  # the diagonal starts over after one row without an element
        return emit(operators.SLICE, emit(operators.REPEAT, eye(columns + 1, columns), [times, 1]), 0, 0, rows)
    mask = ""
    for dim in range(1, len(shape)):
        pair = emit(operators.VIEW, eye(shape[0], shape[dim]), [n if d in (0, dim) else 1 for d, n in enumerate(shape)])
        mask = emit(operators.LOGICAL_AND, mask, pair) if mask else pair
    return mask


def scatter_back(node: fx.Node, which: int | None, parent: Tensor, where: str) -> Callable[[Callable[..., Any], Any, Any], Any]:
    """Builds the function that writes a view's new value into the viewed tensor.

    Args:
        node: the fx node that made the view.
        which: the number of the view among the outputs of ``node``; ``None`` if it has one output.
        parent: the fake tensor that is viewed.
        where: the user's line that writes.

    Returns:
        A function of ``(emit, value of the parent, new value of the view)``.

    Raises:
        CaptureError: there is no such function for this kind of view.
    """
    kind = operators.kind_of_view(node.target)
    args: list[Any] = [*node.args[1:]]
    shape = list(parent.shape)

    def argument(position: int, key: str, default: Any) -> Any:
        return args[position] if position < len(args) else node.kwargs.get(key, default)

    if kind == "reshaped":
        return lambda emit, base, new: emit(operators.RESHAPE, new, shape)
    if kind == "same":
        return lambda emit, base, new: new
    if kind in ("two dims swapped", "last dims swapped"):
        d0, d1 = (args[0], args[1]) if kind == "two dims swapped" else (-2, -1)
        return lambda emit, base, new: emit(operators.TRANSPOSE, new, d0, d1) if len(shape) > 1 else new
    if kind == "permuted":
        order = [d % len(shape) for d in args[0]]
        inverse = [order.index(i) for i in range(len(shape))]
        return lambda emit, base, new: emit(operators.PERMUTE, new, inverse)
    if kind == "one index":
        return lambda emit, base, new: emit(operators.SELECT_SCATTER, base, new, args[0], args[1])
    if kind in ("sliced", "narrowed"):
        dim = argument(0, "dim", 0)
        if kind == "narrowed":
            start, end, step = args[1], args[1] + args[2], 1
        else:
            start, end, step = argument(1, "start", None), argument(2, "end", None), argument(3, "step", 1)
        return lambda emit, base, new: emit(operators.SLICE_SCATTER, base, new, dim, start, end, step)
    if kind == "in indices" and which is not None:
        dim = argument(0, "dim", 0)
        return lambda emit, base, new: emit(operators.SELECT_SCATTER, base, new, dim, which)
    if kind == "in pieces" and which is not None:
        dim = argument(1, "dim", 0)
        sizes = [p.shape[dim] for p in node.meta["val"]]
        start = sum(sizes[:which])
        return lambda emit, base, new: emit(operators.SLICE_SCATTER, base, new, dim, start, start + sizes[which], 1)
    if kind == "diagonal":
        rest = [argument(0, "offset", 0), argument(1, "dim1", 0), argument(2, "dim2", 1)]
        return lambda emit, base, new: emit(operators.DIAGONAL_SCATTER, base, new, *rest)
    raise CaptureError(f"a write through {node.target} at {where} cannot be captured; write to a tensor that is no such view")


# -- running statistics: operators write to them although their schema does not say so -------------------------------


for _overload in operators.moves_statistics():
    has_side_effect(_overload)  # one whose result nothing reads moves its statistics all the same


def updates_statistics(node: fx.Node) -> bool:
    """Tells whether an operator moves the running statistics passed to it."""
    flag = operators.statistics_flag(node.target)
    if flag is None:
        return False
    given = named_arguments(node)
    return bool(given[flag]) and isinstance(given["running_mean"], fx.Node)


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """Returns the arguments of an operator by name."""
    schema = node.target._schema  # type: ignore[union-attr]
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    return defaults | dict(zip((a.name for a in schema.arguments), node.args)) | dict(node.kwargs)


def draws(node: fx.Node) -> bool:
    """Tells whether an operator of an export takes numbers from a generator."""
    if node.op != "call_function" or not operators.may_draw(node.target):
        return False
    given = named_arguments(node)
    return bool(given.get("train", True)) and bool(given.get("dropout_p", 1.0) > 0.0)


def moved_statistics(emit: Callable[..., Any], node: fx.Node, x: str, shape: tuple[int, ...], mean: str, var: str) -> list[str]:
    """Emits the running mean and variance as a norm in training moves them.

    Args:
        emit: emits a call and returns the names of its outputs.
        node: the norm.
        x: the name of the value that is normalised.
        shape: its global shape.
        mean, var: names of the running statistics before.
    """
    given = named_arguments(node)
    # Each sample may have its own statistics; the mean over samples then moves the running ones.
    of_samples = operators.has_statistics_of_samples(node.target)
    if of_samples:
        samples, channels = shape[:2]
        (x,) = emit(operators.RESHAPE, x, [1, samples * channels, *shape[2:]])
        mean, var = (emit(operators.REPEAT, value, [samples])[0] for value in (mean, var))
    norm = operators.NORM_WITH_STATISTICS
    moved = list(emit(norm, x, None, None, mean, var, True, given["momentum"], given["eps"])[3:])
    if of_samples:
        apart = [emit(operators.RESHAPE, value, [samples, channels])[0] for value in moved]
        moved = [emit(operators.MEAN, value, [0])[0] for value in apart]
    return moved
