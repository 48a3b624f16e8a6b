"""Binds optimizers to the distributed parameters, and runs their steps on local tensors."""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import optim
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from shardwright.parameters.found_inf import agree_on_found_inf
from shardwright.parameters.handles import _HOOKED, MovedParameter, current
from shardwright.parameters.placements import _alike, _like, layout_of


@lru_cache(maxsize=1)
def _watch_optimizers() -> None:
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)
    agree_on_found_inf()


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    _finish_local_step(optimizer)
    moved = any(type(p) is MovedParameter for group in optimizer.param_groups for p in group["params"])
    if moved or _HOOKED not in vars(optimizer):
        rebind(optimizer)
    if _HOOKED in vars(optimizer) and len(args) == 1 and not kwargs:  # a closure must find the true parameters
        _begin_local_step(optimizer)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if _finish_local_step(optimizer) or _HOOKED not in vars(optimizer):
        return
    # Tell autograd what DTensor does not: the local tensors changed, so a forward before the step has no backward.
    params = [p for group in optimizer.param_groups for p in group["params"]]
    increment_version([p._local_tensor for p in params if type(p) is DTensor and p.grad is not None])


def rebind(optimizer: Optimizer) -> None:
    """Makes an optimizer work on the distributed parameters; it is called automatically before every step.

    New parameters replace the handles in the optimizer's lists, and their state follows. State in whole tensors (from steps
    before the distribution, or loaded from a single device's checkpoint) is cut to the parameter's piece; whole state of
    another
    shape is replicated; numbers such as ``step`` stay.

    Args:
        optimizer: any; one without distributed parameters stays as it is.
    """
    ours = False
    for group in optimizer.param_groups:
        params, on_device = group["params"], group.get("capturable") or group.get("fused")
        for i, old in enumerate(params):
            params[i] = new = current(old)
            if layout_of(new) is None:
                continue
            ours = True
            state = optimizer.state.pop(old, None) or {}
            for key, value in state.items():
                if not isinstance(value, torch.Tensor) or isinstance(value, DTensor):
                    continue
                if value.dim() or (value.shape == new.shape and key != "step"):
                    state[key] = _like(new, value)
                elif on_device:
                    state[key] = value.to(new.device)
            if state:
                optimizer.state[new] = state
    if ours and _HOOKED not in vars(optimizer):
        optimizer.register_load_state_dict_post_hook(rebind)
        optimizer.register_state_dict_pre_hook(_before_state_dict)
        optimizer.register_load_state_dict_pre_hook(_before_state_dict)
        setattr(optimizer, _HOOKED, True)


# Optimizers whose update of an element reads nothing but that element's own numbers. They step on local tensors, with
# the speed of plain ones: AdamW over 40 small DTensors takes 8.8 ms, over their local tensors 0.9.
_ELEMENTWISE: frozenset[type[Optimizer]] = frozenset(
    {optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax}
    | {optim.Adagrad, optim.Adadelta, optim.RMSprop, optim.Rprop, optim.ASGD}
)
_LOCAL_STEP = "_shardwright_local_step"


class _LocalStep(NamedTuple):
    """Tensors of an optimizer outside a step, and the local tensors of its parameters within."""

    params: list[list[torch.Tensor]]
    state: Any
    leaves: list[tuple[torch.Tensor, torch.Tensor]]


def _begin_local_step(optimizer: Optimizer) -> None:
    """Gives the optimizer local tensors instead of DTensors, until the step has ended."""
    groups, its = optimizer.param_groups, vars(optimizer)
    if type(optimizer) not in _ELEMENTWISE or any(group.get("differentiable") for group in groups):
        return
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return  # they may want to see the true parameters
    leaves: list[tuple[torch.Tensor, torch.Tensor]] = []
    lists: list[list[torch.Tensor]] = []
    state: defaultdict[torch.Tensor, Any] = defaultdict(dict)
    for group in groups:
        lists.append([])
        for parameter in group["params"]:
            values, grad = optimizer.state.get(parameter), parameter.grad
            if grad is None:
                continue
            leaf = parameter
            if type(parameter) is DTensor:
                split = parameter._spec.placements
                beside = [grad, *(v for v in (values or {}).values() if type(v) is DTensor)]
                if any(type(v) is not DTensor or v._spec.placements != split for v in beside):
                    return
                leaf = parameter._local_tensor.detach()
                leaf.grad = grad._local_tensor
                values = values and {k: v._local_tensor if type(v) is DTensor else v for k, v in values.items()}
            if values:
                state[leaf] = values
            lists[-1].append(leaf)
            leaves.append((parameter, leaf))
    its[_LOCAL_STEP] = _LocalStep([group["params"] for group in groups], optimizer.state, leaves)
    optimizer.state = state
    for group, params in zip(groups, lists):
        group["params"] = params


def _before_state_dict(optimizer: Optimizer, *rest: Any) -> None:
    _finish_local_step(optimizer)


def _finish_local_step(optimizer: Optimizer) -> bool:
    """Gives the optimizer its DTensors back, with new state. Works also after a step that failed."""
    step: _LocalStep | None = vars(optimizer).pop(_LOCAL_STEP, None)
    if step is None:
        return False
    for parameter, leaf in step.leaves:
        if leaf is parameter:
            if leaf in optimizer.state:
                step.state[leaf] = optimizer.state[leaf]
            continue
        if leaf.grad is None:
            parameter.grad = None  # zero_grad after a step that failed
        values = optimizer.state.get(leaf)
        if values is not None:
            kept = step.state[parameter]
            for key in kept.keys() - values.keys():
                del kept[key]
            for key, value in values.items():
                if type(kept.get(key)) is not DTensor or kept[key]._local_tensor is not value:
                    kept[key] = _beside(parameter, key, value)
    for group, params in zip(optimizer.param_groups, step.params):
        group["params"] = params
    optimizer.state = step.state
    return True


def _beside(parameter: Any, key: str, value: Any) -> Any:
    """Returns state made in a local step as a DTensor; numbers such as ``step`` as they are."""
    local = parameter._local_tensor
    if not isinstance(value, torch.Tensor) or value.shape != local.shape or (key == "step" and not local.dim()):
        return value
    return _alike(parameter, value)
