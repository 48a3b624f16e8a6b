"""Targets that are refused: ambiguous names, what splits batches or scales losses besides, nets without parameters."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from shardwright.base.torch_private import FakeTensor
from shardwright.base.user_code import user_line
from shardwright.errors import CaptureError, ShardwrightError

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def refuse_wrapped(target: Any) -> None:
    """Refuses a model that has been wrapped to be data parallel.

    Raises:
        ShardwrightError: it has.
    """
    wrapped = [m for m in target.modules() if isinstance(m, _WRAPPERS)] if isinstance(target, nn.Module) else []
    if wrapped:
        raise ShardwrightError(
            f"{type(wrapped[0]).__name__} is in what AutoParallel is given, at {user_line()}: both reduce gradients\n"
            "  Give the module that it wraps, model.module"
        )


def refuse_scaled_losses(kwargs: dict[str, Any]) -> None:
    """Refuses a trainer that multiplies losses by the number of ranks, where the batch is that of all ranks together.

    Args:
        kwargs: of a call, whose batch each rank gives a part of.

    Raises:
        ShardwrightError: it is called by the Trainer of Hugging Face, with the number of tokens of all ranks.
    """
    frame = sys._getframe() if kwargs.get("num_items_in_batch") is not None else None
    while frame is not None:
        if frame.f_globals.get("__name__") == "transformers.trainer":
            raise ShardwrightError(
                "the Trainer of Hugging Face multiplies the loss by the number of ranks, but with "
                'dataset_strategy("data_parallel") it is the loss of all ranks already\n'
                "  Write trainer.model_accepts_loss_kwargs = False before trainer.train()"
            )
        frame = frame.f_back


def refuse_ambiguous_names(net: Any, target: nn.Module) -> None:
    """Makes reading a name of the user's model that ``net`` has too an error, outside of this package.

    Args:
        net: an ``AutoParallel``.
        target: the model that it runs.
    """
    own = {*vars(target), *target._modules, *target._parameters, *target._buffers}
    of_all = {*dir(nn.Module), *vars(nn.Module())}
    names = sorted(name for name in own if not name.startswith("_") and name not in of_all and _has(net, name))
    if not names:
        return
    kind = type(net)
    members = {name: _ambiguous(name, kind, type(target).__name__) for name in names}
    object.__setattr__(net, "__class__", type(kind.__name__, (kind,), {**members, "__module__": kind.__module__}))


def _has(net: Any, name: str) -> bool:
    return name in vars(net) or hasattr(type(net), name)


def _ambiguous(name: str, kind: type, target: str) -> Any:
    def read(self: Any) -> Any:
        if sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] != "shardwright":
            raise ShardwrightError(
                f"net.{name} may be the {kind.__name__}'s own {name} or that of {target}, at {user_line()}\n"
                f"  Read the latter from the model itself: model.{name}; for the former give the model's another name"
            )
        if name in vars(self):
            return vars(self)[name]
        return getattr(super(type(self), self), name)

    def write(self: Any, value: Any) -> None:
        plain = getattr(kind, name, None)
        if isinstance(plain, property) and plain.fset is not None:
            plain.fset(self, value)
        else:
            vars(self)[name] = value

    return property(read, write)


def check_nested(net: Any) -> None:
    """Refuses a call of a net within a capture that lacks its parameters, as they would get no gradient.

    Args:
        net: the ``AutoParallel`` that is called.

    Raises:
        CaptureError: there are such parameters.
    """
    owns = isinstance(net.target, nn.Module)  # tensors that a function reads itself have other names here
    outside = [n for n, p in net.named_parameters() if not isinstance(p, FakeTensor) and (owns or "." in n)]
    if outside:
        raise CaptureError(
            f"{net!r} is called within another AutoParallel that does not have its parameters ({', '.join(outside[:3])}): "
            f"they would get no gradient, at {user_line()}\n  Hold the model itself in the outer module and call that"
        )
