"""Calls of aten's overloads, made up from their schemas: what tests of a kind loop over."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

ALL_SIZES = os.environ.get("SHARDWRIGHT_TEST_ALL") == "1"
SHAPE = (6, 4)


def overloads(wanted: Callable[[Any], bool]) -> list[Any]:
    """Every overload of aten that is wanted, by name."""
    found = []
    for name in sorted(dir(torch.ops.aten)):
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads() if hasattr(packet, "overloads") else ():
            target = getattr(packet, overload)
            if wanted(target):
                found.append(target)
    return found


def some(members: list[Any], every: int) -> list[Any]:
    """Every so many of the members; all of them where all sizes are tested."""
    return members if ALL_SIZES else members[::every]


def _tensor(kind: str, shape: tuple[int, ...]) -> Tensor:
    if kind == "bool":
        return torch.rand(shape) > 0.5
    if kind == "int":
        return torch.randint(1, 4, shape)
    made = torch.rand(shape) + 0.5
    return made.double() if kind == "double" else made


def arguments(target: Any) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """Made-up arguments of an overload, of several dtypes: tensors of one shape, small numbers."""
    for kind in ("float", "int", "bool", "double"):
        for index_kind in ("int", kind):
            yield _made(target, kind, index_kind)


def _made(target: Any, kind: str, index_kind: str) -> tuple[list[Any], dict[str, Any]]:
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for argument in target._schema.arguments:
        made = _argument(argument, kind, index_kind)
        if argument.kwarg_only:
            if not argument.has_default_value():
                kwargs[argument.name] = made
        else:
            args.append(made)
    return args, kwargs


def _argument(argument: Any, kind: str, index_kind: str) -> Any:
    text, name = str(argument.type), argument.name
    if name in ("index", "indices", "mask") or name.startswith("batch"):
        kind = "bool" if name == "mask" else index_kind
    if text == "Tensor":
        if name == "index":
            return torch.zeros(SHAPE, dtype=torch.int64)
        return _tensor(kind, SHAPE)
    if argument.has_default_value() and text != "number":
        return argument.default_value
    return {"number": 2, "int": 1, "float": 0.5, "bool": False, "List[int]": [0], "str": "add"}.get(text)


# Kernels of torch that end the process where the made-up shapes do not fit.
CRASHES = ("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_functional", "_batch_norm_with_update")


def runs(target: Any, call: Callable[..., Any]) -> tuple[list[Any], dict[str, Any]] | None:
    """Arguments that the single device accepts, if some are."""
    if target.overloadpacket.__name__ in CRASHES:
        return None
    for args, kwargs in arguments(target):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call(*[a.clone() if isinstance(a, Tensor) else a for a in args], **kwargs)
        except Exception:
            continue
        return args, kwargs
    return None


def fresh(args: list[Any]) -> list[Any]:
    return [a.clone() if isinstance(a, Tensor) else a for a in args]
