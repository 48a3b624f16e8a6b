"""Marking: strategies, recompute marks and layouts that a user puts on functions, modules and tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from shardwright.api import train_step
from shardwright.api.marks import MARK
from shardwright.base.user_code import user_line
from shardwright.capture.attributes import check_attributes
from shardwright.capture.session import current_session
from shardwright.errors import ArgumentTypeError
from shardwright.ir.layout import Layout
from shardwright.ir.marks import Mark
from shardwright.ops import check_strategies
from shardwright.train.recompute.request import REQUEST, request_for


class ShardedFunction:
    """A function with a strategy; made by :func:`shard`. Outside ``AutoParallel`` it is the plain function."""

    def __init__(self, function: Callable[..., Any], mark: Mark):
        self.__wrapped_function__ = function
        self.mark = mark
        functools.update_wrapper(self, function, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        now = current_session()
        if now is not None:
            return now.run(self.mark, self.__wrapped_function__, args, kwargs)
        return self.__wrapped_function__(*args, **kwargs)

    def __repr__(self) -> str:
        return f"shard({self.mark.name}, in_strategy={self.mark.in_strategy})"


def shard(
    fn_or_module: Any,
    in_strategy: Any,
    out_strategy: Any = None,
    parameter_plan: dict[str, Any] | None = None,
    attributes: dict[str, Any] | None = None,
) -> Any:
    """Gives a function or a module a strategy.

    A function that is one operator behaves as the primitive of :mod:`shardwright.ops` does. A module, or a function of several
    operators, gets its inputs in the given layouts; the layouts inside follow from the inputs and ``parameter_plan``.

    Args:
        fn_or_module: any torch function, any function of tensors, or an ``nn.Module`` (marked in place).
        in_strategy: one entry per tensor input: slice counts, a Layout, or (for modules and functions of several
            operators) ``None`` to leave the input as it is.
        out_strategy: one entry per tensor output.
        parameter_plan: parameter name -> slice counts or Layout; modules only.
        attributes: operator attributes by name, as ``add_prim_attr`` takes them.

    Returns:
        The module itself, or a function to call in place of the given one.

    Raises:
        ArgumentTypeError: the target is not callable, or ``parameter_plan`` is no dict or has no module.

    >>> import torch
    >>> matmul = shard(torch.matmul, in_strategy=((2, 4), (4, 1)))
    >>> matmul(torch.ones(4, 8), torch.ones(8, 2)).shape
    torch.Size([4, 2])
    """
    check_strategies(in_strategy, out_strategy)
    asked = check_attributes(f"shard at {user_line()}", attributes)
    if parameter_plan is not None and not isinstance(parameter_plan, dict):
        raise ArgumentTypeError(f"parameter_plan is a {type(parameter_plan).__name__}; give a dict of names")
    if isinstance(fn_or_module, nn.Module):
        name = type(fn_or_module).__name__
        mark = Mark(name, in_strategy, out_strategy, parameter_plan, asked, user_line(), module_path="")
        fn_or_module.__dict__[MARK] = mark
        return fn_or_module
    if not callable(fn_or_module):
        raise ArgumentTypeError(f"shard({fn_or_module!r}): give a function or a module")
    if parameter_plan is not None:
        raise ArgumentTypeError("parameter_plan needs a module: a function owns no parameters")
    name = getattr(fn_or_module, "__name__", type(fn_or_module).__name__)
    return ShardedFunction(fn_or_module, Mark(name, in_strategy, out_strategy, None, asked, user_line()))


def recompute(module: nn.Module, **switches: bool) -> nn.Module:
    """Marks a module to be computed again in the backward pass. Only its inputs and outputs are kept.

    Values and gradients are the same to the bit, random masks included. Of nested marked modules the outermost counts; an
    operator with a setting of its own (:meth:`shardwright.ops.Primitive.recompute`) follows that.

    Args:
        module: marked in place.
        switches: ``mp_comm_recompute=True``: collectives inside the module are repeated too; ``False`` keeps their results, for
            more memory and less communication. ``parallel_optimizer_comm_recompute=False``: parameters that are stored in
            pieces are gathered a second time too. ``recompute_slice_activation=False``: what is kept is cut into slices, one
            on each of the ranks that hold the same, and gathered when it is needed.

    Returns:
        The module itself.

    Raises:
        ShardwrightError: an unknown switch.

    >>> import torch
    >>> block = recompute(torch.nn.Linear(4, 4), mp_comm_recompute=False)
    """
    if not isinstance(module, nn.Module):
        raise ArgumentTypeError(f"recompute({module!r}): give a module; for one operator, shardwright.ops.MatMul().recompute()")
    request = request_for(f"recompute({type(module).__name__})", module, user_line(), switches)
    module.__dict__[REQUEST] = replace(request, targets=())  # a copy of the module has a request of its own
    return module


def reshard(tensor: Tensor, layout: Layout) -> Tensor:
    """Pins a layout onto a tensor in the middle of a model. The value is unchanged; does nothing elsewhere.

    Raises:
        ArgumentTypeError: the arguments are not a tensor and a Layout.

    >>> import torch
    >>> x = torch.ones(4, 4)
    >>> reshard(x, Layout((2,), ("dp",))("dp", "None")) is x
    True
    """
    if not isinstance(tensor, Tensor):
        raise ArgumentTypeError(f"reshard: the first argument is a {type(tensor).__name__}, not a tensor")
    if not isinstance(layout, Layout):
        raise ArgumentTypeError(f"reshard: the second argument is {layout!r}; give a Layout")
    now = current_session()
    if now is None:
        return tensor
    return now.pin(Mark("reshard", (layout,), source=user_line(), is_pin=True), tensor)


def value_and_grad(
    fn: Callable[..., Any], grad_position: Any = 0, weights: Iterable[nn.Parameter] | None = None, has_aux: bool = False
) -> train_step.GradFunction:
    """Returns a function that returns the value of ``fn`` and its gradients.

    Args:
        fn: returns the loss, a scalar; with ``has_aux``, a tuple whose first element is the loss.
        grad_position: positions of the inputs to differentiate by: an int, a tuple of ints, or ``None``.
        weights: parameters to differentiate by.
        has_aux: whether ``fn`` returns more than the loss.

    Returns:
        A function to ``(value of fn, gradients)``: the gradients of the inputs, of the weights (a list, ``None`` where
        unused), or a pair of both where both are asked for. Within a train step run by :class:`AutoParallel` it is
        parallel.

    >>> import torch
    >>> layer = torch.nn.Linear(3, 1)
    >>> step = value_and_grad(lambda x: layer(x).sum(), None, layer.parameters())
    >>> loss, grads = step(torch.ones(2, 3))
    >>> grads[1]
    tensor([2.])
    """
    return train_step.GradFunction(fn, grad_position, weights, has_aux)
