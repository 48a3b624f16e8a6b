"""Checks each ``AutoParallel`` that becomes an attribute of a module without its parameters.

A module finds parameters in the modules that it holds, and an ``AutoParallel`` is no module: an optimizer made from
``module.parameters()`` would not train them, and a ``state_dict()`` would leave them out, silently.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import nn

from shardwright.errors import ShardwrightError

_plain = nn.Module.__setattr__


@functools.lru_cache(maxsize=1)
def watch_holders(kind: type) -> None:
    """Makes modules refuse, from now on, objects of this type whose parameters they lack."""

    @functools.wraps(_plain)
    def __setattr__(self: nn.Module, name: str, value: Any) -> None:
        if isinstance(value, (kind, list, tuple, dict)):
            for net in _within(value, kind):
                _check(self, name, net)
        _plain(self, name, value)

    nn.Module.__setattr__ = __setattr__  # type: ignore[method-assign,assignment]


def _within(value: Any, kind: type) -> Iterator[Any]:
    if type(value) is kind:
        yield value
    elif isinstance(value, (list, tuple)):
        yield from (v for v in value if type(v) is kind)
    elif isinstance(value, dict):
        yield from (v for v in value.values() if type(v) is kind)


def _check(module: nn.Module, name: str, net: Any) -> None:
    if "_parameters" not in vars(module):
        return  # its own __init__ has not run; torch says so
    have = set(map(id, module.parameters()))
    missing = [n for n, p in net.named_parameters() if id(p) not in have]
    if missing:
        what = type(net.target).__name__ if isinstance(net.target, nn.Module) else getattr(net.target, "__name__", "a function")
        raise ShardwrightError(
            f"{type(module).__name__}.{name} = AutoParallel({what}): the module would not have its parameters "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}), so parameters(), state_dict() and an optimizer "
            "made from them would leave them out\n"
            f"  Hold the model itself before it, self.model = model; self.{name} = AutoParallel(model), or make one "
            "AutoParallel of the outer module"
        )
