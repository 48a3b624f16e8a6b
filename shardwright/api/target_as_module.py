"""Target as module: what an ``AutoParallel`` has of ``nn.Module``: the parameters, buffers and submodules of its target.

It is a module that shares the tables of its target's module: both have the same parameters by the same names, and what is done
to one is done to the other. A module that holds it has the target's parameters, under the name that it gives it.
"""

from __future__ import annotations

import functools
import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from shardwright.errors import ShardwrightError


class _ForwardOfTarget:
    """The call without hooks; it has the signature of the target, which trainers read to see what a model takes."""

    def __get__(self, net: TargetAsModule | None, owner: type) -> Callable[..., Any]:
        return _forward_of_any if net is None else _Forward(net)

    def __set__(self, net: TargetAsModule, value: Any) -> None:
        raise ShardwrightError(
            f"the forward of an {type(net).__name__} cannot be replaced: calls run its program\n"
            "  Replace the forward of the model, before the first call"
        )


def _forward_of_any(self: TargetAsModule, *args: Any, **kwargs: Any) -> Any:
    """Runs the target; what a class shows as its forward."""
    return self.run(*args, **kwargs)


class TargetAsModule(nn.Module):
    """A module with the state of another, or of what a function reads.

    Args:
        target: the module or function. A subclass sets ``__wrapped_function__`` to it when its own attributes are there: from
            then on attributes that it does not have are the target's.
    """

    def __init__(self, target: Callable[..., Any]):
        super().__init__()
        self.target = target
        if not isinstance(target, nn.Module):
            functools.update_wrapper(self, target, updated=())

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """The module that owns the parameters."""

    @abstractmethod
    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the target."""

    @abstractmethod
    def _method(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """Returns what runs where a method of the target is reached through this object."""

    # -- calls --------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the target, with the hooks that are registered on this object around it."""
        own = self.__dict__
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return nn.Module.__call__(self, *args, **kwargs)
        return self.run(*args, **kwargs)

    forward = _ForwardOfTarget()  # type: ignore[assignment]

    # -- state --------------------------------------------------------------------------------------------------------

    def _table(self, name: str) -> Any:
        return getattr(self.module, name)

    # nn.Module's own methods read these, and so work on the target's; its __init__ sets them, to no effect.
    _parameters = property(lambda self: self._table("_parameters"), lambda self, value: None)  # type: ignore[assignment]
    _buffers = property(lambda self: self._table("_buffers"), lambda self, value: None)  # type: ignore[assignment]
    _modules = property(lambda self: self._table("_modules"), lambda self, value: None)  # type: ignore[assignment]
    _non_persistent_buffers_set = property(  # type: ignore[assignment]
        lambda self: self._table("_non_persistent_buffers_set"), lambda self, value: None
    )
    training = property(  # type: ignore[assignment]
        lambda self: self._table("training"),
        lambda self, value: setattr(self.module, "training", value) if "target" in self.__dict__ else None,
    )

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yields the target's module, in the place of this one, and its submodules."""
        return self.module.named_modules(memo, prefix, remove_duplicate)

    def apply(self, fn: Callable[[nn.Module], None]) -> Any:
        """Calls ``fn`` on the target's module and all within it."""
        self.module.apply(fn)
        return self

    def register_buffer(self, name: str, tensor: Any, persistent: bool = True) -> None:
        """Registers a buffer of the target's module."""
        self.module.register_buffer(name, tensor, persistent)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Registers a parameter of the target's module."""
        self.module.register_parameter(name, param)

    def train(self, mode: bool = True) -> Any:
        """Sets the target's module to training or evaluation."""
        self.module.train(mode)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the target's state, by the target's names."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Loads a state of the target, by the target's names."""
        return self.module.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.module._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        self.module._apply(fn, recurse)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ShardwrightError(
            f"{type(self).__name__} cannot be pickled: its plans hold process groups and generated code\n"
            "  Save net.state_dict(), and make the model and its AutoParallel anew"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets attributes of the target that are read through this object: ``net.dropout.p``, ``net.scale``."""
        if name == "__class__":
            raise ShardwrightError(
                f"the class of an {type(self).__name__} cannot be changed, as parametrizations do\n"
                "  Parametrize the model itself: torch.nn.utils.parametrize.register_parametrization(model, ...)"
            )
        target = self.__dict__.get("target")
        own = name in self.__dict__ or hasattr(type(self), name) or "__wrapped_function__" not in self.__dict__
        is_state = isinstance(value, (nn.Module, nn.Parameter))
        if not own and isinstance(target, nn.Module) and (is_state or hasattr(target, name)):
            setattr(target, name, value)
        else:
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        target = self.__dict__.get("target")
        if target is None:
            raise AttributeError(name)
        found = getattr(target, name)
        is_method = isinstance(target, nn.Module) and inspect.ismethod(found) and found.__self__ is target
        return self._method(name, found) if is_method else found


class _Forward:
    """The bound ``forward`` of an object, with the signature of its target."""

    __slots__ = ("net",)

    def __init__(self, net: TargetAsModule):
        self.net = net

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.net.run(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        target = self.net.target
        return inspect.signature(target.forward if isinstance(target, nn.Module) else target)
